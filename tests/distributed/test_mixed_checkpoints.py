"""Files of another run in a checkpoint whose checkpoint.json lists them: their hashes agree, and a resume refuses."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.layout import MANIFEST, PROBE, WEIGHTS
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, train_all
from tests.support.corpora import make_corpus

RUNS: dict[str, int] = {"zero0_fp32": 1, "zero2_fp32": 2, "zero3_bf16": 2}


def take(pattern: str) -> Callable[[Path, Path], object]:
    """Copy files of the other run's checkpoint that match."""

    def copy(folder: Path, other: Path) -> None:
        paths = sorted(other.glob(pattern))
        assert paths
        for path in paths:
            shutil.copyfile(path, folder / path.name)

    return copy


def take_all_but_the_probe(folder: Path, other: Path) -> None:
    take("*.pt")(folder, other)
    take(WEIGHTS)(folder, other)


MIXED = r"\*\.pt\) hold other weights than weights\.safetensors .* Remove this folder to resume from the previous"
# Run -> (what is mixed, ranks that resume, the message).
CASES: list[tuple[str, Callable[[Path, Path], object], int, str]] = [
    ("zero0_fp32", take("*.pt"), 1, MIXED),
    ("zero0_fp32", take(WEIGHTS), 1, MIXED),
    ("zero0_fp32", take(PROBE), 1, r"logits on the stored probe differ by .* from those in probe\.safetensors"),
    ("zero0_fp32", take_all_but_the_probe, 1, r"logits on the stored probe differ by"),
    ("zero2_fp32", take("*.pt"), 2, MIXED),
    ("zero2_fp32", take("zero_pp_rank_1_*optim_states.pt"), 2, MIXED),
    ("zero2_fp32", take("mp_rank_00_model_states.pt"), 2, MIXED),
    ("zero2_fp32", take("*optim_states.pt"), 1, MIXED),  # converted
    ("zero3_bf16", take("*rank_1_*optim_states.pt"), 2, MIXED),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NAME and NAME-other: runs of 4 steps that differ in their seeds; NAME-N: copies with files mixed by CASES[N],
    resumed."""
    folder = tmp_path_factory.mktemp("mixed")
    corpus = make_corpus(folder / "corpus", rows=60, words=20)
    for ranks in (1, 2):
        jobs = [
            (values(folder, name, corpus, 4, seed, deepspeed), None)
            for deepspeed, on in RUNS.items()
            if on == ranks
            for name, seed in ((deepspeed, 1), (f"{deepspeed}-other", 2))
        ]
        assert run_ranks(train_all, ranks, jobs) == [[None] * len(jobs)] * ranks
    return folder


def values(folder: Path, name: str, corpus: Path, steps: int, seed: int, deepspeed: str) -> dict[str, Any]:
    sections: dict[str, Any] = {"schedule": {"warmup_steps": 1}, "evaluation": {"every_steps": 0}}
    sections["batch"] = {"global_size": 12, "micro_size": 6}
    return configuration(folder / name, corpus, steps=steps, seed=seed, deepspeed=deepspeed, **sections)


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, str | None]:
    """Copy of a run -> how its resume ended on rank 0; one launch per number of ranks."""
    found: dict[str, str | None] = {}
    for ranks in (1, 2):
        jobs = []
        for copy, name, mix in copies(ranks):
            shutil.copytree(folder / name, folder / copy)
            checkpoint, other = (checkpoints.complete_checkpoints(folder / run)[-1] for run in (copy, f"{name}-other"))
            mix(checkpoint, other)
            relist(checkpoint)
            jobs.append((values(folder, copy, folder / "corpus", 5, 1, name), "auto"))
        answers = run_ranks(train_all, ranks, jobs)
        for answer in answers:
            assert [a is None for a in answer] == [a is None for a in answers[0]]
        found |= dict(zip([copy for copy, _, _ in copies(ranks)], answers[0], strict=True))
    return found


def copies(ranks: int) -> list[tuple[str, str, Callable[[Path, Path], object]]]:
    """(copy, run, what is mixed) of the cases on so many ranks, and an intact copy of each of their runs."""
    found = [(f"{case[0]}-{number}", *case[:2]) for number, case in enumerate(CASES) if case[2] == ranks]
    intact = sorted({name for _, name, _ in found})
    return found + [(f"{name}-intact-{ranks}", name, lambda *_: None) for name in intact]


def relist(checkpoint: Path) -> None:
    """Write checkpoint.json again, with the hashes of the files as they are now."""
    state = checkpoints.read_state(checkpoint)
    (checkpoint / MANIFEST).unlink()
    checkpoints.write_manifest(checkpoint, vars(state))
    assert not checkpoints.faults(checkpoint)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_mixed_files_are_refused(number: int, outcomes: dict[str, str | None], folder: Path) -> None:
    name, _, _, message = CASES[number]
    found = outcomes[f"{name}-{number}"] or ""
    assert re.search(message, found)
    assert str(folder / f"{name}-{number}" / "checkpoints" / "step-00000004") in found
    assert len(column(folder / f"{name}-{number}", "step")) == 4


def test_intact_ones_are_not(outcomes: dict[str, str | None], folder: Path) -> None:
    intact = [name for name in outcomes if "intact" in name]
    assert len(intact) == 4
    for name in intact:
        assert outcomes[name] is None
        assert len(column(folder / name, "step")) == 5
