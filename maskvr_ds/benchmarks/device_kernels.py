"""Kernels of a GPU in a profile of torch: how many, how long, and the gaps between them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch.autograd import DeviceType

# Calls of CUDA's runtime and driver that launch kernels.
_LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch"}
_COPIES = ("Memcpy", "Memset")
_LISTED = 15
_NAME = 100


def kernel_figures(events: Iterable[Any]) -> dict[str, Any]:
    """Figures of one profiled step. events: `torch.profiler.profile.events()`.

    kernels_per_step, copies_per_step: on the device. launches_per_step: calls of the host, a CUDA graph counts once.
    device_busy_milliseconds: time in which at least one kernel ran; device_idle_milliseconds: gaps between the first
    and the last one. top_kernels: milliseconds by name, the largest ones.
    """
    kernels, copies, launches = [], 0, 0
    for event in events:
        if event.device_type != DeviceType.CUDA:
            launches += event.name in _LAUNCHES
        elif event.name.startswith(_COPIES):
            copies += 1
        elif not event.is_user_annotation:
            kernels.append((event.time_range.start, event.time_range.end, event.name))
    kernels.sort()
    busy, idle, until = 0.0, 0.0, kernels[0][0] if kernels else 0.0
    by_name: Counter[str] = Counter()
    for start, end, name in kernels:
        idle += max(0.0, start - until)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
        by_name[name[:_NAME]] += end - start
    return {
        "kernels_per_step": len(kernels),
        "copies_per_step": copies,
        "launches_per_step": launches,
        "device_busy_milliseconds": busy / 1e3,
        "device_idle_milliseconds": idle / 1e3,
        "top_kernels": {name: time / 1e3 for name, time in by_name.most_common(_LISTED)},
    }
