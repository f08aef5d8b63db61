"""Shared parts of the benchmarks: a synthetic corpus and rates per CPU-second."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch

from data_pipeline.shards import Manifest, SpecialTokens, write_manifest, write_shard

VOCABULARY = 30_522
SPECIAL = SpecialTokens(pad=0, unk=100, cls=101, sep=102, mask=103, all=(0, 100, 101, 102, 103))
FIRST_ORDINARY = 104
_ROUNDS = 5


def make_corpus(folder: Path, *, rows: int, sequence_length: int) -> Path:
    """Write a corpus whose rows are consecutive ids from a random start, so that a model can learn them."""
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")
    random = np.random.default_rng(0)
    ordinary = 2_000
    ids = (random.integers(0, ordinary, (rows, 1)) + np.arange(sequence_length)) % ordinary + FIRST_ORDINARY
    ids = ids.astype(np.uint16)
    ids[:, 0], ids[:, -1] = SPECIAL.cls, SPECIAL.sep
    shards = tuple(
        write_shard(folder, f"shard-{i:05d}.arrow", part, np.ones(len(part), dtype=bool))
        for i, part in enumerate(np.array_split(ids, 4))
    )
    manifest = Manifest(
        schema_version=1,
        tokenizer_sha256=sha256(b"{}").hexdigest(),
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        sequence_length=sequence_length,
        seed=0,
        packing="full_sequences",
        rows=rows,
        tokens=ids.size,
        documents=rows,
        sources=(),
        shards=shards,
    )
    write_manifest(folder, manifest)
    return folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch with a single CPU thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rows_per_cpu_second(round_: Callable[[], int]) -> dict[str, float]:
    """Minimum, median and maximum rate over _ROUNDS calls of `round_`, which returns its number of rows.

    CPU time is that of all threads of the process; a first call is warm-up.
    """
    round_()
    rates = []
    for _ in range(_ROUNDS):
        start = time.process_time()
        rows = round_()
        rates.append(rows / (time.process_time() - start))
    return {
        "rows_per_cpu_second_min": min(rates),
        "rows_per_cpu_second_median": statistics.median(rates),
        "rows_per_cpu_second_max": max(rates),
    }
