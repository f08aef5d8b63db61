"""Where sentences begin, by rules that know no language.

`punctuation`: a sentence ends at . ! ? … or their like in other scripts, with what closes behind them (quotes,
brackets), where white space follows and then anything but a small letter (that spares most abbreviations); 。！？ need
no white space; and at an empty line. `line`: every line is one, as in the original BERT's input.
"""

from __future__ import annotations

import re

_CLOSING = "[\"'”’»」』）)\\]]*+"
_ENDS = re.compile(
    f"[.!?…।؟۔։።]{_CLOSING}\\s+(?=\\S)|[。！？｡][。！？｡.!?…]*+{_CLOSING}\\s*(?=\\S)|\\n[ \\t]*\\n\\s*(?=\\S)"
)
_ABBREVIATING = ".!?…"
_LINE = re.compile(r"\n\s*(?=\S)")
# What a piece must know of the one before it.
TAIL = 16


def sentence_starts(text: str, mode: str, before: str) -> list[int]:
    """Characters of `text` at which a sentence begins, ascending.

    before: the last TAIL characters of the document before this piece, "" at its beginning, where a sentence begins.
    """
    rule = _LINE if mode == "line" else _ENDS
    base = len(before)
    joined = before + text
    starts = [] if before else [len(text) - len(text.lstrip())]
    for match in rule.finditer(joined):
        at = match.end()
        if at < base or (match[0][0] in _ABBREVIATING and joined[at].islower()):
            continue
        if at - base not in starts[-1:]:
            starts.append(at - base)
    return starts
