"""Metrics of single evaluations by scikit-learn and scipy, and entity F1 by another reading of conlleval's rules."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import scipy.stats
from sklearn import metrics


def _correlation(name: str) -> Callable[[Sequence[float], Sequence[float]], float]:
    function = getattr(scipy.stats, name)

    def value(truth: Sequence[float], predicted: Sequence[float]) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
            found = function(truth, predicted).statistic
        return 0.0 if found != found else float(found)

    return value


REFERENCE: dict[str, Callable[..., float]] = {
    "accuracy": metrics.accuracy_score,
    "f1": lambda t, p: metrics.f1_score(t, p, pos_label=1, average="binary", zero_division=0.0),
    "macro_f1": lambda t, p: metrics.f1_score(t, p, average="macro", zero_division=0.0),
    "matthews": metrics.matthews_corrcoef,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}

# conlleval.pl: an entity ends between two tags, or starts there, for these pairs of prefixes; S as in IOBES.
_ENDS = {"BB", "BO", "BS", "IB", "IO", "IS", "EE", "EI", "EO", "EB", "ES", "SB", "SI", "SE", "SO", "SS"}
_STARTS = {"BB", "IB", "OB", "OI", "OE", "EE", "EI", "EB", "SB", "SI", "SE"} | {"BS", "IS", "OS", "ES", "SS"}


def entity_counts(truth: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    """Correct, true and predicted entities of a sentence, counted in one pass as conlleval does."""
    correct = in_truth = in_predicted = 0
    running = False
    last_t = last_p = "O"
    for t, p in zip([*truth, "O"], [*predicted, "O"], strict=True):
        end_t, end_p = _between(last_t, t, _ENDS), _between(last_p, p, _ENDS)
        start_t, start_p = _between(last_t, t, _STARTS), _between(last_p, p, _STARTS)
        if running and (end_t or end_p):
            correct += end_t and end_p
            running = False
        in_truth, in_predicted = in_truth + start_t, in_predicted + start_p
        if start_t and start_p and t[2:] == p[2:]:
            running = True
        last_t, last_p = t, p
    return correct, in_truth, in_predicted


def _between(last: str, tag: str, pairs: set[str]) -> bool:
    if last[0] + tag[0] in pairs:
        return True
    changed = last[2:] != tag[2:]
    if pairs is _ENDS:
        return changed and last != "O"
    return changed and tag != "O"


def entity_f1(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Any:
    counts = [entity_counts(t, p) for t, p in zip(truth, predicted, strict=True)]
    correct, in_truth, in_predicted = (sum(column) for column in zip(*counts, strict=True))
    return 2 * correct / (in_truth + in_predicted) if in_truth + in_predicted else 0.0


REFERENCE["entity_f1"] = entity_f1
