"""Reading of questions: the JSON that SQuAD 1.1 and 2.0 are published as, and rows of `datasets`.

An answer is a text and its offset in the context, in characters (Unicode code points). Whether the text is there is not
checked here: published files have answers that are not, and these still count in scoring.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskvr_ds.downstream.examples import Split
from maskvr_ds.downstream.tasks import TaskError

Answers = tuple[tuple[str, int], ...]


def read_published(path: Path, text: str) -> Split:
    """Questions of a file of SQuAD: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}.

    Raises TaskError naming the file and the first entry of another form.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: is not JSON ({error})") from None
    check_unicode(text, content, str(path))
    texts: list[tuple[str, ...]] = []
    labels: list[Answers] = []
    for where, article in _entries(content, "data", str(path)):
        for where_, paragraph in _entries(article, "paragraphs", where):
            context = paragraph.get("context")
            for place, question in _entries(paragraph, "qas", where_):
                labels.append(read_answers(question.get("question"), context, question.get("answers"), place))
                texts.append((str(question["question"]), str(context)))
    return Split(tuple(texts), tuple(labels))


def check_unicode(text: str, content: Any, where: str) -> None:
    """Raise TaskError for a lone surrogate, which JSON can write as an escape and no tokenizer can read.

    text: the JSON. content: what it says.
    """
    if "\\ud" not in text.lower():
        return
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):04x}"
        raise TaskError(
            f"{where}: {escape} is half of a surrogate pair, and no Unicode text; remove it, or write both halves"
        ) from None


def _entries(parent: Any, key: str, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    entries = parent.get(key) if isinstance(parent, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TaskError(
            f"{where}: expected a list of objects as {key!r}: a file of SQuAD has data, paragraphs (with a context) "
            "and qas (with question and answers)"
        )
    for i, entry in enumerate(entries):
        yield f"{where}, {key} {i}", entry


def read_answers(question: Any, context: Any, found: Any, where: str) -> Answers:
    """The different answers of a question, in their order; none if it has no answer.

    found: list of {"text", "answer_start"}, as published, or {"text": […], "answer_start": […]}, as in `datasets`.
    Raises TaskError for another form, or if question or context is no text.
    """
    if not isinstance(question, str) or not isinstance(context, str):
        raise TaskError(f"{where}: expected text as question and context")
    if isinstance(found, dict):
        texts, starts = found.get("text"), found.get("answer_start")
    elif isinstance(found, list) and all(isinstance(answer, dict) for answer in found):
        texts, starts = ([answer.get(key) for answer in found] for key in ("text", "answer_start"))
    else:
        texts = starts = None
    if (
        not isinstance(texts, list)
        or not isinstance(starts, list)
        or len(texts) != len(starts)
        or not all(isinstance(text, str) for text in texts)
        or not all(isinstance(start, int) and not isinstance(start, bool) for start in starts)
    ):
        raise TaskError(f"{where}: expected answers with a text and a number as answer_start each")
    return tuple(dict.fromkeys(zip(texts, starts, strict=True)))
