"""Held-out figures in words."""

import math

import pytest

from maskvr_ds.telemetry.held_out import held_out_sentence

ALL = {"step": 1200, "held_out_loss": 5.0, "held_out_accuracy": 0.25, "held_out_unigram_entropy": 6.0}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        # Copying the tokens in plain sight brings the loss over all predictions below the entropy, not this one.
        (
            {"held_out_loss_mask": 6.25, "held_out_accuracy_mask": 0.125},
            "loss 6.250 nats behind [MASK] (5.000 over all predictions) at step 1,200, "
            "accuracy 12.5%; 0.250 above the unigram entropy, 6.000: the model "
            "predicts no better than token frequencies; it needs more steps or another learning rate",
        ),
        (
            {"held_out_loss_mask": 5.5, "held_out_accuracy_mask": 0.125},
            "loss 5.500 nats behind [MASK] (5.000 over all predictions) at step 1,200, "
            "accuracy 12.5%; 0.500 below the unigram entropy, 6.000",
        ),
        # No prediction of the held-out rows had a [MASK]; figures of older versions.
        (
            {"held_out_loss_mask": math.nan, "held_out_accuracy_mask": math.nan},
            "loss 5.000 nats per masked token at step 1,200, accuracy 25.0%; 1.000 below the unigram entropy, 6.000",
        ),
        ({}, "loss 5.000 nats per masked token at step 1,200, accuracy 25.0%; 1.000 below the unigram entropy, 6.000"),
    ],
)
def test_the_loss_that_compares_with_the_entropy(more: dict[str, float], expected: str) -> None:
    assert held_out_sentence(ALL | more) == expected


def test_a_line_without_entropy_and_accuracy() -> None:
    assert held_out_sentence({"step": 3, "held_out_loss": 5.0}) == "loss 5.000 nats per masked token at step 3"
