"""Clock of the parts of a step, kernels in a profile, counted operations and collectives."""

import inspect
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from maskvr_ds.benchmarks.device_kernels import kernel_figures
from maskvr_ds.benchmarks.step_parts import COLLECTIVES, Kernels, StepParts, Traffic, counting_collectives
from maskvr_ds.data.mixture import Share, real_share
from tests.support.corpora import make_corpus


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, in a list; CPU time runs half as fast."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: now[0] / 2)
    return now


def test_time_belongs_to_the_innermost_part(clock: list[float]) -> None:
    parts = StepParts(torch.device("cpu"))

    def wait(seconds: float) -> float:
        clock[0] += seconds
        return seconds

    def backward() -> None:
        wait(3)
        assert parts.timed("reduction", wait)(5) == 5
        wait(7)

    with parts.within("data"):
        wait(1000)  # before the first step
    for _ in range(2):
        parts.start_step()
        parts.timed("data", wait)(1)
        wait(0.5)
        parts.timed("backward", backward)()
    parts.start_step()
    (first, second) = parts.seconds()
    assert first == second
    assert {name: elapsed for name, (elapsed, _) in first.items() if elapsed} == {
        "data": 1,
        "other": 0.5,
        "backward": 10,
        "reduction": 5,
    }
    assert first["backward"][1] == 5


def test_an_error_closes_its_part(clock: list[float]) -> None:
    parts = StepParts(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), parts.within("forward"):
        raise ZeroDivisionError
    assert parts.current == "other"


def test_operations_and_reads_are_counted_by_part() -> None:
    part = "a"
    with Kernels(lambda: part) as kernels:
        x = torch.ones(3) + 1
        x.view(3, 1).t()
        part = "b"
        x.sum().item()
        x.tolist()
    assert kernels.launched["a"] == 2
    assert kernels.launched["b"] == 1
    assert kernels.reads == {"b": 2}
    x.tolist()
    assert kernels.reads == {"b": 2}, "restored"


def test_collectives_exist_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (argument, _) in COLLECTIVES.items():
        assert argument in inspect.signature(getattr(torch.distributed, name)).parameters
    monkeypatch.setattr(torch.distributed, "all_gather", lambda tensor_list, tensor, async_op=False: "work")
    traffic = Traffic()
    with counting_collectives(traffic):
        torch.distributed.all_gather([torch.ones(3)] * 2, torch.ones(3))
        traffic.active = True
        assert torch.distributed.all_gather([torch.ones(3)] * 2, torch.ones(3), async_op=True) == "work"
        x = torch.ones(2, requires_grad=True)
        x.register_hook(lambda _: torch.distributed.all_gather([torch.ones(3)] * 2, torch.ones(3)) and None)
        x.sum().backward()
    assert traffic.figures() == {"all_gather": {"calls": 2, "bytes": 48}}
    assert traffic.in_backward == {"all_gather": 1}
    assert traffic.sent(2) == 24


def event(name: str, start: float, end: float, *, device: bool = True, annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=DeviceType.CUDA if device else DeviceType.CPU,
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=annotation,
    )


def test_kernels_of_a_profile() -> None:
    """Times in µs: two kernels overlap, then a gap of 1 ms."""
    found = kernel_figures(
        [
            event("gemm", 4000, 5000),
            event("gemm", 1000, 2500),
            event("add", 2000, 3000),
            event("Memcpy DtoH", 0, 900),
            event("step", 0, 9000, annotation=True),
            event("cudaLaunchKernel", 0, 1, device=False),
            event("aten::add", 0, 1, device=False),
        ]
    )
    assert (found["kernels_per_step"], found["copies_per_step"], found["launches_per_step"]) == (3, 1, 1)
    assert (found["device_busy_milliseconds"], found["device_idle_milliseconds"]) == (3.0, 1.0)
    assert found["top_kernels"] == {"gemm": 2.5, "add": 1.0}
    assert kernel_figures([])["kernels_per_step"] == 0


def test_events_of_torch_have_what_is_read() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3) + 1
    assert kernel_figures(profile.events())["kernels_per_step"] == 0


def test_share_of_real_tokens(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_pipeline.shards import Corpus

    padded = Corpus(make_corpus(tmp_path / "a", rows=8, length=16, padded_last_row=True))
    assert real_share(padded) == 1 - 8 / (8 * 16)
    full = Corpus(make_corpus(tmp_path / "b", rows=8, length=16))
    monkeypatch.setattr("maskvr_ds.data.mixture.members", lambda _: (padded, full))
    monkeypatch.setattr("maskvr_ds.data.mixture.shares", lambda _: (Share(8, 8), Share(8, 24)))
    assert real_share(full) == 1 - 8 / (32 * 16)
