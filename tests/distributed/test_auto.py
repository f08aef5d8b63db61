"""masking.strategy auto on real gloo ranks: ranks share one choice, the data order is unaffected, resume is exact."""

from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.metrics_file import read_events
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, metrics, train_all
from tests.support.corpora import make_corpus

STEPS, EVERY = 32, 4
# Best by measurement after 4, 8 … steps, and what is chosen; 60 sequences of 32 tokens at rate 0.2: 5 segments.
ONE, ALL, PROPOSAL = ("fully_explored", 1), ("fully_explored", 5), ("mapnet", 1)
MEASURED = [ALL, ALL, PROPOSAL, PROPOSAL, ONE, ALL, ALL]
COURSE = [ONE, ALL, ALL, PROPOSAL, ONE, ONE, ALL]
EXACT = ("step", "loss", "grad_norm", "data_digest", "mask_digest")


def train_by_course(jobs: list[tuple[dict[str, Any], str | None]], strict: bool) -> list[str | None]:
    """On a rank: `train_all` with the measurements replaced by MEASURED. strict: other ranks measure something else."""
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
            texts = run_ranks(train_all, ranks, [(measured, None), (faulty, None)])
            assert [answer[0] for answer in texts] == [None] * ranks
            assert any(
                "auto.rows 201: " in str(answer[1]) and "has only 200 rows" in str(answer[1]) for answer in texts
            )

    def values(self, name: str, ranks: int) -> dict[str, Any]:
        return configuration(
            self(name),
            self.corpus,
            steps=STEPS,
            model=NO_DROPOUT,
            masking={
                "strategy": "auto",
                "rate": 0.2,
                # By its FLOPs the network would cost half as much as this small model.
                "mapnet": {"hidden": 32, "layers": 1, "cost": 0.0},
                "auto": {"every_steps": EVERY, "rows": 5, "draws": 2, "sketch_size": 500},
            },
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


def test_choices_follow_the_measurements_and_are_logged(runs: Runs) -> None:
    expected = [(EVERY * (number + 1), *choice) for number, choice in enumerate(COURSE)]
    for name in ("course-1", "course-2", "parts"):
        assert choices(runs(name)) == expected, name
    used = [used for (used,) in column(runs("course-2"), "proposal_used")]
    # From the step after a choice up to the next choice.
    assert used == [float(16 <= step < 20) for step in range(STEPS)]


def test_data_do_not_depend_on_ranks_or_choices(runs: Runs) -> None:
    one, two = (column(runs(f"course-{ranks}"), "step", "samples", "data_digest") for ranks in (1, 2))
    assert one == two
    assert len({digest for _, _, digest in one}) == STEPS
    masks = [column(runs(f"course-{ranks}"), "mask_digest") for ranks in (1, 2)]
    # MAPNet's masks may differ: its training rounds differently.
    assert [m for i, m in enumerate(masks[0]) if not 16 <= i < 20] == [
        m for i, m in enumerate(masks[1]) if not 16 <= i < 20
    ]


def test_resume_is_exact(runs: Runs) -> None:
    """Resumed two steps after the proposal was first measured to be best, while rows are repeated five times."""
    assert column(runs("parts"), *EXACT) == column(runs("course-2"), *EXACT)


def test_measurements_do_not_depend_on_ranks(runs: Runs) -> None:
    (one,), (two,) = (
        [e for e in read_events(runs(f"measured-{ranks}") / METRICS) if e["event"] == "auto"] for ranks in (1, 2)
    )
    assert (one["passes"], one["most_segments"]) == (60, 5)
    for name in ("data", "mask", "segment_covariance", "all_segments", "proposal"):
        assert two[name] == pytest.approx(one[name], rel=1e-3), name
    assert 0 < one["mask"][1] < one["mask"][0] < one["mask"][2]
    # The errors of disjoint masks are negatively correlated.
    assert one["segment_covariance"][0] < 0
    assert one["proposal"][0] == pytest.approx(1, abs=0.5)
