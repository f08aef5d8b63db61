"""A rate that falls by schedule, with slots per row that follow it: the run of the widest shape, in fewer FLOPs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.checkpoint import load
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

# Stopped and resumed after STOP, in the middle of a stage.
STEPS, STOP = 12, 7
ZERO = ("zero0", "zero2", "zero3")
EXACT = ("step", "loss", "grad_norm", "data_digest", "mask_digest", "predictions", "trust_ratio_max")
# 30 positions at rates from 0.45 to 0.15: 14 to 5 predictions. The rate of step s is 0.45 − 0.3 s / 11.
PREDICTIONS = [14, 13, 12, 11, 10, 9, 9, 8, 7, 6, 5, 5]
SLOTS = [14, 13, 13, 11, 11, 9, 9, 9, 7, 7, 5, 5]
# What the layers below late mask tokens do not compute, in every mask of a stage.
HIDDEN = {14: 14, 13: 12, 11: 10, 9: 8, 7: 6, 5: 5}
LATE = {"mask_probability": 1, "random_probability": 0, "late_layer": 1}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "late": {"masking": LATE},
    "documents": {"data": {"attention": "documents"}},
}


def train_narrow_and_wide(folder: Path) -> list[str | None]:
    """On a rank: KIND, KIND-wide with as many slots at every step as the highest rate needs (as in earlier versions),
    and KIND-parts, stopped within a stage and resumed."""
    from maskvr_ds.masking import masker
    from maskvr_ds.masking.rates import Stage, stages

    def one(*schedule: Any) -> tuple[Stage, ...]:
        found = stages(*schedule)
        return (Stage(found[0].slots, found[-1].fewest),)

    jobs: list[tuple[dict[str, Any], str | None]] = [(values(folder, kind, kind), None) for kind in KINDS]
    for kind in ("plain", "late"):
        parts = values(folder, f"{kind}-parts", kind)
        jobs += [({**parts, "training": {"steps": STOP, "schedule_steps": STEPS}}, None), (parts, "auto")]
    answers = train_all(jobs)
    masker.stages = one  # type: ignore[attr-defined]
    return answers + train_all([(values(folder, f"{kind}-wide", kind), None) for kind in KINDS])


def values(folder: Path, name: str, kind: str, **sections: Any) -> dict[str, Any]:
    masking = {"rate": 0.45, "final_rate": 0.15, **KINDS[kind].get("masking", {})}
    found = configuration(
        folder / name,
        folder / f"corpus-{kind}",
        steps=STEPS,
        model=NO_DROPOUT,
        optimizer={"lr": 1e-3},
        evaluation={"every_steps": 0},
        masking=masking,
        **{"deepspeed": "zero1_fp32", **sections},
    )
    found["data"] |= KINDS[kind].get("data", {})
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of `train_narrow_and_wide` on one rank; plain-zeroN on two."""
    folder = tmp_path_factory.mktemp("stages")
    # Late mask tokens: with fewer positions in a row, those hidden in a stage would be more than its masks.
    for kind in KINDS:
        make_corpus(folder / f"corpus-{kind}", rows=200, words=20, packed=kind == "documents")
    assert run_ranks(train_narrow_and_wide, 1, folder) == [[None] * 10]
    jobs = [(values(folder, f"plain-{zero}", "plain", deepspeed=f"{zero}_fp32"), None) for zero in ZERO]
    assert run_ranks(train_all, 2, jobs) == [[None] * len(jobs)] * 2
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_losses_are_those_of_the_widest_shape(runs: Path, kind: str) -> None:
    ours, wide = (metrics(runs / name) for name in (kind, f"{kind}-wide"))
    if kind != "documents":
        assert [line["predictions"] for line in ours] == [12 * each for each in PREDICTIONS]
    for name in ("data_digest", "mask_digest", "predictions"):
        assert [line[name] for line in ours] == [line[name] for line in wide]
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in wide], rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "late"])
def test_flops_follow_the_stages(runs: Path, kind: str) -> None:
    """By BERT's formula: two layers, the lower of which computes fewer positions if mask tokens are late."""
    shapes = {name: tensor.shape for name, tensor in load.read_weights(complete_checkpoints(runs / kind)[-1]).items()}
    (V, D), L = shapes["bert.embeddings.word_embeddings.weight"], 32
    inner = shapes["bert.encoder.layer.0.intermediate.dense.weight"][0]

    def of_token(slots: int, hidden: int) -> float:
        layers = sum(8 * n * D**2 + 4 * n**2 * D + 4 * n * D * inner for n in (L - hidden, L))
        return 3 * (layers + 2 * slots * D * (D + V)) / L

    narrow = [(slots, HIDDEN[slots]) for slots in SLOTS]
    for name, shape in ((kind, narrow), (f"{kind}-parts", narrow), (f"{kind}-wide", [(14, 5)] * STEPS)):
        found = [1e12 * line["model_tflops_per_rank"] / line["tokens_per_second"] for line in metrics(runs / name)]
        expected = [of_token(slots, hidden if kind == "late" else 0) for slots, hidden in shape]
        assert found == pytest.approx(expected, rel=1e-9), name


@pytest.mark.parametrize("zero", ZERO)
def test_stages_and_ranks_agree(runs: Path, zero: str) -> None:
    one, two = (metrics(runs / name) for name in ("plain", f"plain-{zero}"))
    for name in ("data_digest", "mask_digest", "predictions"):
        assert [line[name] for line in one] == [line[name] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=1e-5)


@pytest.mark.parametrize("kind", ["plain", "late"])
def test_resumed_equals_undisturbed(runs: Path, kind: str) -> None:
    assert column(runs / f"{kind}-parts", *EXACT) == column(runs / kind, *EXACT)
    ends = [load.read_weights(complete_checkpoints(runs / name)[-1]) for name in (f"{kind}-parts", kind)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
