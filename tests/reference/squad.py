"""Scores of SQuAD 1.1 and 2.0, character by character and without the project's code, regular expressions or counters.

Written from the published evaluation scripts' rules: https://rajpurkar.github.io/SQuAD-explorer/
"""

from collections.abc import Sequence

_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
_ARTICLES = ("a", "an", "the")


def words(answer: str) -> list[str]:
    """Words of a normalised answer."""
    kept = [c for c in answer.lower() if c not in _PUNCTUATION]
    # Runs of letters and digits, and single other characters.
    pieces: list[str] = []
    inside = False
    for character in kept:
        if inside and character.isalnum():
            pieces[-1] += character
        else:
            pieces.append(character)
        inside = character.isalnum()
    return "".join(" " if piece in _ARTICLES else piece for piece in pieces).split()


def exact(truth: str, predicted: str) -> int:
    return int(words(truth) == words(predicted))


def overlap(truth: str, predicted: str, version: int) -> float:
    expected, found = words(truth), words(predicted)
    if version == 2 and (expected == [] or found == []):
        return float(expected == found)
    remaining = list(expected)
    same = 0
    for word in found:
        if word in remaining:
            remaining.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(found), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def question_scores(golds: Sequence[str], predicted: str, version: int) -> tuple[float, float]:
    """Exact match and F1. golds: texts of the file, none for a question of 2.0 without an answer."""
    compared = list(golds)
    if version == 2:
        compared = [gold for gold in golds if words(gold)]
        if not compared:
            compared = [""]
    return max(exact(gold, predicted) for gold in compared), max(overlap(g, predicted, version) for g in compared)
