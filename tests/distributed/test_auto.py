"""masking.strategy auto on real gloo ranks: one choice for all of them, the data unbroken by it, exact resume."""

from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

STEPS, EVERY = 32, 4
# What is measured to be best after 4, 8 … steps, and what is taken; 60 sequences of 32 tokens at 0.2: 5 segments.
ONE, ALL, PROPOSAL = ("fully_explored", 1), ("fully_explored", 5), ("mapnet", 1)
MEASURED = [ALL, ALL, PROPOSAL, PROPOSAL, ONE, ALL, ALL]
COURSE = [ONE, ALL, ALL, PROPOSAL, ONE, ONE, ALL]
EXACT = ("step", "loss", "grad_norm", "data_digest", "mask_digest")


def train_by_course(jobs: list[tuple[dict[str, Any], str | None]], strict: bool) -> list[str | None]:
    """On a rank: as `train_all`, but what is best is in MEASURED. strict: rank 0 alone decides."""
    from maskvr_ds.runtime import distributed
    from maskvr_ds.training import auto_strategy

    def better(figures: Any, most: int) -> tuple[str, int]:
        assert most == 5
        return ONE if strict and distributed.rank() else MEASURED[asked.pop(0)]

    auto_strategy.better = better
    answers = []
    for values, resume in jobs:
        done = len(metrics(Path(values["output_dir"]))) if resume else 0
        asked = list(range(done // EVERY, len(MEASURED)))
        answers += train_all([(values, resume)])
    return answers


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = make_corpus(folder / "corpus", rows=200, words=20, padded_last_row=True)
        for ranks in (1, 2):
            jobs = [(self.values(f"course-{ranks}", ranks), None)]
            if ranks == 2:
                half = {"steps": 14, "schedule_steps": STEPS}
                parts = self.values("parts", ranks)
                jobs += [({**parts, "training": half}, None), (parts, "auto")]
                stage3 = self.values("stage3", ranks) | {"deepspeed": "zero3_fp32", "training": {"steps": 6}}
                jobs.append((stage3, None))
            assert run_ranks(train_by_course, ranks, jobs, ranks == 2) == [[None] * len(jobs)] * ranks
            measured = self.values(f"measured-{ranks}", ranks) | {"training": {"steps": EVERY + 2}}
            faulty = self.values(f"faulty-{ranks}", ranks) | {"masking": {"strategy": "auto", "auto": {"rows": 201}}}
            told = run_ranks(train_all, ranks, [(measured, None), (faulty, None)])
            assert [answer[0] for answer in told] == [None] * ranks
            assert any("auto.rows 201: " in str(answer[1]) and "has only 200 rows" in str(answer[1]) for answer in told)

    def values(self, name: str, ranks: int) -> dict[str, Any]:
        return configuration(
            self(name),
            self.corpus,
            steps=STEPS,
            model=NO_DROPOUT,
            masking={"strategy": "auto", "rate": 0.2},
            # By its operations it would cost half as much as so small a model.
            mapnet={"hidden": 32, "layers": 1, "cost": 0.0},
            auto={"every_steps": EVERY, "rows": 5, "draws": 2, "sketch_size": 500},
            batch={"global_size": 60, "micro_size": 30 // ranks},
            evaluation={"every_steps": 0},
        )

    def __call__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("auto"))


def choices(run: Path) -> list[tuple[int, str, int]]:
    return [(e["step"], e["strategy"], e["segments"]) for e in read_events(run / METRICS) if e["event"] == "auto"]


def test_the_course_is_taken_and_told(runs: Runs) -> None:
    expected = [(EVERY * (number + 1), *choice) for number, choice in enumerate(COURSE)]
    for name in ("course-1", "course-2", "parts"):
        assert choices(runs(name)) == expected, name
    used = [used for (used,) in column(runs("course-2"), "proposal_used")]
    # From the step after a choice to that of the next one.
    assert used == [float(16 <= step < 20) for step in range(STEPS)]


def test_data_do_not_depend_on_ranks_whatever_is_chosen(runs: Runs) -> None:
    one, two = (column(runs(f"course-{ranks}"), "step", "samples", "data_digest") for ranks in (1, 2))
    assert one == two
    assert len({digest for _, _, digest in one}) == STEPS
    masks = [column(runs(f"course-{ranks}"), "mask_digest") for ranks in (1, 2)]
    # Those that MAPNet proposes may differ where its training's rounding does.
    assert [m for i, m in enumerate(masks[0]) if not 16 <= i < 20] == [
        m for i, m in enumerate(masks[1]) if not 16 <= i < 20
    ]


def test_resumed_is_undisturbed(runs: Runs) -> None:
    """Two steps after the proposal was measured to be best for the first time, and rows come five times running."""
    assert column(runs("parts"), *EXACT) == column(runs("course-2"), *EXACT)


def test_what_is_measured_does_not_depend_on_ranks(runs: Runs) -> None:
    (one,), (two,) = (
        [e for e in read_events(runs(f"measured-{ranks}") / METRICS) if e["event"] == "auto"] for ranks in (1, 2)
    )
    assert (one["passes"], one["most_segments"]) == (40, 5)
    for name in ("data", "mask", "segment_covariance", "all_segments", "proposal"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert 0 < one["mask"][1] < one["mask"][0] < one["mask"][2]
    # Disjoint masks make up for each other.
    assert one["segment_covariance"][0] < 0
    assert one["proposal"][0] == pytest.approx(1, abs=0.5)
