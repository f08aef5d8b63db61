"""batch.micro_size auto with an injected limit of memory: steps of more rows raise what torch raises on a full GPU."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskvr_ds.config import deepspeed_config_path
from maskvr_ds.run_folder.layout import CONFIG, METRICS
from maskvr_ds.telemetry.metrics_file import read_lines
from tests.distributed.ranks import run_ranks
from tests.distributed.training import configuration
from tests.support.corpora import make_corpus

NONE = {"every_steps": 0}
KEYS = ("loss", "grad_norm", "data_digest", "mask_digest")


def train_limited(
    jobs: list[tuple[dict[str, Any], str | None]], limits: list[int], devices: list[tuple[str, int]] | None = None
) -> list[str]:
    """On a rank: train with `limits[rank]` rows per micro-batch at most, on stand-ins for GPUs; returns what was tried,
    or the error."""
    import torch

    from maskvr_ds import train
    from maskvr_ds.config import RunConfig
    from maskvr_ds.runtime import distributed
    from maskvr_ds.training import micro_size

    distributed.initialize()
    rank = distributed.rank()
    objective_losses = micro_size.objective_losses
    tried: list[int] = []

    def limited(engine: Any, batch: Any) -> Any:
        rows = len(batch.input_ids)
        if not tried or tried[-1] != rows:
            tried.append(rows)
        loss = objective_losses(engine, batch)
        if rows > limits[rank]:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return loss

    micro_size.objective_losses = limited
    if devices is not None:
        micro_size._device = lambda: devices[rank]
        micro_size._memory_limit = nullcontext
        micro_size._check = lambda *_: None
    train.plot_loss = lambda *_: None
    answers = []
    for values, resume in jobs:
        tried.clear()
        try:
            train.train(RunConfig.model_validate(values), resume)
            answers.append(json.dumps(tried))
        except (ValueError, distributed.RemoteError) as error:
            answers.append(f"{type(error).__name__}: {error}")
    return answers


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "corpus", rows=256, length=16, padded_last_row=True)


GPU = ("stand-in", 1 << 30)


@pytest.mark.parametrize("deepspeed", ["zero1_bf16", "zero2_fp32"])
def test_the_smallest_gpu_decides_and_a_resume_does_not_search(tmp_path: Path, corpus: Path, deepspeed: str) -> None:
    def values(name: str, steps: int, micro: Any) -> dict[str, Any]:
        batch = {"global_size": 48, "micro_size": micro}
        length = {"steps": steps, "schedule_steps": 4}
        more = {"training": length, "deepspeed": deepspeed, "schedule": {"warmup_steps": 1}, "evaluation": NONE}
        return configuration(tmp_path / name, corpus, steps=4, batch=batch, **more)

    jobs = [(values("auto", 2, "auto"), None), (values("auto", 4, "auto"), "auto"), (values("number", 4, 6), None)]
    answers = run_ranks(train_limited, 2, jobs, [11, 7], [GPU, GPU])
    # Of the divisors of 24: 1, 2, 4, 8, which does not fit on rank 1; then between 4 and 8.
    assert answers == [["[1, 2, 4, 8, 6]", "[]", "[]"]] * 2
    stored = yaml.safe_load((tmp_path / "auto" / CONFIG).read_text(encoding="utf-8"))
    assert stored["batch"] == {"global_size": 48, "micro_size": 6}
    found, expected = (read_lines(tmp_path / name / METRICS) for name in ("auto", "number"))
    assert [[line[key] for key in KEYS] for line in found] == [[line[key] for key in KEYS] for line in expected]


def test_another_number_of_ranks_takes_a_divisor(tmp_path: Path, corpus: Path) -> None:
    batch = {"global_size": 24, "micro_size": "auto"}
    values = configuration(
        tmp_path / "run", corpus, steps=2, batch=batch, schedule={"warmup_steps": 1}, evaluation=NONE
    )
    values["training"] = {"steps": 1, "schedule_steps": 2}
    assert run_ranks(train_limited, 1, [(values, None)], [13], [GPU]) == [["[1, 2, 4, 8, 24, 12]"]]
    values["training"] = {"steps": 2, "schedule_steps": 2}
    assert run_ranks(train_limited, 2, [({**values}, "auto")], [0, 0], [GPU, GPU]) == [["[]"]] * 2
    assert yaml.safe_load((tmp_path / "run" / CONFIG).read_text(encoding="utf-8"))["batch"]["micro_size"] == 12


def test_refused(tmp_path: Path, corpus: Path) -> None:
    def values(name: str) -> dict[str, Any]:
        batch = {"global_size": 48, "micro_size": "auto"}
        return configuration(
            tmp_path / name, corpus, steps=2, batch=batch, schedule={"warmup_steps": 1}, evaluation=NONE
        )

    ((on_cpu,),) = run_ranks(train_limited, 1, [(values("cpu"), None)], [9])
    assert "batch.micro_size auto needs GPUs, and this rank trains on cpu" in on_cpu
    answers = run_ranks(train_limited, 2, [(values("unequal"), None)], [9, 9], [GPU, ("stand-in", 1 << 31)])
    for (answer,) in answers:
        assert "needs equal GPUs: rank 0 has stand-in with 1.0 GiB, rank 1 stand-in with 2.0 GiB" in answer
    answers = run_ranks(train_limited, 2, [(values("full"), None)], [9, 0], [GPU, GPU])
    for (answer,) in answers:
        assert "a single sequence of 16 tokens does not fit into 1.0 GiB at ZeRO stage 1" in answer
    assert not (tmp_path / "full").exists()


def search_in_fp16(values: dict[str, Any], limit: int) -> tuple[list[int], list[bool]]:
    """On a rank: micro-batches tried, if updates run out of memory above `limit` rows; of each, whether one took place
    or was attempted."""
    import torch

    from maskvr_ds.config import RunConfig
    from maskvr_ds.optim.lamb import Lamb
    from maskvr_ds.runtime import distributed
    from maskvr_ds.training import micro_size
    from tests.distributed.training import allow_fp16

    distributed.initialize()
    allow_fp16()
    tried: list[int] = []
    updated: list[bool] = []
    objective_losses, accumulate = micro_size.objective_losses, Lamb._accumulate

    def recorded(engine: Any, batch: Any) -> Any:
        if not tried or tried[-1] != len(batch.input_ids):
            tried.append(len(batch.input_ids))
            updated.append(False)
        return objective_losses(engine, batch)

    def limited(self: Any, *arguments: Any) -> None:
        updated[-1] = True
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        accumulate(self, *arguments)

    micro_size.objective_losses = recorded
    Lamb._accumulate = limited  # type: ignore[method-assign]
    micro_size._device = lambda: GPU
    micro_size._memory_limit = nullcontext
    micro_size._check = lambda *_: None
    point: Any = type("Point", (), {"folder": None})
    micro_size.resolve_micro_sizes(RunConfig.model_validate(values), point)
    return tried, updated


def test_skipped_updates_of_fp16_do_not_count(tmp_path: Path, corpus: Path) -> None:
    """The first steps overflow: they need no memory for an update, which a step with a lower loss scale needs."""
    settings = json.loads(deepspeed_config_path("zero1_fp16").read_text(encoding="utf-8"))
    settings["fp16"]["initial_scale_power"] = 24
    file = tmp_path / "zero1_fp16.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    batch = {"global_size": 12, "micro_size": "auto"}
    values = configuration(tmp_path / "run", corpus, steps=2, batch=batch, deepspeed=str(file), evaluation=NONE)
    values["schedule"] = {"warmup_steps": 1}
    ((tried, updated),) = run_ranks(search_in_fp16, 1, values, 4)
    assert tried == [1, 2, 4, 12, 6]
    assert all(updated)
