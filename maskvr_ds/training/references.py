"""What a configuration refers to (DeepSpeed file, corpora, tokenizers, initial model) and what must fit together.

`maskvr config` and `maskvr train` check all of it before any rank starts; the ranks open the same files again. Loads no
torch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from data_pipeline.shards import HELD_OUT, Corpus, OpenFiles, open_here
from maskvr_ds.config import ConfigError, RunConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.data.mixture import open_mixture
from maskvr_ds.data.vocabulary import tokenizer_remarks
from maskvr_ds.masking.checks import check_masking
from maskvr_ds.models.initial_folder import InitialWeights, check_vocabulary, weights_file


def settings_faults(config: RunConfig, ranks: int | None) -> list[str]:
    """What ends a run later although every value is valid by itself: the DeepSpeed file, and batches of the phases.

    ranks: of the run; None: not known, so that only the sequences of one rank are counted.
    """
    faults: list[str] = []
    with _collected(faults):
        read_deepspeed_config(deepspeed_config_path(config.deepspeed), guarded=config.divergence.enabled)
    for where, phase in _phases(config):
        with _collected(faults, where):
            phase.accumulation_steps(ranks or 1)
    return faults


def file_faults(config: RunConfig) -> tuple[list[str], list[str]]:
    """What is wrong with corpora, tokenizers and the initial model of a run that starts, and remarks about them.

    Reads manifests and the layout of shards, no tokens. A run that resumes needs neither the initial model nor the
    corpora of finished phases.
    """
    faults: list[str] = []
    remarks: dict[str, None] = {}
    first: Corpus | None = None
    folder = config.model.initialize_from
    initial: InitialWeights | None = None
    if folder is not None:
        with _collected(faults):
            weights_file(folder)
            initial = InitialWeights(folder, "")
    for where, phase in _phases(config):
        with _collected(faults, where):
            corpus, _ = open_corpora(phase)
            first = first or corpus
            check_same_tokenizer(corpus, first)
            if initial is not None:
                check_vocabulary(initial, corpus)
            remarks.update(
                dict.fromkeys(tokenizer_remarks(corpus.tokenizer_folder, corpus.manifest.special_tokens.all))
            )
    return faults, list(remarks)


def _phases(config: RunConfig) -> Iterator[tuple[str, RunConfig]]:
    for index in range(len(config.phases) or 1):
        yield f"phase {config.phases[index].name!r}: " if config.phases else "", config.phase(index)


@contextmanager
def _collected(faults: list[str], where: str = "") -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        faults.append(f"{where}{error}")


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


def check_same_tokenizer(corpus: Corpus, first: Corpus) -> None:
    """Raise ConfigError if a phase's tokenizer differs from that of the first."""
    if (theirs := corpus.manifest.tokenizer_sha256) != (ours := first.manifest.tokenizer_sha256):
        raise ConfigError(
            f"{corpus.folder}: tokenizer {theirs[:12]} differs from {ours[:12]} of {first.folder}; build the corpora "
            "of all phases with one tokenizer"
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
