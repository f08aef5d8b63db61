"""Checks of what an optimizer is given: settings of parameter groups, tensors, gradients, and state to load."""

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


def check_number(name: str, value: Any, rule: str = "must be at least 0", *, below: float = float("inf")) -> None:
    """Raise ValueError unless `value` is a number in [0, below), also of NumPy; NaN is not."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} = {value!r}: {rule}, and a number")
    if not 0.0 <= float(value) < below:
        raise ValueError(f"{name} = {value}: {rule}")


def check_rate(value: Any) -> None:
    """Raise ValueError for a negative learning rate; one in a tensor, for which the host would wait, passes."""
    if not isinstance(value, Tensor):
        check_number("lr", value, "the learning rate must be at least 0")


def check_betas(value: Any) -> None:
    """Raise ValueError unless `value` is a pair of numbers in [0, 1)."""
    if isinstance(value, (str, Real, Tensor)) or len(value) != 2:
        raise ValueError(f"betas = {value!r}: must be two numbers, each in [0, 1)")
    for number, beta in enumerate(value):
        check_number(f"betas[{number}]", beta, "must be in [0, 1)", below=1.0)


def check_switches(settings: dict[str, Any]) -> None:
    """Raise ValueError for switches of torch's optimizers that are on, but would be ignored here."""
    for switch in ("maximize", "amsgrad"):
        if settings.get(switch):
            raise ValueError(
                f"{switch} = {settings[switch]!r}: not supported, must be False (torch.optim.AdamW has it)"
            )


def check_tensors(optimizer: str, tensors: Sequence[Tensor], names: Iterable[str]) -> None:
    """Raise TypeError for tensors whose scale would be wrong or is not defined: complex ones, and FSDP's shards."""
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.is_complex():
            raise TypeError(
                f"{name}: {optimizer} does not support {tensor.dtype}; make the parameter real and use "
                "torch.view_as_complex in the model"
            )
        # FSDP1 marks its flat parameters and its views of them, FSDP2 shards tensors as DTensor.
        if getattr(tensor, "_fsdp_flattened", False) or hasattr(tensor, "device_mesh"):
            raise TypeError(
                f"{name}: is sharded by FSDP or is a DTensor, of which {optimizer} would scale each rank's shard by a "
                "ratio of its own; use DeepSpeed's ZeRO with maskvr_ds.lamb.bind, or DistributedDataParallel"
            )


def check_gradients(optimizer: str, param_groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError for sparse gradients, before any state is changed."""
    for group in param_groups:
        for p in group["params"]:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise RuntimeError(f"{optimizer} does not support sparse gradients; use Embedding(sparse=False)")


def check_loaded(optimizer: str, state_dict: dict[str, Any], settings: Iterable[str]) -> None:
    """Raise ValueError if groups of a state dict lack settings, or have such that would be ignored: it is that of
    another optimizer."""
    for number, group in enumerate(state_dict["param_groups"]):
        check_switches(group)
        # torch adds `differentiable` to the defaults of an optimizer that loads a state.
        if missing := sorted(set(settings) - set(group) - {"differentiable"}):
            raise ValueError(
                f"parameter group {number} of the state dict has no {', '.join(missing)}: it is that of another "
                f"optimizer than {optimizer}. Load the state of the same class, or start with new moments"
            )
