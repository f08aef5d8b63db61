"""training.compile in configurations: with phases, with activation checkpointing, with DeepSpeed's stages."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from maskvr_ds.checkpoint.load import check_compatible
from maskvr_ds.config import ConfigError, RunConfig, dump_config, run_deepspeed_config
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointError, CheckpointState
from maskvr_ds.training.phases import run_wide

RUN: dict[str, Any] = {"output_dir": "run", "data": {"path": "corpus"}}
PHASES: list[dict[str, Any]] = [
    {"name": "short", "data": {"path": "a"}, "training": {"steps": 3}},
    {
        "name": "long",
        "data": {"path": "b"},
        "training": {"steps": 4},
        "start": {"moments": "keep", "step_counter": "keep", "schedule": "restart"},
    },
]


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate({**RUN, **sections})


def test_is_set_for_all_phases_and_stored() -> None:
    run = config(data={}, training={"compile": "layers"}, phases=PHASES)
    assert [run.phase(index).training.compile for index in (0, 1)] == ["layers", "layers"]
    stored = yaml.safe_load(dump_config(run))
    del stored["schema"]
    again = RunConfig.model_validate(stored)
    assert again == run
    assert again.phase(1).training.compile == "layers"


def test_phases_cannot_differ() -> None:
    phases = [PHASES[0], {**PHASES[1], "training": {"steps": 4, "compile": "model"}}]
    with pytest.raises(ValidationError, match=r"phases\.long\.training\.compile: may not differ between phases"):
        config(data={}, phases=phases)


def test_encoder_with_activation_checkpointing_is_refused() -> None:
    model = {"activation_checkpointing": True}
    config(training={"steps": 1, "compile": "layers"}, model=model)
    with pytest.raises(ValidationError, match=r"training\.compile model: .*activation_checkpointing; set it to layers"):
        config(training={"steps": 1, "compile": "model"}, model=model)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_3_is_refused(stage: int) -> None:
    run_deepspeed_config(config(training={"steps": 1}, deepspeed=f"zero{stage}_fp32"))
    compiled = config(training={"steps": 1, "compile": "layers"}, deepspeed=f"zero{stage}_fp32")
    if stage < 3:
        run_deepspeed_config(compiled)
        return
    with pytest.raises(ConfigError, match=r"zero3_fp32\.json: training\.compile needs ZeRO stage 0, 1 or 2"):
        run_deepspeed_config(compiled)


def state(**identity: Any) -> CheckpointState:
    return CheckpointState(
        step=1, samples=1, world_size=1, zero_stage=1, dtype="float32", partitions=[1], identity={"seed": 0, **identity}
    )


@pytest.mark.parametrize("was", [None, "none", "layers", "model"])
@pytest.mark.parametrize("now", ["none", "layers", "model"])
def test_resume_refuses_a_change(was: str | None, now: str) -> None:
    """Checkpoints of earlier versions lack the key; they were trained without compilation."""
    checkpoint = Checkpoint(Path("step-1"), state(**({} if was is None else {"training.compile": was})))
    expected = state(**{"training.compile": now})
    if (was or "none") == now:
        check_compatible(checkpoint, expected, ())
        return
    with pytest.raises(CheckpointError, match=rf"training\.compile was '{was or 'none'}', is '{now}'"):
        check_compatible(checkpoint, expected, ())


def test_resume_refuses_a_change_between_phases() -> None:
    names = ("tokenizer", "special_tokens", "vocab_size", "model", "optimizer")
    identity = run_wide({"seed": 0, "training.compile": "layers", **dict.fromkeys(names, 0)})
    assert identity["training.compile"] == "layers"
