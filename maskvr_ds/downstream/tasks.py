"""Table of the downstream tasks: columns, labels, metrics, and the published hyperparameters. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class Kind(StrEnum):
    """What a task predicts: one of several labels per text or pair, a number, a label per token, or the span of a
    context that answers a question."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"
    TOKENS = "tokens"
    SPAN = "span"


class TaskError(ValueError):
    """A task, its files or a model that cannot be evaluated on it."""


# Of Devlin et al. 2019: GLUE in section 4.1, other tasks in appendix A.3.
_GLUE_RATES = (2e-5, 3e-5, 4e-5, 5e-5)
_OTHER_RATES = (2e-5, 3e-5, 5e-5)


@dataclass(frozen=True)
class Task:
    """A task and how BERT is fine-tuned on it.

    folder: its name within a folder of GLUE tasks. texts: one or two texts per example, each with the alternative names
    of its column (GLUE's files, `datasets`). label: alternative names of the label's column. labels: in the order of
    the class indices of `datasets`; empty if they are those of the training set. dev: name of an evaluation set ->
    alternative stems of its file. train: of the training set's. header: of GLUE files without one.
    skip_damaged_rows: GLUE's own file has rows with other numbers of columns. max_length: tokens per example.
    unanswerable: there are questions without an answer. limits: minimum and maximum of the numbers of a regression.
    """

    name: str
    folder: str
    kind: Kind
    texts: tuple[tuple[str, ...], ...]
    label: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    dev: tuple[tuple[str, tuple[str, ...]], ...] = (("dev", ("dev", "validation", "valid")),)
    train: tuple[str, ...] = ("train", "eng.train")
    header: tuple[str, ...] = ()
    skip_damaged_rows: bool = False
    learning_rates: tuple[float, ...] = _GLUE_RATES
    epochs: float = 3
    batch_size: int = 32
    max_length: int = 128
    unanswerable: bool = False
    limits: tuple[float, float] | None = None

    @property
    def is_glue(self) -> bool:
        return self.name in GLUE


def _glue(
    name: str,
    folder: str,
    texts: tuple[tuple[str, ...], ...],
    label: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
) -> Task:
    return Task(name, folder, Kind.CLASSIFICATION if labels else Kind.REGRESSION, texts, label, labels, metrics)


_PAIR = (("sentence1",), ("sentence2",))
_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_COLA_HEADER = ("source", "label", "mark", "sentence")

_TABLE = (
    replace(
        _glue("cola", "CoLA", (("sentence",),), ("label",), _BINARY, ("matthews",)),
        header=_COLA_HEADER,
    ),
    _glue("sst2", "SST-2", (("sentence",),), ("label",), _BINARY, ("accuracy",)),
    _glue(
        "mrpc",
        "MRPC",
        (("#1 String", "sentence1"), ("#2 String", "sentence2")),
        ("Quality", "label"),
        _BINARY,
        ("f1", "accuracy"),
    ),
    replace(_glue("stsb", "STS-B", _PAIR, ("score", "label"), (), ("pearson", "spearman")), limits=(0.0, 5.0)),
    replace(
        _glue("qqp", "QQP", (("question1",), ("question2",)), ("is_duplicate", "label"), _BINARY, ("f1", "accuracy")),
        skip_damaged_rows=True,
    ),
    replace(
        _glue(
            "mnli",
            "MNLI",
            (("sentence1", "premise"), ("sentence2", "hypothesis")),
            ("gold_label", "label"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
        ),
        dev=(
            ("matched", ("dev_matched", "validation_matched")),
            ("mismatched", ("dev_mismatched", "validation_mismatched")),
        ),
    ),
    _glue("qnli", "QNLI", (("question",), ("sentence",)), ("label",), _ENTAILMENT, ("accuracy",)),
    _glue("rte", "RTE", _PAIR, ("label",), _ENTAILMENT, ("accuracy",)),
    _glue("wnli", "WNLI", _PAIR, ("label",), _BINARY, ("accuracy",)),
)
GLUE = {task.name: task for task in _TABLE}
_SQUAD = Task(
    "squad",
    "squad",
    Kind.SPAN,
    (("question",), ("context",)),
    ("answers",),
    (),
    ("exact_match", "squad_f1"),
    dev=(("dev", ("dev-v1.1", "dev", "validation")),),
    train=("train-v1.1", "train"),
    learning_rates=_OTHER_RATES,
    max_length=384,
)
# Hyperparameters as in section 4.3 of Devlin et al. 2019.
SQUAD = {
    "squad": _SQUAD,
    "squad_v2": replace(
        _SQUAD,
        name="squad_v2",
        metrics=("exact_match", "squad_v2_f1"),
        dev=(("dev", ("dev-v2.0", "dev", "validation")),),
        train=("train-v2.0", "train"),
        epochs=2,
        batch_size=48,
        unanswerable=True,
    ),
}
# Tasks of the user's own files, in the folder given as --data itself.
OWN = {
    "classification": Task(
        "classification",
        "",
        Kind.CLASSIFICATION,
        (("sentence", "text"),),
        ("label",),
        (),
        ("accuracy", "macro_f1"),
        learning_rates=_OTHER_RATES,
    ),
    "regression": Task(
        "regression",
        "",
        Kind.REGRESSION,
        (("sentence", "text"),),
        ("label", "score"),
        (),
        ("pearson", "spearman"),
        learning_rates=_OTHER_RATES,
    ),
    "conll": Task(
        "conll",
        "",
        Kind.TOKENS,
        (("tokens",),),
        ("ner_tags", "tags"),
        (),
        ("entity_f1",),
        dev=(("dev", ("dev", "validation", "valid", "testa", "eng.testa")),),
        learning_rates=_OTHER_RATES,
    ),
}
# Rows of `--baselines`: option -> name in the table.
LEARNING_TO_WEIGHT = "ltw"
WEIGHTED_ROWS = {
    "tf": "words, tf only",
    "information_gain": "words, information gain",
    "chi2": "words, χ²",
    "relevance_frequency": "words, relevance frequency",
    LEARNING_TO_WEIGHT: "words, learned weights",
}
GROUPS = {"glue": tuple(GLUE)}
TASKS = {**GLUE, **SQUAD, **OWN}
NAMES = (*GROUPS, *TASKS)


def resolve(names: Sequence[str], texts: Sequence[str] = (), label: str | None = None) -> list[Task]:
    """The tasks of a command line, without repetitions.

    names: of NAMES. texts: one or two columns, and label: a column, of `classification` and `regression`. Raises
    TaskError for columns without such a task.
    """
    expanded = dict.fromkeys(name for given in names for name in GROUPS.get(given, (given,)))
    chosen = [TASKS[name] for name in expanded]
    with_columns = [task.name for task in chosen if task.name in ("classification", "regression")]
    if (texts or label) and not with_columns:
        raise TaskError(
            f"--text-columns and --label-column describe files of the tasks classification and regression, not of "
            f"{', '.join(task.name for task in chosen)}"
        )
    if len(texts) > 2:
        raise TaskError(f"--text-columns {' '.join(texts)}: expected one column, or two for pairs of texts")
    return [
        replace(
            task,
            texts=tuple((column,) for column in texts) or task.texts,
            label=(label,) if label else task.label,
        )
        if task.name in with_columns
        else task
        for task in chosen
    ]
