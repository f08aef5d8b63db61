"""One run killed repeatedly at random points, one rank or all, on changing numbers of ranks."""

import random
from pathlib import Path

import pytest

from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.training import NO_DROPOUT, column, configuration, free_ports, metrics
from tests.support.corpora import make_corpus

EVERY = 3


def test_resume_after_random_kills_is_exact(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    corpus, note = make_corpus(tmp_path / "corpus", rows=200, words=20), tmp_path / "note"
    chance = random.Random(20)
    full = request.config.getoption("--whole-survival")
    # A killed act makes at most 12 of them.
    steps = 120 if full else 36

    def values(name: str, stage: int) -> dict[str, object]:
        return configuration(
            tmp_path / name,
            corpus,
            steps=steps,
            model=NO_DROPOUT,
            evaluation={"every_steps": 0},
            checkpoint={"every_steps": EVERY, "keep_last": 2},
            deepspeed=f"zero{stage}_fp32",
        )

    def kills(number: int, stage: int, ranks: int) -> list[Act]:
        acts = []
        for _ in range(number):
            place, most = chance.choice((("update", 8), ("save", 4), ("save", 4)))
            whom = chance.choice((None, *range(ranks)))
            kill = (whom, place, chance.randint(1, most))
            acts.append(Act(values("killed", stage), "auto", kill=kill, note=note, ranks=ranks))
        return acts

    counts = (9, 4, 5) if full else (1, 0, 1)
    in_conversion = [
        Act(values("killed", stage), "auto", kill=(rank, "convert", 0), note=note, ranks=ranks)
        for stage, rank, ranks in ((3, None, 1), (1, 0, 2))
    ]
    acts = [Act(values("uninterrupted", 2)), *kills(counts[0], 2, 2), in_conversion[0], *kills(counts[1], 3, 1)]
    acts += [in_conversion[1], *kills(counts[2], 1, 2), Act(values("killed", 1), "auto", note=note)]
    said = run_ranks(play, 2, acts, free_ports(len(acts)), timeout=3600)
    killed = sum("killed" in of_act for of_act in zip(*said, strict=True))
    assert killed == sum(counts) + 2, said
    assert [rank[-1] for rank in said] == ["done", "done"]
    lost = [int(line.split()[0]) - int(line.split()[1]) for line in note.read_text().splitlines()]
    print(f"{killed} kills, steps repeated: {lost}")
    assert max(lost) <= EVERY
    figures = ("step", "samples", "lr", "data_digest", "mask_digest")
    assert column(tmp_path / "killed", *figures) == column(tmp_path / "uninterrupted", *figures)
    for ours, theirs in zip(metrics(tmp_path / "killed"), metrics(tmp_path / "uninterrupted"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
