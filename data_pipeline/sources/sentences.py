"""Language-independent sentence splitting.

`punctuation`: a sentence ends after . ! ? … and their equivalents in other scripts, plus closing quotes and brackets,
if followed by white space and then anything but a lower-case letter (which excludes most abbreviations); 。！？ need no
white space. It also ends at an empty line. `line`: each line is a sentence, as in the input of the original BERT.
"""

from __future__ import annotations

import re

_CLOSING = "[\"'”’»」』）)\\]]*+"
_ENDS = re.compile(
    f"[.!?…।؟۔։።]{_CLOSING}\\s+(?=\\S)|[。！？｡][。！？｡.!?…]*+{_CLOSING}\\s*(?=\\S)|\\n[ \\t]*\\n\\s*(?=\\S)"
)
_ABBREVIATING = ".!?…"
_LINE = re.compile(r"\n\s*(?=\S)")
# Characters of context that a piece needs from the previous one.
TAIL = 16


def sentence_starts(text: str, mode: str, before: str) -> list[int]:
    """Ascending character offsets in `text` at which sentences start.

    before: the last TAIL characters of the document before this piece, "" for the first piece, which starts a sentence.
    """
    rule = _LINE if mode == "line" else _ENDS
    base = len(before)
    joined = before + text
    starts = [] if before else [len(text) - len(text.lstrip())]
    # No sentence starts in white space at the end; searching there would take time quadratic in its length.
    for match in rule.finditer(joined, 0, len(joined.rstrip())):
        at = match.end()
        if at < base or (match[0][0] in _ABBREVIATING and joined[at].islower()):
            continue
        if at - base not in starts[-1:]:
            starts.append(at - base)
    return starts
