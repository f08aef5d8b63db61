"""What a configuration refers to (DeepSpeed file, corpora, tokenizers, initial model) and what must fit together.

`maskvr config` and `maskvr train` check all of it before any rank starts; the ranks open the same files again. Loads no
torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from data_pipeline.hub import HubError
from data_pipeline.shards import HELD_OUT, Corpus, OpenFiles, open_here
from maskvr_ds.config import ConfigError, RunConfig, load_config, run_deepspeed_config, with_local_model
from maskvr_ds.config.deepspeed import enabled
from maskvr_ds.data.documents import check_borders
from maskvr_ds.data.documents import remarks as document_remarks
from maskvr_ds.data.mixture import members, open_mixture, open_training_corpus
from maskvr_ds.data.permutation import KeyedPermutation
from maskvr_ds.data.vocabulary import tokenizer_remarks
from maskvr_ds.masking.checks import check_maskable, check_masking
from maskvr_ds.models.initial_folder import InitialWeights, for_corpus, weights_files
from maskvr_ds.run_folder.marks import output_fault
from maskvr_ds.telemetry.monitors import check_monitors
from maskvr_ds.training.length import remarks as length_remarks
from maskvr_ds.training.length import with_steps

# Part of the measurement: with another seed, held-out figures would not be comparable.
HELD_OUT_SEED = 0


@dataclass(frozen=True)
class CheckedRun:
    """A valid configuration, and what is wrong with what it refers to: faults of settings and of files, and remarks.

    config: model.initialize_from is a folder, and training.steps are known, if nothing is wrong with the files.
    """

    config: RunConfig
    settings: list[str]
    files: list[str]
    remarks: list[str]


def check_run(path: str, assignments: Sequence[str], ranks: int | None, *, files: bool = True) -> CheckedRun:
    """Everything that can be known of a run on this machine. Names on a hub are resolved. Call in one process.

    path, assignments: as for `load_config`. ranks: of the run, if known. files: False: corpora, tokenizers and the
    initial model are not looked at. Raises ConfigError for an invalid configuration.
    """
    unresolved: list[str] = []
    if files:
        try:
            assignments = with_local_model(path, assignments)
        except HubError as error:
            unresolved.append(str(error))
    config = load_config(path, assignments)
    settings, found, remarks = settings_faults(config, ranks), list[str](), list[str]()
    if files:
        found, remarks = file_faults(config)
        if not found:
            config = with_steps(config)
    # Of a name that was not resolved, the fault is known already.
    found = [line for line in found if not (unresolved and line.startswith("model.initialize_from "))]
    return CheckedRun(config, settings, unresolved + found, remarks)


def settings_faults(config: RunConfig, ranks: int | None) -> list[str]:
    """Faults that would end a run later although every value is valid: the DeepSpeed file, what transformers says of
    the model's settings, and batches of the phases.

    ranks: of the run; None: not known, so that only the sequences of one rank are counted.
    """
    faults: list[str] = []
    with _collected(faults):
        run_deepspeed_config(config)
    with _collected(faults):
        _check_architecture(config)
    for where, phase in config.named_phases():
        with _collected(faults, where):
            phase.accumulation_steps(ranks or 1)
    return faults


def file_faults(config: RunConfig, *, monitors: bool = True) -> tuple[list[str], list[str]]:
    """What is wrong with corpora, tokenizers, initial model and output_dir of a run that starts, and remarks on them.

    monitors: also look for their packages; False if the ranks have another environment than this process.
    Reads manifests, the layout of shards, and few tokens (`check_maskable`). A run that resumes needs neither the
    initial model nor the corpora of finished phases.
    """
    faults: list[str] = []
    remarks: dict[str, None] = {}
    first: Corpus | None = None
    folder = config.model.initialize_from
    initial: InitialWeights | None = None
    # None: not known; its fault is reported, or is that of a corpus.
    resolved: RunConfig | None = None
    with _collected(faults):
        resolved = with_steps(config)
    if folder is not None:
        with _collected(faults):
            weights_files(folder)
            initial = InitialWeights(folder, "")
    if (fault := output_fault(config.output_dir, "auto")) is not None:
        faults.append(fault)
    if monitors:
        with _collected(faults):
            check_monitors(config.monitor)
    for where, phase in (resolved or config).named_phases():
        with _collected(faults, where):
            corpus, held_out = open_corpora(phase)
            first = first or corpus
            check_same_tokenizer(corpus, first)
            if initial is not None:
                for_corpus(initial, corpus, config.model.vocabulary)
            if resolved is not None:
                remarks.update(dict.fromkeys(f"{where}{remark}" for remark in length_remarks(phase, corpus)))
            remarks.update(dict.fromkeys([*corpus_remarks(phase, corpus, held_out), *_dropout_remarks(phase)]))
    return list(dict.fromkeys(faults)), list(remarks)


def _check_architecture(config: RunConfig) -> None:
    """Raise ConfigError if transformers refuses the section, attention within documents, or late mask tokens. BERT's
    own fields are checked without it; a login node may lack it, or torch, and the ranks check again."""
    model, pair_head = config.model, config.pair_objective is not None
    phases = [phase for _, phase in config.named_phases()]
    documents = any(phase.data.attention == "documents" for phase in phases)
    late_layer, setting = max(
        *((phase.masking.late_layer, "masking.late_layer") for phase in phases),
        *((layer, "masking.auto.late_layers") for phase in phases for layer in phase.masking.auto.late_layers),
        (0, ""),
    )
    missing = any(find_spec(package) is None for package in ("transformers", "torch"))
    if missing or (model.architecture == "bert" and not model.settings):
        return
    from maskvr_ds.models.architectures import check_settings

    check_settings(model, pair_head=pair_head, documents=documents, late_layer=late_layer, late_setting=setting)


@contextmanager
def _collected(faults: list[str], where: str = "") -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        faults.append(f"{where}{error}")


def open_corpora(config: RunConfig, open_files: OpenFiles = open_here) -> tuple[Corpus, Corpus | None]:
    """Open the training corpora (as one mixture) and the held-out corpus, and check that they have tokens to predict.

    open_files: see `Corpus`. Raises ConfigError and CorpusError.
    """
    corpus = open_training_corpus(config.data, open_files)
    if fault := config.model.row_fault(corpus.sequence_length, corpus.manifest.special_tokens.pad):
        raise ConfigError(f"{corpus.folder}: {fault}")
    check_masking(config, corpus)
    for one in members(corpus):
        check_objectives(config, one)
        check_maskable(one, range(one.rows), "training", "build it with a tokenizer that fits the text")
    if config.data.attention == "documents":
        check_borders(corpus)
    return corpus, _open_held_out(config, corpus, open_files)


def corpus_remarks(config: RunConfig, corpus: Corpus, held_out: Corpus | None) -> list[str]:
    """What is not wrong with the corpora of a phase, but should be known, one sentence each."""
    found = tokenizer_remarks(corpus.tokenizer_folder, corpus.manifest.special_tokens.all)
    if config.data.attention == "documents":
        found += document_remarks(corpus)
    # A held-out corpus is written by the same command as the corpus: one remark serves for both.
    return [*found, *(corpus.remarks or (() if held_out is None else held_out.remarks))]


def _dropout_remarks(config: RunConfig) -> list[str]:
    """What GPUs will refuse, which may be others than this machine's."""
    setting, dropout = config.model.attention_dropout
    if config.data.attention == "rows" or not dropout:
        return []
    try:
        halves = [name for name in ("bf16", "fp16") if enabled(run_deepspeed_config(config), name)]
    except ConfigError:  # among the settings' faults
        return []
    if not halves:
        return []
    return [
        f"{setting} is {dropout:g}: attention within documents (data.attention) has no dropout on GPUs in {halves[0]}, "
        "where the run will end before its first step; set it to 0"
    ]


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
    for key in ("tokenizer_sha256", "vocab_size", "special_tokens", "sequence_length"):
        if (theirs := getattr(held_out.manifest, key)) != (ours := getattr(corpus.manifest, key)):
            raise ConfigError(f"{paths[0]}: {key} {theirs} differs from the training corpus' {ours}")
    if (pair := config.pair_objective) is not None and "pair_label" not in held_out.manifest.columns:
        raise ConfigError(
            f"{paths[0]}: objectives.{pair} is set, and this held-out corpus has no pair labels; set "
            f"data.held_out_path to one packed with {pair}, or evaluation.every_steps=0"
        )
    if config.data.attention == "documents":
        check_borders(held_out)
    rows = held_out_rows(held_out, config.evaluation.rows)
    more = "raise evaluation.rows, " if len(rows) < held_out.rows else ""
    remedy = f"{more}set data.held_out_path to another corpus, or set evaluation.every_steps=0"
    check_maskable(held_out, rows, "evaluation", remedy)
    return held_out


def check_objectives(config: RunConfig, corpus: Corpus) -> None:
    """Raise ConfigError if the corpus has labels of sentence pairs that no objective uses, or none for an objective."""
    packing, pair = corpus.manifest.packing, config.pair_objective
    labelled = "pair_label" in corpus.manifest.columns
    if pair is not None and (not labelled or packing != pair):
        found = f"has the pairs of {packing}" if labelled else "has no pair labels"
        remedy = f"set objectives to [mlm, {packing}]" if labelled else "set objectives to [mlm]"
        raise ConfigError(
            f"{corpus.folder}: objectives.{pair} is set, and the corpus {found} (packing {packing}); pack it with "
            f"--packing {pair}, or {remedy}"
        )
    if labelled and config.objectives is None:
        raise ConfigError(
            f"{corpus.folder}: has labels of sentence pairs (packing {packing}), and no objective is set for them; set "
            f"objectives to [mlm, {packing}] to train on them, or to [mlm] for masked tokens only"
        )


def held_out_rows(held_out: Corpus, most: int) -> NDArray[np.int64]:
    """Numbers of the rows that are evaluated: the first `most`, or all, in a keyed order that is the same for all runs,
    so that their figures are comparable: int64 [·]."""
    return KeyedPermutation(held_out.rows, HELD_OUT_SEED)(np.arange(min(most, held_out.rows)))
