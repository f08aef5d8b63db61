"""Corpora of a run: opened, verified, compared across ranks.

Collectives: object all-gathers and broadcasts at the start of a phase.
"""

import socket
from collections.abc import Sequence
from functools import partial
from typing import Any

from data_pipeline.shards import HELD_OUT, Corpus, OpenFiles, open_here
from maskvr_ds.config import ConfigError, RunConfig
from maskvr_ds.data.mixture import corpora_identity, open_mixture
from maskvr_ds.data.shared_files import NodeFiles
from maskvr_ds.masking.factory import check_masking
from maskvr_ds.runtime import distributed
from maskvr_ds.training.phases import RunPhase


def open_corpora(config: RunConfig, open_files: OpenFiles = open_here) -> tuple[Corpus, Corpus | None]:
    """Open the training corpora (as one mixture) and the held-out corpus; reads no token data. open_files: see
    `Corpus`."""
    corpus = open_mixture([(entry.path, entry.weight) for entry in config.data.corpora], open_files)
    if corpus.sequence_length > (positions := config.model.max_position_embeddings):
        folder = config.model.initialize_from
        theirs = f" of {folder}; build the corpus with --sequence-length {positions} or less" if folder else ""
        raise ConfigError(
            f"{corpus.folder}: sequences of {corpus.sequence_length} tokens exceed "
            f"model.max_position_embeddings {positions}{theirs}"
        )
    check_masking(config, corpus)
    return corpus, _open_held_out(config, corpus, open_files)


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
        if (theirs := corpus.manifest.tokenizer_sha256) != (ours := first.manifest.tokenizer_sha256):
            raise ConfigError(
                f"phase {phase.name!r}: {corpus.folder}: tokenizer {theirs[:12]} differs from {ours[:12]} of "
                f"{first.folder}; build the corpora of all phases with one tokenizer"
            )


def _open_held_out(config: RunConfig, corpus: Corpus, open_files: OpenFiles) -> Corpus | None:
    if config.evaluation.every_steps == 0:
        return None
    given = config.data.held_out_path
    paths = [given] if given else [entry.path / HELD_OUT for entry in config.data.corpora]
    if missing := next((path for path in paths if not path.exists()), None):
        raise ConfigError(
            f"{missing}: no held-out corpus; build with --held-out, set data.held_out_path, or evaluation.every_steps=0"
        )
    held_out = open_mixture([(path, 1.0) for path in paths], open_files)
    for key in ("tokenizer_sha256", "sequence_length"):
        if (theirs := getattr(held_out.manifest, key)) != (ours := getattr(corpus.manifest, key)):
            raise ConfigError(f"{paths[0]}: {key} {theirs} differs from the training corpus' {ours}")
    return held_out
