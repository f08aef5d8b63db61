"""Time of training steps by part, their kernels, and their collectives: recorded by wrapping what the loop calls.

The clock runs for one part at a time: what is called within another part is not counted there again. On a GPU the time
is that of the stream, between events, so that it includes waiting for the host; nothing is waited for while recording.
"""

import inspect
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import deepspeed
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskvr_ds import train
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.training import step as step_module

# data: the loader, and copies to the device. masks: masks, corruption, digests. reduction: collectives, as far as the
# stream waits for them. optimizer: norm, clipping, update. other: loss, counters, learning rate, logging.
PARTS = ("data", "masks", "forward", "backward", "reduction", "optimizer", "mapnet", "other")
# Functions of torch.distributed: the argument that is the complete tensor, and how often a ring sends it, × (N − 1)/N.
COLLECTIVES = {
    "all_reduce": ("tensor", 2),
    "reduce": ("tensor", 1),
    "broadcast": ("tensor", 1),
    "all_gather_into_tensor": ("output_tensor", 1),
    "all_gather": ("tensor_list", 1),
    "reduce_scatter_tensor": ("input", 1),
    "reduce_scatter": ("input_list", 1),
}
# Operations that launch no kernel.
_VIEWS = {
    *("view", "_unsafe_view", "as_strided", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze"),
    *("squeeze", "narrow", "detach", "alias", "split", "split_with_sizes", "unbind", "chunk", "reshape", "unfold"),
    *("lift_fresh", "empty", "empty_like", "new_empty", "empty_strided"),
}


class StepParts:
    """Seconds of each step by part. Call `start_step` at the start of every step, and wrap functions by `timed`."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if self._cuda else None
        self._stack = ["other"]
        self._steps: list[list[tuple[str, Any]]] = []

    @property
    def current(self) -> str:
        """The innermost open part."""
        return self._stack[-1]

    def _mark(self) -> None:
        """From here on, time belongs to the innermost open part."""
        if not self._steps:
            return
        mark: Any = (time.perf_counter(), time.process_time())
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self._steps[-1].append((self._stack[-1], mark))

    def start_step(self) -> None:
        """The previous step ends here."""
        self._mark()
        self._steps.append([])
        self._mark()

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        # Reductions on a stream of their own run concurrently with the parts.
        if self._cuda and torch.cuda.current_stream() != self._stream:
            yield
            return
        self._stack.append(part)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose time is that of `part`."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return call

    def seconds(self) -> list[dict[str, tuple[float, float]]]:
        """Per step: part → seconds elapsed and CPU-seconds of this process (0 on a GPU). Waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        found = []
        # The last step has no end.
        for marks in self._steps[:-1]:
            parts = dict.fromkeys(PARTS, (0.0, 0.0))
            for (part, start), (_, end) in pairwise(marks):
                took = (start.elapsed_time(end) / 1e3, 0.0) if self._cuda else (end[0] - start[0], end[1] - start[1])
                parts[part] = (parts[part][0] + took[0], parts[part][1] + took[1])
            found.append(parts)
        return found


class Traffic:
    """Collectives of one step: calls, bytes of the complete tensors, and bytes that a rank sends in a ring."""

    def __init__(self) -> None:
        self.active = False
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        # Calls from within autograd, so that the backward pass can hide them.
        self.in_backward: Counter[str] = Counter()

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature, argument = inspect.signature(function), COLLECTIVES[name][0]

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.active:
                given = signature.bind(*args, **kwargs).arguments
                tensors = given[argument] if isinstance(given[argument], list) else [given[argument]]
                self.calls[name] += 1
                self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
                self.in_backward[name] += torch._C._current_graph_task_id() != -1
            return function(*args, **kwargs)

        return call

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, by ring algorithms."""
        return sum(COLLECTIVES[name][1] * size for name, size in self.bytes.items()) * (ranks - 1) / ranks

    def figures(self) -> dict[str, dict[str, int]]:
        """For JSON: by collective, calls and bytes."""
        return {name: {"calls": calls, "bytes": self.bytes[name]} for name, calls in sorted(self.calls.items())}


@contextmanager
def counting_collectives(traffic: Traffic, parts: StepParts | None = None) -> Iterator[None]:
    """Within: calls of torch.distributed are counted in `traffic` while it is active, and timed in `parts`."""
    with ExitStack() as stack:
        for name in COLLECTIVES:
            function = traffic.counted(name, getattr(torch.distributed, name))
            timed = function if parts is None else parts.timed("reduction", function)
            stack.enter_context(mock.patch.object(torch.distributed, name, timed))
        # DeepSpeed's backend has looked these up when it was initialised.
        backend = deepspeed.comm.comm.cdb
        for attribute in ("all_gather_function", "reduce_scatter_function"):
            if (captured := getattr(backend, attribute, None)) is None or captured.__name__ not in COLLECTIVES:
                continue
            function = traffic.counted(captured.__name__, captured)
            timed = function if parts is None else parts.timed("reduction", function)
            stack.enter_context(mock.patch.object(backend, attribute, timed))
        yield


@contextmanager
def recording(parts: StepParts, traffic: Traffic, counted_step: int) -> Iterator[None]:
    """Within: `maskvr_ds.train.train` records its steps. counted_step: whose collectives are counted, from 0."""
    batches = train.batches

    def reading(*args: Any, **kwargs: Any) -> Iterator[Any]:
        reader = batches(*args, **kwargs)
        try:
            for number in itertools.count():
                traffic.active = number == counted_step
                parts.start_step()
                with parts.within("data"):
                    item = next(reader)
                yield item
        finally:
            reader.close()

    places: list[tuple[Any, str, str]] = [
        (Masker, "__call__", "masks"),
        (step_module, "data_digest", "masks"),
        (step_module, "mask_digest", "masks"),
        (step_module, "objective_losses", "forward"),
        (deepspeed.DeepSpeedEngine, "backward", "backward"),
        (deepspeed.DeepSpeedEngine, "step", "optimizer"),
        (Proposer, "propose", "mapnet"),
        (Proposer, "observe", "mapnet"),
        (Proposer, "step", "mapnet"),
    ]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(train, "batches", reading))
        for owner, name, part in places:
            wrapped = _method(parts.timed(part, getattr(owner, name)))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        stack.enter_context(counting_collectives(traffic, parts))
        yield


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function, which becomes a method if it is an attribute of a class."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Kernels(TorchDispatchMode):
    """Counts the operations of torch that launch a kernel, and the values that the host reads.

    A CPU splits dropout and attention into more of them than a GPU does; compiled regions are not seen.
    """

    def __init__(self, part: Callable[[], str]) -> None:
        """part: names what runs now."""
        super().__init__()
        self._part = part
        self.launched: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self._tolist: Any = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name == "_local_scalar_dense":
            self.reads[self._part()] += 1
        elif name.rstrip("_") not in _NO_KERNEL:
            self.launched[self._part()] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> "Kernels":
        original = self._tolist = torch.Tensor.tolist

        def tolist(tensor: torch.Tensor) -> Any:
            # Not dispatched on a CPU; a copy from a GPU.
            self.reads[self._part()] += 1
            return original(tensor)

        torch.Tensor.tolist = tolist  # type: ignore[assignment, method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.Tensor.tolist = self._tolist  # type: ignore[method-assign]


_NO_KERNEL = {name.rstrip("_") for name in _VIEWS}


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
