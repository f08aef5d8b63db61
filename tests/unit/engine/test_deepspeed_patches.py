"""Replaced parts of DeepSpeed: what the patches do, and the error if DeepSpeed has changed underneath them."""

import ast
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from maskvr_ds.engine import deepspeed_patches as patches

ROOT = Path(__file__).parents[3]
CACHED = "_PartitionedParameterCoordinator__params_to_release"


class Optimizer:
    def __init__(self) -> None:
        self.steps = 0
        self.scale_updates: list[bool] = []

    def step(self, closure: Any = None) -> str:
        self.steps += 1
        return "stepped"

    def _update_scale(self, overflow: bool) -> None:
        self.scale_updates.append(overflow)


class Writer:
    zipfile_serialization = True

    def save(self, state_dict: Any, path: str) -> None:
        torch.save(state_dict, path)


class Engine:
    """The patched attributes of a DeepSpeedEngine.

    norm: None at ZeRO 0 in fp32, where the engine's optimizer is the basic one.
    """

    def __init__(self, norm: Any = None) -> None:
        self.basic_optimizer = Optimizer()
        self.optimizer: Any = self.basic_optimizer if norm is None else SimpleNamespace(_global_grad_norm=norm)
        self.checkpoint_engine = Writer()
        self.scripts: list[str] = []

    def _copy_recovery_script(self, save_path: str) -> None:
        self.scripts.append(save_path)


def capture(engine: Any, in_memory: bool = True) -> None:
    with patches.capture_saved_files(engine, {}, [], in_memory=in_memory):
        pass


def gate(engine: Any) -> None:
    patches.gate_optimizer_step(engine, lambda norm: True)


def gate_and_step() -> None:
    engine = Engine(1.0)
    del engine.optimizer._global_grad_norm
    gate(engine)
    engine.basic_optimizer.step()


PARTS: list[tuple[Any, str, Callable[[], None]]] = [
    (torch, "compile", patches.import_muon),
    (bf16_optimizer, "see_memory_usage", lambda: patches.quiet_memory().__enter__()),
    (parameter_offload, "FWD_MODULE_STACK", patches.free_memory),
    (PartitionedParameterCoordinator, CACHED, patches.free_memory),
    (parameter_offload, "FWD_MODULE_STACK", patches.check_deepspeed),
    (PartitionedParameterCoordinator, CACHED, patches.check_deepspeed),
    (deepspeed.DeepSpeedEngine, "_copy_recovery_script", patches.check_deepspeed),
    (Engine, "_copy_recovery_script", lambda: capture(Engine())),
    (Writer, "save", lambda: capture(Engine())),
    (Writer, "zipfile_serialization", lambda: capture(Engine())),
    (Optimizer, "step", lambda: gate(Engine())),
    (Optimizer, "_update_scale", lambda: patches.hold_loss_scale(Optimizer())),
]


@pytest.mark.parametrize(("owner", "name", "apply"), PARTS)
def test_missing_part(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, apply: Callable[[], None]) -> None:
    monkeypatch.delattr(owner, name)
    monkeypatch.setattr(deepspeed, "__version__", "0.20.0")
    found = rf"maskvr_ds/engine: \w+: \S+\.{name} does not exist\. Found DeepSpeed 0\.20\.0 "
    with pytest.raises(RuntimeError, match=rf"{found}.*, checked against 0\.19\.8; install deepspeed==0\.19\.8"):
        apply()


@pytest.mark.parametrize(
    ("owner", "name", "apply"),
    [part for part in PARTS if part[1] in ("_copy_recovery_script", "save", "_update_scale")],
)
def test_changed_signature(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, apply: Callable[[], None]) -> None:
    monkeypatch.setattr(owner, name, lambda self, added, path, tag: None)
    with pytest.raises(RuntimeError, match=rf"\.{name} takes \((self, )?added, path, tag\), expected \("):
        apply()


def test_missing_norm() -> None:
    with pytest.raises(RuntimeError, match=r"gate_optimizer_step: SimpleNamespace\._global_grad_norm does not exist"):
        gate_and_step()


def test_missing_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PartitionedParameterCoordinator, CACHED, lambda self, submodule, step: None)
    with pytest.raises(RuntimeError, match=rf"free_memory: .*{CACHED} has no cache"):
        patches.free_memory()


def test_missing_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.parameter_offload", None)
    with pytest.raises(RuntimeError, match=r"free_memory: .*parameter_offload"):
        patches.free_memory()


def test_installed_version_has_every_part(caplog: pytest.LogCaptureFixture) -> None:
    patches.check_deepspeed()
    assert not caplog.records
    for zero_optimizer in (
        FP16_Optimizer,
        FP16_UnfusedOptimizer,
        DeepSpeedZeroOptimizer,
        DeepSpeedZeroOptimizer_Stage3,
    ):
        patches.hold_loss_scale(object.__new__(zero_optimizer))
    engine = Engine()
    engine.checkpoint_engine = TorchCheckpointEngine()
    capture(engine)


def test_other_versions_are_warned_about(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(deepspeed, "__version__", "0.20.1+abc")
    patches.check_deepspeed()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "DeepSpeed 0.20.1: " in record.getMessage()
    assert f"install deepspeed=={patches.CHECKED}" in record.getMessage()


def test_muon_is_imported_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(torch, "compile", compiled.append)
    for name in [name for name in sys.modules if name.startswith("deepspeed.runtime.zero.muon")]:
        monkeypatch.delitem(sys.modules, name)
    patches.import_muon()
    assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules
    assert not compiled
    assert torch.compile == compiled.append, "and torch.compile is itself again"
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.zero.muon.original_muon", None)
    patches.import_muon()


def test_loss_scale_changes_after_the_step_only() -> None:
    optimizer = Optimizer()
    patches.hold_loss_scale(optimizer)
    optimizer._update_scale(True)
    assert optimizer.scale_updates == []
    patches.update_loss_scale(optimizer, True)
    assert optimizer.scale_updates == [True]


@pytest.mark.parametrize(("norm", "expected"), [(None, 0.0), (2.5, 2.5), (torch.tensor(2.5), 2.5)])
def test_optimizer_steps_only_if_allowed(norm: Any, expected: float) -> None:
    engine, asked, answers = Engine(norm), [], iter([True, False, True])

    def allow(norm: torch.Tensor | float) -> bool:
        asked.append(float(norm))
        return next(answers)

    patches.gate_optimizer_step(engine, allow)
    assert [engine.basic_optimizer.step() for _ in range(3)] == ["stepped", None, "stepped"]
    assert engine.basic_optimizer.steps == 2
    assert asked == [expected] * 3


@pytest.mark.parametrize("in_memory", [False, True])
def test_saved_files_are_captured(tmp_path: Path, in_memory: bool) -> None:
    engine, good, bad = Engine(), tmp_path / "good.pt", tmp_path / "no" / "folder.pt"
    files: dict[Path, memoryview | None] = {}
    failed: list[Exception] = []
    with patches.capture_saved_files(engine, files, failed, in_memory=in_memory):
        engine.checkpoint_engine.save(state_dict={"a": torch.ones(3)}, path=str(good))
        engine.checkpoint_engine.save(lambda: None if in_memory else {}, str(bad))  # what fails: pickling, or the path
        engine._copy_recovery_script(str(tmp_path))
    assert list(files) == [good]
    assert len(failed) == 1
    assert good.exists() != in_memory
    if content := files[good]:
        good.write_bytes(content)
    assert torch.equal(torch.load(good)["a"], torch.ones(3))
    assert not engine.scripts
    engine.checkpoint_engine.save({}, str(tmp_path / "after.pt"))
    engine._copy_recovery_script("after")
    assert (tmp_path / "after.pt").exists()
    assert list(files) == [good]
    assert engine.scripts == ["after"]


def test_parts_are_restored_after_an_error() -> None:
    engine = Engine()
    context = patches.capture_saved_files(engine, {}, [], in_memory=True)
    with suppress(ZeroDivisionError), context:
        raise ZeroDivisionError
    assert "save" not in vars(engine.checkpoint_engine)
    assert "_copy_recovery_script" not in vars(engine)


# Attributes of these belong to DeepSpeed or torch; `engine.module` is the project's own model.
FOREIGN = {"deepspeed", "torch", "engine", "optimizer", "zero", "monitor", "writer"}
# Module, target: what is set there is data, not code, unless said otherwise.
ALLOWED = {
    # Precedes deepspeed.init_distributed; see the table in deepspeed_patches.py.
    ("runtime.distributed", "vars(deepspeed.ops).setdefault('__compatible_ops__', {})['deepspeed_shm_comm']"),
    # Loops over tensors; see the table in deepspeed_patches.py.
    ("engine.streamline", "optimizer.norm_reader"),
    ("engine.streamline", "optimizer.update_hp_grads"),
    ("engine.streamline", "optimizer.step"),
    ("engine.streamline", "optimizer.get_grad_norm_direct"),
    ("engine.streamline", "optimizer.unscale_and_clip_grads"),
    # One rank: nothing to reduce; see the table in deepspeed_patches.py.
    ("engine.one_rank", "engine.buffered_allreduce_fallback"),
    ("engine.one_rank", "optimizer.process_gradients"),
    ("engine.one_rank", "optimizer.reduce_gradients"),
    ("engine.one_rank", "optimizer.overlapping_partition_gradients_reduce_epilogue"),
    ("engine.one_rank", "optimizer.zero_grad"),
    ("engine.one_rank", "optimizer.held_gradients"),
    ("engine.one_rank", "optimizer.step"),
    # A module of a transformers model is replaced by another one; parameter groups of Trainer's optimizer are split.
    ("models.normalization", "setattr(parent)"),
    ("downstream.fine_tuning", "optimizer.param_groups"),
    # Counters and the loss scale of a checkpoint.
    ("checkpoint.reshard", "setattr(engine)"),
    # Times methods of the project's own classes.
    ("benchmarks.masks", "setattr(owner)"),
    # Counts host waits while a step is profiled.
    ("benchmarks.step_parts", "torch.Tensor.tolist"),
    # The file that a monitor of DeepSpeed's writes.
    ("telemetry.monitors", "monitor.summary_writer"),
    # Groups of one optimizer, stepped by several in turn.
    ("benchmarks.lamb", "optimizer.param_groups"),
    # Of this project's optimizers.
    ("optim.lamb", "optimizer._given"),
    ("optim.lamb", "optimizer._layout"),
    ("optim.lamb", "optimizer._bound"),
}


def assigned(tree: ast.AST) -> Iterator[ast.expr]:
    """Targets of assignments and deletions; the first argument of setattr and delattr, as a call."""
    for node in ast.walk(tree):
        match node:
            case ast.Assign(targets=targets) | ast.Delete(targets=targets):
                pass
            case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
                targets = [target]
            case ast.Call(func=ast.Name(id="setattr" | "delattr") as function, args=[owner, *_]):
                targets = [ast.Call(function, [owner], [])]
            case _:
                continue
        for target in targets:
            yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def is_foreign(target: ast.expr) -> bool:
    if isinstance(target, ast.Call):
        return True
    if not isinstance(target, ast.Attribute | ast.Subscript):
        return False
    if isinstance(target, ast.Subscript) and not isinstance(target.value, ast.Call):
        return False
    names = [getattr(node, "id", getattr(node, "attr", None)) for node in ast.walk(target.value)]
    return "module" not in names and bool(FOREIGN & {str(name).strip("_") for name in names})


def test_nothing_else_is_patched() -> None:
    found = {
        (".".join(path.relative_to(ROOT / "maskvr_ds").with_suffix("").parts), ast.unparse(target))
        for path in (ROOT / "maskvr_ds").rglob("*.py")
        for target in assigned(ast.parse(path.read_text(encoding="utf-8")))
        if is_foreign(target)
    }
    patched = {target for module, target in found if module == "engine.deepspeed_patches"}
    assert patched == {
        "torch.compile",
        "optimizer._update_scale",
        "optimizer.step",
        "engine.optimizer.norm_reader",
        "optimizer.checkpoint_event_epilogue",
        "writer.save",
        "engine._copy_recovery_script",
    }
    elsewhere = {(module, target) for module, target in found if module != "engine.deepspeed_patches"}
    assert elsewhere <= ALLOWED, "replace parts of DeepSpeed in maskvr_ds/engine/deepspeed_patches.py"


@pytest.mark.parametrize(
    ("code", "foreign"),
    [
        ("engine.step = f", True),
        ("self._engine.optimizer.step = f", True),
        ("a, torch.compile = 1, f", True),
        ("del engine.checkpoint_engine.save", True),
        ("setattr(engine, name, f)", True),
        ("vars(deepspeed.ops)['x'] = f", True),
        ("engine.module.observer = f", False),
        ("self.step = f", False),
        ("group['lr'] = 1", False),
    ],
)
def test_the_rule_itself(code: str, foreign: bool) -> None:
    assert any(map(is_foreign, assigned(ast.parse(code)))) == foreign


def test_free_memory_drops_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo as dynamo

    resets: list[bool] = []
    monkeypatch.setattr(dynamo, "reset", lambda: resets.append(True))
    patches.free_memory()
    assert resets == [True]


def test_no_memory_statistics_while_an_engine_is_created(capsys: pytest.CaptureFixture[str]) -> None:
    with patches.quiet_memory():
        bf16_optimizer.see_memory_usage("begin bf16_optimizer", force=True)
    assert capsys.readouterr().out == ""
    bf16_optimizer.see_memory_usage("begin bf16_optimizer", force=True)
    assert capsys.readouterr().out.startswith("begin bf16_optimizer")
