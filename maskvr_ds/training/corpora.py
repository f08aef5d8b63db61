"""Corpora of a run: opened, verified, compared across ranks.

Collectives: object all-gathers and broadcasts at the start of a phase.
"""

import logging
import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError
from maskvr_ds.data.mixture import corpora_identity
from maskvr_ds.data.shared_files import NodeFiles
from maskvr_ds.runtime import distributed
from maskvr_ds.training.phases import RunPhase
from maskvr_ds.training.references import check_same_tokenizer, corpus_remarks, open_corpora

logger = logging.getLogger(__name__)


def open_and_verify(phase: RunPhase) -> tuple[Corpus, Corpus | None]:
    """`open_corpora`, with each shard opened once per node and verified according to data.verify, once per job, the
    work divided among the ranks. Collective: call on all ranks."""
    config, rank, world_size = phase.config, distributed.rank(), distributed.world_size()
    files = NodeFiles(distributed.gather_objects, rank)

    def open_phase() -> tuple[Corpus, Corpus | None]:
        with files:
            corpus, held_out = open_corpora(config, files.open)
        if config.data.verify == "full":
            for opened in (corpus, held_out):
                if opened is not None:
                    opened.verify(range(rank, len(opened.manifest.shards), world_size))
        if rank == 0:
            for remark in corpus_remarks(config, corpus, held_out):
                logger.warning("%s", remark)
        return corpus, held_out

    return distributed.run_collectively(partial(phase.naming, open_phase))


def check_same_corpora(corpora: Sequence[Corpus | None]) -> None:
    """Raise ConfigError if a rank sees other corpora under these paths than rank 0. Collective: call on all ranks.

    Each of them may be intact, but the ranks would train on a mixture of both. Collectives: one broadcast, one object
    all-gather.
    """
    found = [None if corpus is None else _fingerprint(corpus) for corpus in corpora]
    expected = distributed.broadcast_object((socket.gethostname(), found))

    def compare() -> None:
        for corpus, ours, theirs in zip(corpora, found, expected[1], strict=True):
            if ours != theirs and corpus is not None:
                raise ConfigError(
                    f"{corpus.folder}: rank {distributed.rank()} on {socket.gethostname()} sees another manifest there "
                    f"than rank 0 on {expected[0]}; all nodes must see the same corpus: copy it again, or share it"
                )

    distributed.run_collectively(compare)


def _fingerprint(corpus: Corpus) -> tuple[str, int, dict[str, Any]]:
    return corpus.manifest.tokenizer_sha256, corpus.manifest.sequence_length, corpora_identity(corpus)


def check_corpora(phases: Sequence[RunPhase]) -> None:
    """Open the corpora of all phases, so that faults show before the first one and not when a phase starts.

    Raises ValueError naming the phase, also if its tokenizer differs from that of the first.
    """
    first: Corpus | None = None
    for phase in phases:
        corpus, _ = phase.naming(partial(open_corpora, phase.config))
        first = first or corpus
        phase.naming(partial(check_same_tokenizer, corpus, first))
