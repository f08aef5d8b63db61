"""Trial of an exported folder as its users call it: transformers' fill-mask pipeline, and a text that is too long."""

import math
from pathlib import Path

from transformers import AutoTokenizer, pipeline

# A prompt has a few tokens before and after its mask.
_CONTEXT = 8
_SHOWN = 3


class CheckError(ValueError):
    """The exported folder does not do what its users expect."""


def check_fill_mask(folder: Path, input_ids: list[int], position: int, positions: int) -> str:
    """Run fill-mask on a part of a training row and on a text longer than the model; returns prompt and predictions.

    input_ids: a row. position: of a token in it, which is replaced by the mask. positions: longest input of the model.
    Raises CheckError naming what failed.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.mask_token is None:
        raise CheckError(f"{folder}: the tokenizer has no mask token; set mask_token in its tokenizer_config.json")
    special = set(tokenizer.all_special_ids)
    before = [i for i in input_ids[max(0, position - _CONTEXT) : position] if i not in special]
    after = [i for i in input_ids[position + 1 : position + 1 + _CONTEXT] if i not in special]
    prompt = " ".join((tokenizer.decode(before), tokenizer.mask_token, tokenizer.decode(after))).strip()
    try:
        fill = pipeline("fill-mask", model=str(folder), device=-1)
        found = fill(prompt, top_k=_SHOWN)
        length = len(tokenizer(f"{tokenizer.decode(before + after)} " * positions, truncation=True)["input_ids"])
        # As long as an input of the model may be: an embedding that is too short raises.
        fill(
            tokenizer.mask_token + " " + prompt.replace(tokenizer.mask_token, "") * positions,
            tokenizer_kwargs={"truncation": True},
        )
    except Exception as error:  # whatever the model or the tokenizer raises
        raise CheckError(f"{folder}: fill-mask fails on {prompt!r}: {type(error).__name__}: {error}") from error
    if length > positions:
        raise CheckError(f"{folder}: truncation leaves {length} tokens, the model has {positions} positions")
    if not all(math.isfinite(entry["score"]) for entry in found):
        raise CheckError(f"{folder}: fill-mask predicts {found} for {prompt!r}: not finite")
    guesses = ", ".join(f"{entry['token_str'].strip()!r} ({entry['score']:.2f})" for entry in found)
    return f"{prompt}: {guesses}"
