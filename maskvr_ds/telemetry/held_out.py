"""Held-out figures in words, for the end of a run and of the demo."""

import math
from typing import Any


def held_out_sentence(line: dict[str, Any]) -> str:
    """Loss, accuracy and distance from the unigram entropy of a line of metrics.jsonl that has held-out figures.

    Where the line has them, those behind [MASK] alone: the loss over all predictions also rewards copying the tenth
    that stays in plain sight, so only the former compares with the entropy of a model without context.
    """
    loss = line.get("held_out_loss_mask")
    behind_mask = loss is not None and math.isfinite(loss)
    suffix = "_mask" if behind_mask else ""
    loss = line[f"held_out_loss{suffix}"]
    what = f"behind [MASK] ({line['held_out_loss']:.3f} over all predictions)" if behind_mask else "per masked token"
    text = f"loss {loss:.3f} nats {what} at step {line['step']:,}"
    if (accuracy := line.get(f"held_out_accuracy{suffix}")) is not None:
        text += f", accuracy {accuracy:.1%}"
    if (entropy := line.get("held_out_unigram_entropy")) is not None:
        gain = entropy - loss
        text += f"; {abs(gain):.3f} {'below' if gain >= 0 else 'above'} the unigram entropy, {entropy:.3f}"
        if gain <= 0:
            text += (
                ": the model predicts no better than token frequencies; it needs more steps or another learning rate"
            )
    return text
