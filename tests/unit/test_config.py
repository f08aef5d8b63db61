"""RunConfig: recipes valid, faults told in one line each with value, rule and remedy."""

import json
from pathlib import Path

import pytest
import yaml

from maskvr_ds.config import (
    ConfigError,
    RunConfig,
    deepspeed_config_path,
    dump_config,
    load_config,
    recipe_text,
    recipes,
)

MINIMAL = {"output_dir": "runs/x", "data": {"path": "corpus"}, "training": {"steps": 100}}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **changes}))
    return path


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_valid(name: str) -> None:
    config = load_config(name)
    assert deepspeed_config_path(config.deepspeed).is_file()
    assert yaml.safe_load(recipe_text(name))["output_dir"]


def test_dump_is_read_back_as_the_same(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, optimizer={"betas": [0.8, 0.9], "lr": 1e-5}, monitor={"wandb": {"project": "p"}})
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_assignments_override_and_make_sections(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path), ["optimizer.lr=3e-4", "model.preset=bert-tiny", "model.num_hidden_layers=5", "data.path=a b"]
    )
    assert config.optimizer.lr == 3e-4
    assert (config.model.hidden_size, config.model.num_hidden_layers) == (128, 5), "fields override the preset"
    assert config.data.path == Path("a b")


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; known here: name, lr, betas"),
        ("optimiser.lr=1", "optimiser: unknown key; known here: output_dir"),
        ("monitor.wandb={project: p, teem: x}", "monitor.wandb.teem: unknown key; known here: project, group, team"),
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0 .given: 0."),
        ("masking.rate=1", "masking.rate: Input should be less than 1 .given: 1."),
        ("masking.rate=0", "masking.rate: Input should be greater than 0"),
        ("masking.random_probability=0.3", "more than 1"),
        ("model.num_attention_heads=7", "hidden_size 768 is not a multiple of num_attention_heads 7"),
        ("model.preset=bert-huge", "model.preset: Input should be 'bert-tiny'"),
        ("schedule.warmup_steps=101", "schedule.warmup_steps 101 exceeds the schedule's 100 steps"),
        ("training.schedule_steps=50", "training.steps 100 exceeds training.schedule_steps 50"),
        ("schedule.final_lr=1", "schedule.final_lr 1.0 exceeds optimizer.lr"),
        ("training={}", "training.steps: required, but not given"),
        ("seed", "section.field=value expected"),
        ("seed.x=1", "seed: Input should be a valid integer"),
        ("output_dir.x=1", "output_dir is a value, not a section"),
        ("seed=[", "the value is not YAML"),
    ],
)
def test_faults_are_named(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path), [assignment])


def test_config_that_is_neither_file_nor_recipe() -> None:
    with pytest.raises(ConfigError, match=r"'no-such': neither a file nor a recipe \(.*demo_cpu"):
        load_config("no-such")


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_config_that_is_not_a_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"not YAML|a mapping of sections expected"):
        load_config(path)


def test_global_batch_divides() -> None:
    config = RunConfig.model_validate({**MINIMAL, "batch": {"global_size": 32768, "micro_size": 64}})
    assert config.accumulation_steps(8) == 64
    with pytest.raises(ConfigError, match=r"32768 is not a multiple of .* 64 × 24 ranks = 1536.*32256 or 33792"):
        config.accumulation_steps(24)
    with pytest.raises(ConfigError, match=r"set batch\.global_size to 65536,"):
        config.accumulation_steps(1024)


def test_deepspeed_config_must_exist() -> None:
    with pytest.raises(ConfigError, match="'zero9' is neither a file nor one of zero0_bf16, zero0_fp32"):
        deepspeed_config_path("zero9")
    with pytest.raises(ConfigError, match="neither a file"):
        deepspeed_config_path("../ds_configs/zero1_fp32")


def test_shipped_deepspeed_configs_leave_to_run_config_what_it_owns() -> None:
    from maskvr_ds.engine import read_deepspeed_config

    for name in ("zero0_fp32", "zero1_fp32", "zero2_fp32", "zero0_bf16", "zero1_bf16", "zero2_bf16"):
        config = read_deepspeed_config(deepspeed_config_path(name))
        assert f"zero{config['zero_optimization']['stage']}" == name.split("_")[0]
        assert config.get("bf16", {}).get("enabled", False) == name.endswith("bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"gradient_clipping": 0.5}, "sets gradient_clipping to 0.5.*set optimizer.gradient_clipping there"),
        ({"train_batch_size": 8}, "sets train_batch_size to 8.*set batch.global_size there"),
        ({"optimizer": {"type": "Adam"}}, "sets optimizer to"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler to"),
        ({"zero_optimization": {"stage": 3}}, "ZeRO stage 3; supported are 0, 1, 2"),
        ({"fp16": {"enabled": True}}, "fp16 is enabled"),
        ([1], "a JSON object expected"),
    ],
)
def test_deepspeed_config_faults(tmp_path: Path, content: object, message: str) -> None:
    from maskvr_ds.engine import read_deepspeed_config

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_config(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_deepspeed_config(path)
