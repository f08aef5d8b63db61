"""Everything that replaces a part of DeepSpeed."""

import gc
from contextlib import suppress
from typing import Any

import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from maskvr_ds.runtime import distributed


def import_muon() -> None:
    """DeepSpeed 0.19 asks of every optimizer whether it is Muon, and imports for that a module which hands three
    functions to torch.compile: seconds at every start, for a compiler that nothing here uses. So it is imported now,
    and they stay as they are. A version that has no such module needs none of this."""
    compiler, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        with suppress(ModuleNotFoundError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compiler


def free_memory() -> None:
    """After an engine was destroyed and forgotten: its parts refer to each other, and only this lets go of them.

    At stage 3 DeepSpeed 0.19 also keeps a module in a list of its own, and the parameters' coordinator in the cache of
    one of its methods.
    """
    parameter_offload.FWD_MODULE_STACK.clear()
    method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    for cell in method.__closure__ or ():
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
    gc.collect()
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()


def hold_loss_scale(optimizer: Any) -> None:
    """Keep the loss scale as it is during optimizer.step(); `step_and_norm` updates it afterwards.

    DeepSpeed 0.19 updates the scale first and divides the gradients by it then: in a step in which it grows, they come
    out half as large as they are, and clipping sees half their norm.
    """
    optimizer._update_scale = lambda overflow: None
