"""Checkpoints that cannot be loaded although their hashes agree: one clear error; nothing is left of a conversion."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from maskvr_ds.checkpoint import load, reshard
from maskvr_ds.run_folder.checkpoints import CheckpointError, verify
from maskvr_ds.run_folder.layout import WEIGHTS
from tests.unit.checkpoint.test_checkpoint import STATE, write


class Engine:
    """Test double of DeepSpeed's, at ZeRO `stage`, whose files raise `error`."""

    def __init__(self, stage: int, error: Exception | None) -> None:
        self.stage, self.error, self.calls = stage, error, list[str]()
        self.optimizer = SimpleNamespace(checkpoint_event_epilogue=lambda: self.calls.append("epilogue"))

    def zero_optimization_stage(self) -> int:
        return self.stage

    def load_checkpoint(self, *_: Any, **__: Any) -> tuple[str, None]:
        if self.error is not None:
            raise self.error
        self.calls.append("loaded")
        if self.stage == 3:
            self.optimizer.checkpoint_event_epilogue()
        return "path", None


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize(
    "error",
    [RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch for a"), KeyError("module"), AssertionError()],
)
def test_what_deepspeed_cannot_load_is_one_clear_error(tmp_path: Path, stage: int, error: Exception) -> None:
    checkpoint, engine = verify(write(tmp_path, 20)), Engine(stage, error)
    name = f"{re.escape(str(checkpoint.folder))}: DeepSpeed cannot load its files"
    with pytest.raises(
        CheckpointError, match=rf"{name}.*{type(error).__name__}.*move this folder out of checkpoints/"
    ) as raised:
        load.load(tmp_path, checkpoint, engine, STATE)  # type: ignore[arg-type]
    # An earlier checkpoint is not taken for it: the cause may be another.
    assert not isinstance(raised.value, load.ContentError)
    assert "\n" not in str(raised.value)
    assert engine.calls == []


def test_a_lack_of_memory_is_no_fault_of_the_checkpoint(tmp_path: Path) -> None:
    engine: Any = Engine(2, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        load.load(tmp_path, verify(write(tmp_path, 20)), engine, STATE)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_last_part_of_loading_follows_once_all_ranks_have_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    engine: Any = Engine(stage, None)
    monkeypatch.setattr(load.distributed, "run_collectively", lambda a: (a(), engine.calls.append("all have loaded")))
    load._load_files(tmp_path, tmp_path, engine)
    assert engine.calls == ["loaded", "all have loaded", *(["epilogue"] if stage == 3 else [])]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 20)
    save_file({"weight": torch.zeros(2, 3)}, folder / WEIGHTS)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reshard, "_from_partitions", lambda *_: ({"fp32/mlm.weight": torch.zeros(2, 3)}, {}))
    monkeypatch.setattr(reshard, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        reshard.convert(tmp_path, folder, STATE, replace(STATE, world_size=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [folder.name]


def test_a_conversion_refuses_tensors_of_another_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, 20)
    save_file({"weight": torch.zeros(2, 3)}, folder / WEIGHTS)
    tensors = {f"{kind}/mlm.weight": torch.zeros(2, 3) for kind in ("fp32", "exp_avg", "exp_avg_sq")}
    for kind, shape in (("fp32", (3, 2)), ("exp_avg_sq", (5,))):
        wrong = {**tensors, f"{kind}/mlm.weight": torch.zeros(shape)}
        monkeypatch.setattr(reshard, "_from_partitions", lambda *_, wrong=wrong: (wrong, {}))
        with pytest.raises(CheckpointError, match=r"hold other shapes than weights.safetensors \(mlm.weight\)"):
            reshard.convert(tmp_path, folder, STATE, replace(STATE, world_size=1))
