"""Every replacement of a part of DeepSpeed, with its reason.

| function              | replaces                                      | when                           |
|-----------------------|-----------------------------------------------|--------------------------------|
| import_muon           | torch.compile, while one module is imported   | at import of engine.py         |
| quiet_memory          | see_memory_usage of the optimizer of bf16     | while an engine is created     |
| hold_loss_scale       | _update_scale of fp16's optimizers            | once per engine                |
| gate_optimizer_step   | step of the optimizer that DeepSpeed wraps    | once per engine                |
| streamline            | loops over tensors in ZeRO's optimizers       | once per engine                |
| skip_reduction        | buffered_allreduce_fallback of the engine     | once per engine, on one rank   |
| hold_gradients        | reduction and step of ZeRO 1 and 2 in fp32    | once per engine, on one rank   |
| capture_saved_files   | checkpoint_engine.save, _copy_recovery_script | while a checkpoint is saved    |
| postponed_epilogue    | checkpoint_event_epilogue of ZeRO 3           | while a checkpoint is loaded   |
| free_memory           | nothing; empties two of DeepSpeed's caches    | after an engine was destroyed  |

`streamline` is in engine/streamline.py, the next two are in engine/one_rank.py. A further one has to precede
`deepspeed.init_distributed` and is therefore in runtime/distributed.py: `initialize` marks the shared-memory all-reduce
for CPUs as unavailable, before DeepSpeed compiles it.

Patches rely on internals. Each of them checks that what it replaces exists and takes the arguments that it took in the
version CHECKED, and raises RuntimeError otherwise; `check_deepspeed` does so before training for those that come late.
"""

import gc
import importlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import deepspeed
import torch

from maskvr_ds.engine.patch_checks import CHECKED, check_part, mismatch, part
from maskvr_ds.engine.streamline import check_streamlined
from maskvr_ds.runtime import distributed

logger = logging.getLogger(__name__)


def check_deepspeed() -> None:
    """Check what the patches replace in DeepSpeed's modules and classes; warn on rank 0 if the version is not CHECKED.

    Raises RuntimeError if a part is missing or takes other arguments.
    """
    if (found := deepspeed.__version__.partition("+")[0]) != CHECKED and distributed.rank() == 0:
        logger.warning(
            "DeepSpeed %s: maskvr_ds/engine/deepspeed_patches.py was checked against %s only; "
            "install deepspeed==%s if training behaves unexpectedly",
            found,
            CHECKED,
            CHECKED,
        )
    check_streamlined()
    check_part("capture_saved_files", deepspeed.DeepSpeedEngine, "_copy_recovery_script", "self", "save_path")
    _module_stack()
    _release_cache()


@contextmanager
def quiet_memory() -> Iterator[None]:
    """Within it, BF16_Optimizer does not print memory statistics, fifteen lines of every start, past all loggers."""
    module: Any = importlib.import_module("deepspeed.runtime.bf16_optimizer")
    check_part("quiet_memory", module, "see_memory_usage", "message", "force")
    report, module.see_memory_usage = module.see_memory_usage, lambda *_, **__: None
    try:
        yield
    finally:
        module.see_memory_usage = report


def import_muon() -> None:
    """Import DeepSpeed's Muon optimizer without compiling it.

    DeepSpeed asks of every optimizer whether it is Muon and imports a module for that, which passes three functions to
    torch.compile: seconds at every start, for functions that are never called here. Does nothing if DeepSpeed has no
    such module.
    """
    check_part("import_muon", torch, "compile")
    compiler, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ModuleNotFoundError):
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        torch.compile = compiler


def hold_loss_scale(optimizer: Any) -> None:
    """Keep the loss scale constant during optimizer.step(); `update_loss_scale` updates it afterwards.

    DeepSpeed updates the scale first and divides the gradients by the new one: in a step in which it grows, they come
    out half as large as they are, and clipping sees half their norm.
    """
    check_part("hold_loss_scale", optimizer, "_update_scale", "*")
    optimizer._update_scale = lambda overflow: None


def update_loss_scale(optimizer: Any, overflow: bool) -> None:
    """The update that `hold_loss_scale` suppressed: halve the scale after an overflow, double it periodically."""
    type(optimizer)._update_scale(optimizer, overflow)


def gate_optimizer_step(
    engine: deepspeed.DeepSpeedEngine,
    allow: Callable[[torch.Tensor | float], bool],
    read: Callable[[torch.Tensor | float], float] = float,
) -> None:
    """Call the step of the engine's basic optimizer only if `allow(norm)`.

    norm: global gradient norm before clipping, as DeepSpeed has computed it by then (scalar tensor or float); 0.0 at
    ZeRO 0 in fp32, where it computes none. Under ZeRO `allow` is called once per parameter group. DeepSpeed has no hook
    between norm and update, and afterwards a non-finite gradient has reached weights and moments.
    read: waits for the norm; a streamlined BF16_Optimizer calls it first, and `allow` with its result.
    """
    if hasattr(engine.optimizer, "norm_reader"):
        engine.optimizer.norm_reader = read
    optimizer = engine.basic_optimizer
    check_part("gate_optimizer_step", optimizer, "step")
    update = optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        return update(*args, **kwargs) if allow(_computed_norm(engine)) else None

    optimizer.step = step


def _computed_norm(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor | float:
    if engine.optimizer is engine.basic_optimizer:
        return 0.0
    check_part("gate_optimizer_step", engine.optimizer, "_global_grad_norm")
    return engine.optimizer._global_grad_norm


@contextmanager
def capture_saved_files(
    engine: deepspeed.DeepSpeedEngine, files: dict[Path, memoryview | None], failed: list[Exception], *, in_memory: bool
) -> Iterator[None]:
    """Record, or keep in memory, what this rank's `engine.save_checkpoint` writes in this context.

    files: receives path → content if `in_memory` (nothing is written then), else path → None.
    failed: receives exceptions of writing. If they propagated, the other ranks would wait in DeepSpeed's barriers for a
    rank whose disk is full. Rank 0 copies no recovery scripts next to the checkpoint, which could fail likewise.
    """
    patch, writer = "capture_saved_files", engine.checkpoint_engine
    check_part(patch, writer, "save", "state_dict", "path")
    check_part(patch, engine, "_copy_recovery_script", "save_path")
    if in_memory:
        check_part(patch, writer, "zipfile_serialization")
    original = writer.save

    def save(state_dict: Any, path: str) -> None:
        try:
            if in_memory:
                buffer = io.BytesIO()
                torch.save(state_dict, buffer, _use_new_zipfile_serialization=writer.zipfile_serialization)
                files[Path(path)] = buffer.getbuffer()
            else:
                original(state_dict, path)
                files[Path(path)] = None
        except Exception as error:
            failed.append(error)

    writer.save = save
    engine._copy_recovery_script = lambda *_: None
    try:
        yield
    finally:
        del writer.save, engine._copy_recovery_script


@contextmanager
def postponed_epilogue(engine: deepspeed.DeepSpeedEngine) -> Iterator[Callable[[], None]]:
    """Within: `engine.load_checkpoint` omits its last part, a collective of ZeRO 3, which ranks that could not load
    would miss. Yields a function that does it, to be called once all ranks have loaded."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        yield lambda: None
        return
    check_part("postponed_epilogue", optimizer, "checkpoint_event_epilogue")
    epilogue = optimizer.checkpoint_event_epilogue
    optimizer.checkpoint_event_epilogue = lambda: None
    try:
        yield epilogue
    finally:
        optimizer.checkpoint_event_epilogue = epilogue


def free_memory() -> None:
    """Free an engine after `destroy()`: its objects refer to each other, so collect them now.

    At stage 3 DeepSpeed also keeps a module in a module-level list, and the parameter coordinator in the cache of one
    of its methods. torch.compile keeps what it compiled (training.compile), with references to the model.
    """
    _module_stack().clear()
    _release_cache().cache_clear()
    # Importing it takes a second, and without it nothing was compiled.
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
    gc.collect()
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()


def _module_stack() -> list[Any]:
    return part("free_memory", "deepspeed.runtime.zero.parameter_offload", "FWD_MODULE_STACK")


def _release_cache() -> Any:
    """The `functools.lru_cache` of the coordinator's method; a decorator of DeepSpeed's wraps it once more."""
    patch, name = "free_memory", "_PartitionedParameterCoordinator__params_to_release"
    module = "deepspeed.runtime.zero.partitioned_param_coordinator"
    coordinator = part(patch, module, "PartitionedParameterCoordinator")
    check_part(patch, coordinator, name)
    method = getattr(coordinator, name)
    cells = [cell.cell_contents for cell in getattr(method, "__closure__", None) or ()]
    for candidate in (method, *cells):
        if hasattr(candidate, "cache_clear"):
            return candidate
    raise mismatch(patch, f"{coordinator.__name__}.{name} has no cache")
