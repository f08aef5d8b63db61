"""RunConfig: recipes are valid; each fault is reported in one line with value, rule and remedy."""

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel

import ds_configs
from maskvr_ds.config import (
    ConfigError,
    MaskingConfig,
    RunConfig,
    deepspeed_config_path,
    dump_config,
    load_config,
    recipe_parts,
    recipe_text,
    recipes,
)
from maskvr_ds.config.loading import read_yaml
from maskvr_ds.config.masking import SpanConfig

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


def test_a_file_is_merged_over_its_base(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("base: demo_cpu\nseed: 7\nbatch: {micro_size: 8}\n")
    (tmp_path / "run.yaml").write_text("base: below.yaml\nbatch: {global_size: 128}\nmasking: {strategy: span}\n")
    config, demo = load_config(tmp_path / "run.yaml", ["optimizer.lr=0.02"]), load_config("demo_cpu")
    assert (config.seed, config.batch.micro_size, config.batch.global_size) == (7, 8, 128)
    assert (config.masking.strategy, config.optimizer.lr) == ("span", 0.02)
    same = {"data", "model", "schedule", "training", "evaluation", "checkpoint"}
    assert config.model_dump(include=same) == demo.model_dump(include=same)


def test_missing_and_cyclic_bases_are_refused(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("base: two.yaml\n")
    two.write_text("base: one.yaml\n")
    with pytest.raises(ConfigError, match=r"base one\.yaml leads back to itself \(.*one\.yaml -> .*two\."):
        load_config(one)
    two.write_text("base: nowhere\n")
    with pytest.raises(ConfigError, match="config 'nowhere': neither a file nor a recipe"):
        load_config(one)
    two.write_text("base: {demo_cpu: 1}\n")
    with pytest.raises(ConfigError, match="a recipe, a file, or a list of them expected"):
        load_config(one)
    two.write_text("base: [demo_cpu, one.yaml]\n")
    with pytest.raises(ConfigError, match=r"base one\.yaml leads back to itself"):
        load_config(one)


def test_several_bases_are_merged_in_order(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("model: {num_hidden_layers: 5}\nseed: 3\n")
    (tmp_path / "masks.yaml").write_text("masking: {strategy: span, span: {max_length: 4}}\nseed: 4\n")
    (tmp_path / "run.yaml").write_text("base: [demo_cpu, model.yaml, masks.yaml]\nmasking: {strategy: mapnet}\n")
    config = load_config(tmp_path / "run.yaml")
    assert (config.seed, config.model.num_hidden_layers, config.model.hidden_size) == (4, 5, 128)
    assert config.masking == MaskingConfig(strategy="mapnet"), "another strategy drops the subsection below it"
    (tmp_path / "run.yaml").write_text("base: [masks.yaml, demo_cpu]\nmasking: {span: {geometric_p: 0.5}}\n")
    assert load_config(tmp_path / "run.yaml").masking.span == SpanConfig(max_length=4, geometric_p=0.5)


def test_a_base_is_included_once(tmp_path: Path) -> None:
    """Merged twice, common.yaml would undo what one.yaml changes in it."""
    (tmp_path / "common.yaml").write_text("base: demo_cpu\nseed: 1\n")
    (tmp_path / "one.yaml").write_text("base: common.yaml\nseed: 2\n")
    (tmp_path / "two.yaml").write_text("base: ./common.yaml\nbatch: {micro_size: 8}\n")
    (tmp_path / "run.yaml").write_text("base: [one.yaml, two.yaml]\n")
    with pytest.raises(
        ConfigError, match=r"two\.yaml: base \./common\.yaml is also included by .*one\.yaml; .* it once"
    ):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("base: [common.yaml, common.yaml]\n")
    with pytest.raises(ConfigError, match=r"base common\.yaml is also included by .*run\.yaml"):
        load_config(tmp_path / "run.yaml")
    (tmp_path / "one.yaml").write_text("base: sub/../one.yaml\n")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ConfigError, match=r"base sub/\.\./one\.yaml leads back to itself"):
        load_config(tmp_path / "one.yaml")


def test_parts_of_recipes_combine(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "base: [model_bert_base, lamb_32k, masks_mapnet, masks_span]\noutput_dir: runs/x\ndata: {path: c}\n"
    )
    config = load_config(tmp_path / "run.yaml")
    assert (config.model.preset, config.batch.global_size, config.optimizer.lr) == ("bert-base", 32768, 5e-3)
    assert config.masking == load_config("bert_base_4k_span").masking
    for name in recipe_parts():
        assert recipe_text(name).startswith("#")
        load_config("demo_cpu", [f"{s}={json.dumps(v)}" for s, v in read_yaml(name).items()])


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The classes of a section and of all sections nested in it."""
    found = [model]
    for field in model.model_fields.values():
        for option in (field.annotation, *get_args(field.annotation)):
            if isinstance(option, type) and issubclass(option, BaseModel):
                found += sections(option)
    return found


@pytest.mark.parametrize("section", dict.fromkeys(sections(RunConfig)))
def test_every_setting_is_described(section: type[BaseModel]) -> None:
    assert section.__doc__
    assert not [name for name, field in section.model_fields.items() if not field.description]


def test_dump_round_trip(tmp_path: Path) -> None:
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
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; known keys are name, lr, betas"),
        ("optimiser.lr=1", r"optimiser: unknown key; known keys are output_dir.*\(did you mean optimizer\?\)"),
        ("global_size=8", r"global_size: unknown key; .*phases \(did you mean batch.global_size\?\)"),
        ("data.pth=x", r"data.pth: unknown key; .*prefetch \(did you mean path\?\)"),
        ("monitor.wandb={project: p, teem: x}", "monitor.wandb.teem: unknown key; known keys are project, group, team"),
        ("optimizer.lr=0", "optimizer.lr: Input should be greater than 0 .given: 0."),
        ("optimizer={min_ratio: 2, max_ratio: 1}", "optimizer: min_ratio 2, max_ratio 1: expected 0 ≤ min ≤ max"),
        ("optimizer={variant: deepspeed, max_ratio: 0.001}", "optimizer: min_ratio 0.01, max_ratio 0.001"),
        ("optimizer={variant: nvidia, gradient_clipping: 0}", "norm of at most 1, gradient_clipping is 0; set it to 1"),
        ("optimizer={name: adamw, variant: nvidia}", "belong to LAMB; optimizer.name is adamw"),
        ("optimizer={name: stable_adamw, fused: true}", "belong to LAMB; optimizer.name is stable_adamw"),
        (
            "optimizer.name=muon",
            "optimizer.name: muon is not supported: at ZeRO stages 1 to 3 .* choose lamb, adamw or",
        ),
        ("optimizer.name=sgd", "optimizer.name: Input should be 'lamb', 'adamw' or 'stable_adamw'"),
        ("masking.rate=1", "masking.rate: Input should be less than 1 .given: 1."),
        ("masking.rate=0", "masking.rate: Input should be greater than 0"),
        ("masking.random_probability=0.3", "more than 1"),
        ("masking.final_rate=0", "masking.final_rate: Input should be greater than 0"),
        (
            "masking={strategy: frequency, frequency: {floor: 0}}",
            "masking.frequency.floor: Input should be greater than 0",
        ),
        ("masking={strategy: frequency, frequency: {floor: 2}}", "masking.frequency.floor: Input should be less than"),
        ("masking.frequency.floor=0.2", r"masking: frequency \(floor\) belongs to strategy frequency; .* is uniform"),
        (
            "masking={strategy: span, mapnet: {lr: 0.1}}",
            r"mapnet \(lr\) belongs to strategy mapnet or auto; .* is span",
        ),
        ("masking={strategy: auto, mapnet: {gate: never}}", "mapnet.gate never belongs to strategy mapnet"),
        (
            "masking={strategy: fully_explored, fully_explored: {segments_per_sequence: 2}}",
            "belongs to placement same_batch; remove it",
        ),
        (
            "masking={strategy: fully_explored, fully_explored: {placement: same_batch, segments_per_sequence: 7}}",
            "batch.global_size 256 is not a multiple of masking.fully_explored.segments_per_sequence 7",
        ),
        ("masking.strategy=spam", "masking.strategy: Input should be 'uniform', 'whole_word', 'span'"),
        ("model.num_attention_heads=7", "hidden_size 768 is not a multiple of num_attention_heads 7"),
        (
            "model.activation_checkpointing=13",
            "activation_checkpointing 13 exceeds the 12 layers; set it to true",
        ),
        ("model.preset=bert-huge", "model.preset: Input should be 'bert-tiny'"),
        ("schedule.warmup_steps=101", "schedule.warmup_steps 101 exceeds the schedule's 100 steps"),
        ("training.schedule_steps=50", "training.steps 100 exceeds training.schedule_steps 50"),
        ("schedule.initial_lr=1e-5", "schedule.initial_lr 1e-05: there is no warm-up that it belongs to; set schedule"),
        ("schedule.warmup_power=2", "schedule.warmup_power 2: there is no warm-up"),
        ("schedule.final_lr=1", "schedule.final_lr 1.0 exceeds optimizer.lr"),
        ("training={}", "training.steps: required, but not given"),
        ("seed", "section.field=value expected"),
        ("seed.x=1", "seed: Input should be a valid integer"),
        ("output_dir.x=1", "output_dir is a value, not a section"),
        ("seed=[", "the value: not YAML"),
    ],
)
def test_faults_are_named(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path), [assignment])


def test_adam_is_read_as_adamw(tmp_path: Path) -> None:
    """Its name in configurations of earlier versions, also in those that runs have stored."""
    config = load_config(write(tmp_path, optimizer={"name": "adam"}))
    assert config.optimizer.name == "adamw"
    assert config == load_config(write(tmp_path, optimizer={"name": "adamw"}))


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
    with pytest.raises(ConfigError, match=r"set batch\.micro_size to 32, or batch\.global_size to 65536$"):
        config.accumulation_steps(1024)


def test_deepspeed_config_must_exist() -> None:
    with pytest.raises(ConfigError, match="'zero9' is neither a file nor one of zero0_bf16, zero0_fp32"):
        deepspeed_config_path("zero9")
    with pytest.raises(ConfigError, match="neither a file"):
        deepspeed_config_path("../ds_configs/zero1_fp32")


def test_shipped_deepspeed_configs_set_nothing_that_run_config_owns() -> None:
    from maskvr_ds.config.deepspeed import read_deepspeed_config, zero_stage
    from maskvr_ds.engine.ds_config import model_dtype

    files = sorted(Path(ds_configs.__file__).parent.glob("*.json"))
    assert len(files) == 13
    for name in (file.stem for file in files):
        config = read_deepspeed_config(deepspeed_config_path(name))
        stage, precision, *offload = name.split("_")
        assert stage == f"zero{zero_stage(config)}"
        assert (
            str(model_dtype(config))
            == {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
        )
        device = config["zero_optimization"].get("offload_optimizer", {}).get("device")
        assert device == ("cpu" if offload == ["offload"] else None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"gradient_clipping": 0.5},
            "sets gradient_clipping to 0.5.*set optimizer.gradient_clipping in the run config",
        ),
        ({"train_batch_size": 8}, "sets train_batch_size to 8.*set batch.global_size in the run config"),
        ({"optimizer": {"type": "Adam"}}, "sets optimizer to"),
        ({"scheduler": {"type": "WarmupLR"}}, "sets scheduler to"),
        ({"zero_optimization": {"stage": 4}}, "ZeRO stage 4; supported are 0, 1, 2, 3"),
        ({"fp16": {"enabled": True}}, "fp16 at ZeRO stage 0.*use stage 1, 2 or 3"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both fp16 and bf16 are enabled"),
        ({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True, "auto_cast": True}}, "fp16.auto_cast is set"),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "mixes up master weights",
        ),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param is not supported"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}},
            "'nvme'; supported are .* 'cpu'",
        ),
        ({"zero_optimization": {"stage": "x"}}, 'zero_optimization.stage is "x"; expected an integer'),
        ({"zero_optimization": True}, "zero_optimization is true; expected an object"),
        ({"fp16": None}, "fp16 is null; expected an object"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}},
            'offload_optimizer is "cpu"; expected an object',
        ),
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled is "auto"; expected true or false'),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is an old name; rename the section to bf16"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast is not supported"),
        ({"managed_gradient_accumulation": False}, "every micro-batch would be an update"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "compute_grad_norm is off"),
        ([1], "expected a JSON object"),
    ],
)
def test_deepspeed_config_faults(tmp_path: Path, content: object, message: str) -> None:
    from maskvr_ds.config.deepspeed import read_deepspeed_config

    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_deepspeed_config(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        read_deepspeed_config(path)
