"""Which changes of the masks a resume accepts."""

from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.config import MaskingConfig
from maskvr_ds.run_folder.checkpoints import CheckpointError
from maskvr_ds.training.resume import _check_order

EXPLORED = {"strategy": "fully_explored", "fully_explored": {"placement": "same_batch"}}
UNIFORM: dict[str, Any] = {"strategy": "uniform"}
AUTO: dict[str, Any] = {"strategy": "auto"}


def explored(**section: Any) -> dict[str, Any]:
    return {"strategy": "fully_explored", "fully_explored": {"placement": "same_batch", **section}}


def with_rate(masking: dict[str, Any], rate: float) -> dict[str, Any]:
    return {**masking, "rate": rate}


# Before, now, and whether the same rows come next: with J copies, samples consumed stand for other rows.
CHANGES = {
    "other strategy": (UNIFORM, {"strategy": "whole_word"}, True),
    "other rate": (UNIFORM, with_rate(UNIFORM, 0.3), True),
    "other settings of auto": (AUTO, {"strategy": "auto", "auto": {"rows": 8}}, True),
    "into auto": (UNIFORM, AUTO, True),
    "out of auto": (AUTO, UNIFORM, False),
    "across epochs": (UNIFORM, {"strategy": "fully_explored"}, True),
    "all segments": (UNIFORM, EXPLORED, False),
    "all segments, kept": (EXPLORED, EXPLORED, True),
    "all segments, other rate": (EXPLORED, with_rate(EXPLORED, 0.3), False),
    "3 segments, other rate": (explored(segments_per_sequence=3), explored(segments_per_sequence=3), True),
    "other number of segments": (explored(segments_per_sequence=3), explored(segments_per_sequence=2), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_masks_may_change_if_the_data_order_does_not(name: str) -> None:
    was, now, accepted = CHANGES[name]
    was, now = (MaskingConfig.model_validate(masking).model_dump(mode="json") for masking in (was, now))
    if accepted:
        _check_order(Path("step-1"), was, now)
    else:
        with pytest.raises(CheckpointError, match=r"step-1: segments of a row .*data order could not continue"):
            _check_order(Path("step-1"), was, now)
