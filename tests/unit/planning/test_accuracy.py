"""The formulas of `maskvr plan` against measured trainings on a CPU, which docs/results/plan has."""

import json
from typing import Any

import pytest

from maskvr_ds.planning.calibration import Measurement, fit, predicted
from maskvr_ds.planning.hardware import Gpu
from maskvr_ds.planning.memory import memory
from maskvr_ds.planning.step_time import STAGE_3_HOST
from tests.support.documents import ROOT
from tests.support.experiments import load_experiment

accuracy = load_experiment("plan_accuracy")
FILES = [
    json.loads((ROOT / f"docs/results/plan/{name}.json").read_text(encoding="utf-8")) for name in ("cpu", "cpu_judged")
]
CASES = [case for content in FILES for case in content["cases"]]
RATE, COPIED = (FILES[0][key] for key in ("product_flops_per_second", "copied_bytes_per_second"))


def measured(case: dict[str, Any]) -> Measurement:
    found: Measurement = accuracy.as_measurement(case, case.get("step_seconds", 0), RATE)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['deepspeed']}-{case['layers']}-{case['hidden']}")
def test_memory_within_a_tenth(case: dict[str, Any]) -> None:
    one = measured(case)
    planned = memory(one.sizes, one.zero, one.work, ranks=one.ranks, fused=False).total
    assert planned == pytest.approx(case["memory"], rel=0.1)


def test_calibrated_on_two_the_others_take_their_time_within_15_percent() -> None:
    timed = [measured(case) for case in CASES if "step_seconds" in case]
    gpu, calibration = fit(timed[:2], Gpu("CPU", 0, RATE, RATE, COPIED, 0, 0))
    assert len(timed) == 10
    for one in timed:
        assert predicted(one, gpu, calibration) == pytest.approx(one.step_seconds, rel=0.15), one.path


def test_what_stage_3_takes_the_host_is_what_was_measured() -> None:
    assert pytest.approx(FILES[1]["host_factor_of_stage_3"], rel=0.2) == STAGE_3_HOST
