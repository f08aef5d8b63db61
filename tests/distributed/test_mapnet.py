"""Training with MAPNet on real gloo ranks: identical replicas, one loss curve, exact resume, faults stop the run."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, allow_fp16, column, configuration, metrics
from tests.support.corpora import make_corpus

STEPS, LONG, SAVED = 50, 100, 25
EXACT = ("step", "loss", "grad_norm", "data_digest", "mask_digest", "mapnet_loss", "variance_ratio", "weight_max")
FIGURES = (*EXACT[5:], "effective_sample_size", "proposal_entropy", "gradient_norm_mean", "proposal_used")


def train_mapnet(jobs: list[tuple[dict[str, Any], str | None, str]]) -> list[dict[str, Any]]:
    """On a rank: train each (configuration, resume, fault) in turn; returns error, hash of the network, and masks.

    fault, on rank 1 after step 7: "bit" flips the last bit of one parameter, "nan" sets another to NaN.
    masks: (epoch, sample id) → sorted positions.
    """
    import torch

    from maskvr_ds import train
    from maskvr_ds.checkpoint import save as checkpoint
    from maskvr_ds.config import RunConfig
    from maskvr_ds.masking import proposer
    from maskvr_ds.masking.masker import Masker
    from maskvr_ds.runtime import distributed

    distributed.initialize()
    allow_fp16()
    original_step, original_mask, original_save = proposer.Proposer.step, Masker.__call__, checkpoint.save
    answers = []
    for values, resume, fault in jobs:
        answer: dict[str, Any] = {"masks": {}, "error": None}

        def step(self: Any, answer: dict[str, Any] = answer, fault: str = fault) -> Any:
            result = original_step(self)
            answer["hash"] = int(proposer.bits_hash(self.parameters.detach()))
            if self.run_step == 7 and distributed.rank() == 1:
                if fault == "bit":
                    self.parameters.detach().view(torch.int32)[5] ^= 1
                if fault == "nan":
                    self.net.score.bias.detach().fill_(float("nan"))
            return result

        def mask(self: Any, batch: Any, answer: dict[str, Any] = answer) -> Any:
            masked = original_mask(self, batch)
            for b in range(len(batch.sample_ids)):
                positions = masked.positions[b][masked.weights[b] != 0].tolist()
                answer["masks"].setdefault((int(batch.epochs[b]), int(batch.sample_ids[b])), sorted(positions))
            return masked

        def save(run: Path, *args: Any, **options: Any) -> Any:
            """Save, then copy the run as a kill would leave it."""
            folder = original_save(run, *args, **options)
            if folder.name.endswith(f"{SAVED:08d}") and distributed.rank() == 0:
                shutil.copytree(run, run.with_name(f"{run.name}-resumed"))
            distributed.barrier()
            return folder

        proposer.Proposer.step, Masker.__call__, checkpoint.save = step, mask, save
        try:
            train.train(RunConfig.model_validate(values), resume)
        except (ValueError, ArithmeticError, distributed.RemoteError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        answers.append(answer)
    return answers


# Name → (steps, mapnet section, DeepSpeed configuration, world sizes, fault).
RUNS: dict[str, tuple[int, dict[str, Any], str, tuple[int, ...], str]] = {
    "never": (STEPS, {"gate": "never"}, "zero1_fp32", (1, 2), ""),
    "variance": (20, {"gate": "never", "objective": "variance"}, "zero1_fp32", (1, 2), ""),
    "always": (STEPS, {}, "zero1_fp32", (1, 2), ""),
    "again": (STEPS, {}, "zero1_fp32", (2,), ""),
    "auto": (30, {"gate": "auto", "cost": 0.0, "objective": "variance"}, "zero2_fp32", (2,), ""),
    "measured": (8, {"gate": "auto"}, "zero1_fp32", (2,), ""),
    "long": (LONG, {"check_every": 20}, "zero2_fp32", (2,), ""),
    "bit": (20, {"check_every": 5}, "zero1_fp32", (2,), "bit"),
    "nan": (20, {}, "zero1_fp32", (2,), "nan"),
    "fp16": (10, {}, "zero1_fp16", (2,), ""),
    "bf16": (10, {}, "zero2_bf16", (2,), ""),
    "zero3": (10, {}, "zero3_fp32", (2,), ""),
}


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        corpus = folder / "corpus"
        make_corpus(corpus, rows=1000, words=20, padded_last_row=True)
        self.answers: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for world_size in (1, 2):
            jobs = []
            for name, (steps, section, deepspeed, world_sizes, fault) in RUNS.items():
                if world_size in world_sizes:
                    values = configuration(
                        self(name, world_size),
                        corpus,
                        steps=steps,
                        model=NO_DROPOUT,
                        batch={"micro_size": 3},
                        masking={
                            "strategy": "mapnet",
                            "mapnet": {"hidden": 32, "layers": 1, "lr": 3e-3, "objective": "regression", **section},
                        },
                        evaluation={"every_steps": 0},
                        checkpoint={"every_steps": SAVED},
                        deepspeed=deepspeed,
                    )
                    jobs.append((name, (values, None, fault)))
                    if name == "always" and world_size == 2:
                        resumed = {**values, "output_dir": str(self("always", 2)) + "-resumed"}
                        jobs.append(("resumed", (resumed, "auto", "")))
            by_rank = run_ranks(train_mapnet, world_size, [job for _, job in jobs], timeout=400)
            for (name, _), *answers in zip(jobs, *by_rank, strict=True):
                self.answers[name, world_size] = answers

    def __call__(self, name: str, world_size: int = 2) -> Path:
        return self.folder / f"{name}-{world_size}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("mapnet"))


def test_runs_without_a_fault_train(runs: Runs) -> None:
    for (name, world_size), answers in runs.answers.items():
        if name not in ("bit", "nan"):
            assert [a["error"] for a in answers] == [None] * world_size, name


def test_replicas_are_equal_after_100_steps(runs: Runs) -> None:
    assert len(metrics(runs("long"))) == LONG
    for (name, _), answers in runs.answers.items():
        if name not in ("bit", "nan"):
            assert len({a["hash"] for a in answers}) == 1, name
    assert len({a[0]["hash"] for a in runs.answers.values()}) > 5, "the networks do learn"


def test_a_flipped_bit_stops_the_run_and_names_the_rank(runs: Runs) -> None:
    for answer in runs.answers["bit", 2]:
        assert answer["error"].startswith("ReplicaError: step 10: MAPNet's parameters on rank 1 differ from those on")


def test_non_finite_scores_stop_the_run_and_name_step_and_rank(runs: Runs) -> None:
    for answer in runs.answers["nan", 2]:
        assert answer["error"].startswith("FloatingPointError: step 8: MAPNet's scores are not finite on rank 1;")


@pytest.mark.parametrize("name", ["never", "variance"])
def test_loss_curve_does_not_depend_on_ranks(runs: Runs, name: str) -> None:
    assert column(runs(name, 1), "data_digest", "mask_digest") == column(runs(name, 2), "data_digest", "mask_digest")
    for one, two in zip(metrics(runs(name, 1)), metrics(runs(name, 2)), strict=True):
        assert one["proposal_used"] == 0
        for figure in ("mapnet_loss", "variance_ratio", "gradient_norm_mean", "proposal_entropy"):
            assert two[figure] == pytest.approx(one[figure], abs=1e-4), (figure, one["step"])


def test_almost_all_masks_do_not_depend_on_ranks(runs: Runs) -> None:
    assert column(runs("always", 1), "data_digest") == column(runs("always", 2), "data_digest")
    (one,) = runs.answers["always", 1]
    first, second = runs.answers["always", 2]
    two = {**first["masks"], **second["masks"]}
    assert set(one["masks"]) <= set(two)
    equal = sum(two[row] == positions for row, positions in one["masks"].items())
    assert len(one["masks"]) >= 12 * STEPS
    print(f"{equal} of {len(one['masks'])} masks equal")
    assert equal >= 0.99 * len(one["masks"])


@pytest.mark.parametrize("other", ["again-2", "always-2-resumed"])
def test_repeated_or_resumed_runs_are_bit_identical(runs: Runs, other: str) -> None:
    assert column(runs.folder / other, *EXACT) == column(runs("always"), *EXACT)
    ours, theirs = (
        complete_checkpoints(run)[-1] / "mapnet.safetensors" for run in (runs("always"), runs.folder / other)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_telemetry(runs: Runs) -> None:
    for name in ("always", "never", "bf16", "fp16", "zero3"):
        for line in metrics(runs(name)):
            assert all(isinstance(line[figure], float) for figure in FIGURES), (name, line)
            assert 0 < line["effective_sample_size"] <= 1 + 1e-6
            assert 0 < line["proposal_entropy"] <= 1 + 1e-6
            assert line["weight_max"] <= 1 / 0.3 + 1e-6
    first, last = metrics(runs("always"))[0], metrics(runs("always"))[-1]
    assert (first["weight_max"], first["proposal_entropy"]) == (1.0, pytest.approx(1.0, abs=1e-6))
    assert last["weight_max"] > 1.05
    assert all(line["proposal_cost"] > 0 for line in metrics(runs("measured"))[3:])


def test_auto_uses_the_proposal_while_it_pays(runs: Runs) -> None:
    """At zero cost: whenever the ratio of moving averages, recomputed here from the metrics, is below 1."""
    lines = metrics(runs("auto"))
    assert lines[0]["proposal_used"] == 0
    proposed = uniform = 0.0
    for before, line in pairwise(lines):
        # The variance objective's loss is Σ w u s² / (s̄² N).
        second = before["mapnet_loss"] * before["gradient_norm_mean"] ** 2
        proposed, uniform = 0.99 * proposed + second, 0.99 * uniform + second / before["variance_ratio"]
        if abs(proposed / uniform - 1) > 1e-4:
            assert line["proposal_used"] == (proposed < uniform), line["step"]
    assert len({line["proposal_used"] for line in lines}) == 2
