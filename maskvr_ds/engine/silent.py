"""Steps of an engine without communication: every collective returns at once, with this rank's values.

For trials that may fail on one rank and not on another, for lack of memory, which would leave the others waiting.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import deepspeed.comm.comm as deepspeed_comm
import torch

# Of torch.distributed; those that ZeRO stages 0 to 2 and the optimizers here call.
_COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor"),
    *("reduce_scatter", "reduce_scatter_tensor"),
)
# Functions of torch.distributed that DeepSpeed's backend looks up when it is initialised.
_CAPTURED = ("all_gather_function", "reduce_scatter_function")


class _Done:
    """The handle of a collective that has finished."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@contextmanager
def without_communication() -> Iterator[None]:
    """Within: collectives of torch.distributed do nothing. Results are useless, memory is that of a real step, except
    for the communication library's own buffers. Raises nothing by itself; not for ZeRO 3, whose weights would be
    missing."""

    def silent(*_: Any, async_op: bool = False, **__: Any) -> _Done | None:
        return _Done() if async_op else None

    places: list[tuple[Any, str]] = [(torch.distributed, name) for name in _COLLECTIVES]
    places += [(deepspeed_comm.cdb, name) for name in _CAPTURED if hasattr(deepspeed_comm.cdb, name)]
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, silent))
        yield
