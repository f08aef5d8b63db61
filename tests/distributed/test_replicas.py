"""A bit that flips in one rank's copy of a weight ends the run before the next checkpoint, and the rank is named."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from maskvr_ds.engine.replicas import _describe, bits_hash
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from tests.distributed.faults import Act, play
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, configuration, free_ports, metrics
from tests.support.corpora import make_corpus

RANKS, STEPS, EVERY = 3, 8, 4
# At ZeRO 0 a copy stays wrong; from ZeRO 1 on, the next update replaces all weights.
FLIPS = {
    "zero0_fp32": (EVERY + 1, 2),
    "zero2_fp32": (2 * EVERY, 1),
    "zero3_fp32": (2 * EVERY, 2),
    "zero2_bf16": (2 * EVERY, 0),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    """Folder of the runs; what the ranks of each said."""
    folder = tmp_path_factory.mktemp("replicas")
    corpus = make_corpus(folder / "corpus", rows=200, words=20)

    def act(name: str, deepspeed: str, flip: tuple[int, int] | None = None, **replicas: Any) -> Act:
        sections = {"evaluation": {"every_steps": 0}, "checkpoint": {"every_steps": EVERY}, "replicas": replicas}
        values = configuration(folder / name, corpus, steps=STEPS, deepspeed=deepspeed, **sections)
        return Act(values, flip=flip, ranks=RANKS)

    acts = {f"{name} flipped": act(f"{name} flipped", name, flip) for name, flip in FLIPS.items()}
    acts |= {name: act(name, name, every_steps=1) for name in FLIPS}
    acts["found early"] = act("found early", "zero0_fp32", (2, 1), every_steps=3)
    acts["off"] = act("off", "zero0_fp32", (2, 1), enabled=False)
    said = run_ranks(play, RANKS, list(acts.values()), free_ports(len(acts)), timeout=600)
    return folder, {name: [of_rank[number] for of_rank in said] for number, name in enumerate(acts)}


@pytest.mark.parametrize("name", FLIPS)
def test_a_flipped_bit_is_found_before_the_next_checkpoint(played: Any, name: str) -> None:
    folder, said = played
    _, rank = FLIPS[name]
    for text in said[f"{name} flipped"]:
        assert text.startswith("ReplicaError: step 8: "), text
        assert f" on rank {rank} ({socket.gethostname()}) unlike those on rank {int(rank == 0)}" in text
        assert "no majority" not in text
    assert [path.name for path in complete_checkpoints(folder / f"{name} flipped")] == ["step-00000004"]
    assert len(metrics(folder / f"{name} flipped")) in (STEPS - 1, STEPS)


def test_equal_copies_are_no_fault_and_comparing_them_changes_nothing(played: Any) -> None:
    folder, said = played
    for name in FLIPS:
        assert said[name] == ["done"] * RANKS, name
    assert column(folder / "zero2_fp32", "step", "mask_digest") == column(folder / "zero0_fp32", "step", "mask_digest")


def test_comparisons_between_checkpoints_and_none_at_all(played: Any) -> None:
    folder, said = played
    assert all(text.startswith("ReplicaError: step 3: ") for text in said["found early"]), said["found early"]
    assert not complete_checkpoints(folder / "found early")
    assert said["off"] == ["done"] * RANKS


def test_hash_of_bits() -> None:
    """Of every bit, of the order, of any type and size; the same for a view of the same values."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        values = torch.arange(300, dtype=torch.float32).to(dtype)
        first = int(bits_hash(values))
        assert first == int(bits_hash(values.view(20, 15)))
        assert first == int(bits_hash(torch.stack([values, values], 1)[:, 0]))
        swapped = values.clone()
        swapped[[7, 9]] = swapped[[9, 7]]
        assert int(bits_hash(swapped)) != first
        bits = values.clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
        for bit in range(8 * values.element_size() - 1):
            bits[11] ^= 1 << bit
            assert int(bits_hash(bits.view(dtype))) != first, (dtype, bit)
            bits[11] ^= 1 << bit
    assert int(bits_hash(torch.tensor([0.0]))) != int(bits_hash(torch.tensor([-0.0])))
    assert int(bits_hash(torch.tensor([]))) == 0


def test_hash_does_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = int(bits_hash(values))
    monkeypatch.setattr("maskvr_ds.engine.replicas._CHUNK", 64)
    assert int(bits_hash(values)) == whole


def test_of_two_ranks_either_may_be_wrong() -> None:
    text = _describe(7, [3, 4], [[1, 2], [1, 5]], ["first", "second"], ["h1", "h2"])
    assert text.startswith("step 7: second on rank 1 (h2) unlike those on rank 0 (h1)")
    assert "there is no majority, so the fault may be on either side" in text
    text = _describe(7, [3, 4, 3, 5], [[1], [2], [1], [3]], ["first"], ["h1", "h2", "h1", "h2"])
    assert "first on rank 1 (h2), rank 3 (h2) unlike those on rank 0 (h1)" in text
