"""batch.micro_size auto: the search, and its place in the configuration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskvr_ds.config import ConfigError, RunConfig, dump_config, load_config
from maskvr_ds.runtime import distributed
from maskvr_ds.training.micro_size import _memory_limit, _stored, _with_numbers, divisors, largest_fitting

PHASES: list[dict[str, Any]] = [
    {"name": "short", "data": {"path": "a"}, "training": {"steps": 2}, "batch": {"global_size": 96}},
    {
        "name": "long",
        "data": {"path": "b"},
        "training": {"steps": 2},
        "batch": {"micro_size": 3},
        "start": {"moments": "keep", "step_counter": "keep", "schedule": "restart"},
    },
]


def config(**values: Any) -> RunConfig:
    given: dict[str, Any] = {"output_dir": "run", "batch": {"global_size": 48, "micro_size": "auto"}, **values}
    if "phases" not in given:
        given.update(data={"path": "a"}, training={"steps": 3})
    return RunConfig.model_validate(given)


@given(st.integers(1, 70_000), st.integers(0, 80_000))
def test_the_largest_that_fits_is_found_in_few_trials(share: int, limit: int) -> None:
    candidates, tried = divisors(share), []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    assert largest_fitting(candidates, fits) == max((n for n in candidates if n <= limit), default=0)
    assert len(set(tried)) == len(tried)
    assert len(tried) <= 2 * share.bit_length() + 2
    refused = [n for n in tried if n > limit]
    assert refused == sorted(refused, reverse=True), "nothing larger than what did not fit"


@given(st.integers(1, 3000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_auto_is_a_value_of_the_configuration(tmp_path: Path) -> None:
    automatic = config()
    assert automatic.batch.is_auto
    assert automatic.accumulation_steps(4) == 12
    with pytest.raises(ConfigError, match="not a multiple"):
        automatic.accumulation_steps(5)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(automatic), encoding="utf-8")
    assert load_config(path) == automatic
    assert not config(batch={"micro_size": 4}).batch.is_auto
    for wrong in (0, "autos", True, 1.5):
        with pytest.raises(ValueError, match="micro_size"):
            config(batch={"micro_size": wrong})


def test_the_numbers_found_replace_auto() -> None:
    assert _with_numbers(config(), {0: 8}).batch.micro_size == 8
    found = _with_numbers(config(phases=PHASES), {0: 8})
    assert [found.phase(i).batch.micro_size for i in (0, 1)] == [8, 3]
    assert [found.phase(i).batch.global_size for i in (0, 1)] == [96, 48]
    assert "auto" not in dump_config(found)


def test_a_resume_takes_the_numbers_of_its_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    (tmp_path / "config.yaml").write_text(dump_config(config(batch={"global_size": 48, "micro_size": 6})))
    assert _stored(checkpoint, 1) == {0: 6}
    assert _stored(checkpoint, 2) == {}, "another run"
    assert _stored(None, 1) == {}
    assert _stored(tmp_path / "elsewhere" / "checkpoints" / "x", 1) == {}
    (tmp_path / "config.yaml").write_text(dump_config(config(phases=PHASES)))
    assert _stored(checkpoint, 2) == {1: 3}


def test_the_limit_is_that_of_the_fullest_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda:1"))
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, 25])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, _: limits.append(share))
    with _memory_limit():
        assert limits == [pytest.approx(0.23)]
    assert limits[1:] == [1.0]
