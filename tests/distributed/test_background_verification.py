"""`data.verify: background`: a damaged shard ends the run before the next checkpoint; a healthy run is unchanged."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, free_ports
from tests.support.corpora import make_corpus

STEPS, EVERY, LATER = 12, 4, 99
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")
# Name → (update after which the shards are compared, step at which the damage is reported, rank that finds it).
DAMAGED = {
    # Known in the all-reduce of the step after, which is read one step later.
    "between checkpoints": (1, 3, 1),
    "at a checkpoint": (LATER, EVERY, 1),
    "at an asynchronous checkpoint": (LATER, EVERY, 0),
    "in the held-out corpus": (LATER, EVERY, 0),
    "on all ranks": (1, 3, 0),
}


def flip(shard: Path) -> bytes:
    """Flip the lowest bit of an id, so that ids stay below the vocabulary size; returns the former content."""
    before = shard.read_bytes()
    content = bytearray(before)
    content[len(content) // 2 & ~1] ^= 1
    shard.write_bytes(content)
    return before


def values(folder: Path, name: str, corpus: Path, verify: str = "background", **checkpoint: Any) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "evaluation": {"every_steps": EVERY},
        "checkpoint": {"every_steps": EVERY, **checkpoint},
        "data": {"path": str(corpus), "verify": verify, "held_out_path": str(corpus / "held_out")},
    }
    return configuration(folder / name, corpus, steps=STEPS, deepspeed="zero2_fp32", **sections)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Folder of the runs; what the two ranks of each act said."""
    folder = tmp_path_factory.mktemp("verified")
    good = make_corpus(folder / "good", rows=200, words=20, shard_rows=50)
    make_corpus(good / "held_out", rows=40, words=20, seed=1)
    acts = {
        "full": Act(values(folder, "full", good, "full")),
        "healthy": Act(values(folder, "healthy", good)),
        "held up": Act(values(folder, "held up", good), verify_at=LATER),
        "killed": Act(values(folder, "killed", good), kill=(None, "step", EVERY + 2)),
        "resumed": Act(values(folder, "killed", good), resume="auto"),
    }
    for name, (verify_at, _, rank) in DAMAGED.items():
        corpus = folder / f"corpus {name}"
        shutil.copytree(good, corpus)
        if "held-out" in name:
            flip(corpus / "held_out/shard-00000.arrow")
        else:
            flip(corpus / f"shard-0000{rank}.arrow")
        if "all ranks" in name:
            flip(corpus / "shard-00003.arrow")
        asynchronous = {"asynchronous": True} if "asynchronous" in name else {}
        acts[name] = Act(values(folder, name, corpus, **asynchronous), verify_at=verify_at)
    said = run_ranks(play, 2, list(acts.values()), free_ports(len(acts)), timeout=600)
    return folder, {name: [of_rank[number] for of_rank in said] for number, name in enumerate(acts)}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_ends_the_run_before_the_next_checkpoint(played: Any, name: str) -> None:
    folder, said = played
    _, step, rank = DAMAGED[name]
    file = "held_out/shard-00000" if "held-out" in name else f"shard-0000{rank}"
    fault = (
        rf"{re.escape(str(folder))}/corpus {name}/{file}\.arrow: sha256 \w+ expected, \w+ found: the file was modified "
        rf"or damaged\. Copy it again or build the corpus again\. Found at step {step}, .* no checkpoint was saved"
    )
    assert re.match(f"CorpusError: {fault}", said[name][rank]), said[name]
    assert re.match(f"RemoteError: rank {rank}: {fault}", said[name][1 - rank]), said[name]
    assert not complete_checkpoints(folder / name)


def test_healthy_runs_are_unchanged(played: Any) -> None:
    folder, said = played
    assert said["full"] == said["healthy"] == said["held up"] == ["done", "done"]
    expected = column(folder / "full", *FIGURES)
    assert len(expected) == STEPS
    saved = [path.name for path in complete_checkpoints(folder / "full")]
    for name in ("healthy", "held up"):
        assert column(folder / name, *FIGURES) == expected
        assert [path.name for path in complete_checkpoints(folder / name)] == saved


def test_killed_and_resumed_is_uninterrupted(played: Any) -> None:
    folder, said = played
    assert said["killed"] == ["killed", "killed"]
    assert said["resumed"] == ["done", "done"]
    assert column(folder / "killed", *FIGURES) == column(folder / "full", *FIGURES)


def test_restored_shards_let_the_run_continue(played: Any) -> None:
    """Damage that is found after a resume costs the steps since the checkpoint, and nothing else."""
    folder, _ = played
    corpus = folder / "corpus repaired"
    shutil.copytree(folder / "good", corpus)
    shutil.copytree(folder / "full", folder / "hurt")
    for path in complete_checkpoints(folder / "hurt")[1:]:
        shutil.rmtree(path)
    before = flip(corpus / "shard-00001.arrow")
    act = Act(values(folder, "hurt", corpus), resume="auto", verify_at=LATER)
    said = [of_rank[0] for of_rank in run_ranks(play, 2, [act], free_ports(1))]
    assert "Found at step 8, " in said[1], said
    assert [path.name for path in complete_checkpoints(folder / "hurt")] == ["step-00000004"]
    (corpus / "shard-00001.arrow").write_bytes(before)
    assert run_ranks(play, 2, [act], free_ports(1)) == [["done"], ["done"]]
    assert column(folder / "hurt", *FIGURES) == column(folder / "full", *FIGURES)
