"""Asynchronous copies of small device tensors to the host: reading them never stalls the device."""

from collections.abc import Sequence
from typing import Any

import torch


class DeferredTensor:
    """A small tensor being copied to the host. `values()` waits for this copy, not for work queued after it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = tensor.clone()

    def values(self) -> list[Any]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class DeferredFigures:
    """Named values: a float tensor [len(names)] being copied to the host."""

    def __init__(self, names: Sequence[str], tensor: torch.Tensor) -> None:
        self._names = names
        self._tensor = DeferredTensor(tensor)

    def values(self) -> dict[str, float]:
        return dict(zip(self._names, self._tensor.values(), strict=True))
