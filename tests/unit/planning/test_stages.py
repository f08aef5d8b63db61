"""`maskvr plan` for a rate that follows a schedule: time and FLOPs of its stages, memory of the highest rate."""

import math

import pytest

from maskvr_ds.config import RunConfig
from maskvr_ds.masking.rates import masking_rate, stage_at, stages
from maskvr_ds.planning import report
from maskvr_ds.planning.corpora import Corpus
from maskvr_ds.planning.hardware import GPUS, Cluster
from maskvr_ds.planning.plan import make_plan
from maskvr_ds.planning.step_time import Calibration
from tests.unit.planning.test_plan import LARGE, planned, run_config


@pytest.mark.parametrize("decay", ["linear", "step"])
def test_time_and_flops_follow_the_stages_of_a_schedule(decay: str) -> None:
    """Means over the steps of what constant rates with as many predictions take; memory is that of the most."""
    schedule = {"rate": 0.45, "final_rate": 0.15, "rate_decay": decay}
    plan = planned(run_config(masking=schedule))
    (phase,) = plan.phases
    found = stages(128, 0.45, 0.15)
    constant = {
        stage.slots: planned(run_config(masking={"rate": stage.slots / 126})).phases[0].configured_seconds
        for stage in found
    }
    rates = [masking_rate(step, 0.45, 0.15, total_steps=1000, decay=decay) for step in range(1000)]
    course = [stage_at(found, 128, rate).slots for rate in rates]
    expected = sum(constant[slots] or math.nan for slots in course) / 1000
    assert phase.configured_seconds == pytest.approx(expected)
    flops = sum(LARGE.flops(128, slots) for slots in course) / 1000
    assert phase.model_tflops * 1e12 == pytest.approx(65_536 * flops / (phase.step.total * 32))
    (highest,) = planned(run_config(masking={"rate": 0.45})).phases
    assert phase.memory == highest.memory
    assert (phase.predictions, phase.last_predictions) == (57, 19)
    assert "up to 57, at the end 19 predictions each" in report.text(plan, source="run", measured=())
    # Late mask tokens: the earlier, the more there are.
    late = {"late_layer": 12, "mask_probability": 1, "random_probability": 0}
    (shorter,) = planned(run_config(masking={**schedule, **late})).phases
    (at_the_end,) = planned(run_config(masking={"rate": 0.15, **late})).phases
    assert shorter.model_tflops * shorter.step.total < at_the_end.model_tflops * at_the_end.step.total


def test_a_schedule_that_continues_is_planned_from_where_it_is() -> None:
    """The second of two phases of one schedule has its lower rates."""
    phases = [
        {"name": "first", "data": {"path": "a"}, "training": {"steps": 500}},
        {
            "name": "second",
            "data": {"path": "b"},
            "training": {"steps": 500},
            "start": {"moments": "keep", "step_counter": "keep", "schedule": "continue"},
        },
    ]
    values = run_config().model_dump(mode="json", exclude={"training", "data", "phases", "masking"})
    masking = {"rate": 0.45, "final_rate": 0.15}
    config = RunConfig.model_validate({**values, "phases": phases, "masking": masking})
    corpora = [Corpus(128, 30_522)] * 2
    one, two = make_plan(config, corpora, Cluster(1, 8, GPUS["a100-80"], None), Calibration()).phases
    assert (one.predictions, one.last_predictions) == (57, 42)
    assert (two.predictions, two.last_predictions) == (42, 19)


def test_durations_have_readable_units() -> None:
    assert [report._duration(days) for days in (3, 1.5, 0.01, 0.0001)] == [
        *("3.0 days", "36.0 hours", "14.4 minutes", "8.6 seconds"),
    ]
