"""Strategy auto: its effect on masker, loader and MAPNet, its state, and whether it finds the best known masks."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from maskvr_ds.config import AutoConfig, MaskingConfig
from maskvr_ds.data.loader import Loader, RepeatSchedule
from maskvr_ds.data.mixture import Share
from maskvr_ds.masking.masker import Corruption, Masker
from maskvr_ds.masking.strategies import STRATEGIES
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.training import auto_strategy
from maskvr_ds.training.auto_choice import PROPOSAL, SEGMENTS, UNIFORM, MaskingPlan, Rating, ladder
from maskvr_ds.training.auto_measurement import Found
from maskvr_ds.training.auto_strategy import Chooser
from maskvr_ds.training.step_costs import StepCosts
from tests.unit.analysis.test_progress import GOAL, Toy, n


def six_words(rows: Any, out: Any) -> None:
    """Rows of six tokens between two special ones."""
    out[:] = [2, *[9] * 6, 3]


class Double:
    """Test double for masker, loader, proposer and engine."""

    corpus: Any = SimpleNamespace(
        sequence_length=8,
        rows=50,
        dtype=np.uint16,
        take=six_words,
        manifest=SimpleNamespace(special_tokens=SimpleNamespace(mask=4, all=(0, 1, 2, 3, 4))),
    )
    shares = (Share(50, 50),)
    global_size = 12
    strategy: Any = None
    gate = "?"
    learning = True
    run_step = 0

    def __init__(self) -> None:
        self.repeats = RepeatSchedule()
        self.module = SimpleNamespace(observer=None, late_in_training=None)
        self.rate = 0.0

    def fix_rate(self, rate: float) -> None:
        self.rate = rate

    def change_copies(self, samples: int, copies: int) -> None:
        self.repeats = self.repeats.change_copies(samples, copies, self.shares)

    def attach(self, module: Any) -> None:
        module.observer = self


class Parts:
    """A chooser of rates 0.5 to 0.2, for rows of six positions, with test doubles. MAPNet takes 10% of the time."""

    def __init__(self, final_step: int | None = None, final_rate: float | None = 0.2, **config: Any) -> None:
        self.masker, self.loader, self.proposer, self.engine = Double(), Double(), Double(), Double()
        parts: dict[str, Any] = {name: getattr(self, name) for name in ("masker", "loader", "proposer", "engine")}
        seconds = dict.fromkeys(ladder(0.5, final_rate), 1.0)
        self.chooser = Chooser(
            MaskingConfig(
                strategy="auto",
                rate=0.5,
                final_rate=final_rate,
                mask_probability=1,
                random_probability=0,
                auto=AutoConfig(every_steps=10, **config),
            ),
            final_step=final_step,
            costs=StepCosts(seconds, {SEGMENTS: 0.0, PROPOSAL: 0.1}, {"device": "none"}),
            micro_size=4,
            seed=1,
            **parts,
        )

    def measured(self, monkeypatch: Any, ideal: float = 0.5, **ratings: tuple[float, float, float]) -> None:
        """From now on measurements find these ratings of the plans below."""
        found = {PLANS[name]: Rating(rating, 1.0) for name, rating in ratings.items()}
        monkeypatch.setattr(Chooser, "_measure", lambda self, key: ({self.plan: SAME, **found}, ideal, {"passes": 8}))


SAME = Rating((1.0, 1.0, 1.0), 1.0)
SURE = (1.3, 1.2, 1.4)
PLANS = {
    "plain": MaskingPlan(SEGMENTS, 1, 0.5),
    "halves": MaskingPlan(SEGMENTS, 2, 0.5),
    "proposal": MaskingPlan(PROPOSAL, 1, 0.5),
    "lower": MaskingPlan(UNIFORM, 1, 0.3684),
    "late": MaskingPlan(SEGMENTS, 1, 0.5, 2),
    "lower_late": MaskingPlan(UNIFORM, 1, 0.3684, 2),
}


def test_a_plan_reaches_masker_loader_and_network(monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    parts = Parts()
    chooser, masker, loader, proposer = parts.chooser, parts.masker, parts.loader, parts.proposer
    # Halves of six positions are as long as uniform masks.
    assert (chooser.plan, masker.strategy, masker.rate) == (PLANS["plain"], STRATEGIES[SEGMENTS], 0.5)
    parts.measured(monkeypatch, halves=SURE)
    event = chooser.choose(10, 120)
    assert (event["strategy"], event["segments"], event["best"]) == (SEGMENTS, 1, [SEGMENTS, 2, 0.5])
    assert event["reason"].endswith("taken if the next measurement agrees")
    with caplog.at_level("INFO", logger="maskvr_ds"):
        chooser.choose(20, 240)
    assert "step 20: masks: fully_explored at rate 0.5, 2 segments of a row per batch (" in caplog.text
    assert (loader.repeats.copies, loader.repeats.sample, loader.repeats.place) == (2, 240, 240)
    # A lower rate: one copy again.
    parts.measured(monkeypatch, lower=SURE)
    for step in (30, 40):
        event = chooser.choose(step, 12 * step)
    assert (event["strategy"], event["segments"], event["rate"]) == (UNIFORM, 1, 0.3684)
    assert (masker.strategy, masker.rate, loader.repeats.copies) == (STRATEGIES[UNIFORM], 0.3684, 1)
    assert json.loads(json.dumps(event)) == event
    assert not chooser.learning
    assert proposer.gate == "never"


def test_mapnet_is_attached_only_while_it_is_trained(monkeypatch: Any) -> None:
    parts = Parts()
    assert not parts.chooser.learning
    assert parts.engine.module.observer is None
    parts.measured(monkeypatch, ideal=0.99)
    parts.chooser.choose(10, 120)
    assert not parts.chooser.learning
    parts.measured(monkeypatch, ideal=1.01)
    assert parts.chooser.choose(20, 240)["proposal_trained"]
    assert parts.engine.module.observer is parts.proposer
    assert (parts.proposer.learning, parts.proposer.gate, parts.proposer.run_step) == (True, "never", 20)
    parts.measured(monkeypatch, ideal=1.01, proposal=SURE)
    for step in (30, 40):
        parts.chooser.choose(step, 12 * step)
    assert (parts.masker.strategy, parts.proposer.gate) == (STRATEGIES[PROPOSAL], "always")
    # No longer better: the plain plan at once needs two measurements too, then the network gets another trial.
    parts.measured(monkeypatch, ideal=0.9, plain=(1.01, 0.9, 1.1))
    learning = []
    for step in (50, 60, 70):
        parts.chooser.choose(step, 12 * step)
        learning.append((parts.chooser.plan.strategy, parts.chooser.learning))
    assert learning == [(PROPOSAL, True), (SEGMENTS, False), (SEGMENTS, False)]
    assert parts.engine.module.observer is None


def test_state_is_restored_to_masker_loader_and_proposal(monkeypatch: Any) -> None:
    one = Parts()
    for step, ideal in ((10, 0.5), (20, 2.0)):
        one.measured(monkeypatch, ideal=ideal, halves=SURE)
        one.chooser.choose(step, 12 * step)
    one.measured(monkeypatch, ideal=2.0, lower=SURE)
    one.chooser.choose(30, 360)
    two = Parts()
    two.chooser.restore(json.loads(json.dumps(one.chooser.state())), 33)
    assert two.chooser.plan == one.chooser.plan == PLANS["halves"]
    assert two.loader.repeats == one.loader.repeats
    assert two.chooser.state() == one.chooser.state()
    assert (two.chooser.learning, two.proposer.run_step) == (True, 33)
    for parts in (one, two):
        assert parts.chooser.choose(40, 480)["strategy"] == UNIFORM


def test_state_of_earlier_versions_is_continued() -> None:
    """Of the first one: strategy and copies alone; of later ones: also the best plan, without a rate."""
    stretch = {"copies": 2, "sample": 120, "place": 120, "base": 2}
    for state in ({}, {"best": ["fully_explored", 2], "baseline": ["fully_explored", 1]}):
        parts = Parts(final_rate=None)
        parts.chooser.restore({"strategy": SEGMENTS, "stretch": stretch, **state}, 7)
        assert parts.chooser.plan == parts.chooser._best == PLANS["halves"]
        # It was always trained.
        assert (parts.chooser.learning, parts.proposer.run_step) == (True, 7)


def test_due_every_n_steps_except_the_last_and_where_the_rate_must_fall() -> None:
    assert [step for step in range(1, 41) if Parts().chooser.due(step, 40)] == [10, 20, 30]
    parts = Parts(final_step=35)
    assert [step for step in range(1, 41) if parts.chooser.due(step, 40)] == [10, 20, 30, 35, 36, 37, 38, 39]
    event = parts.chooser.choose(35, 420)
    assert (event["rate"], event["passes"], event["reason"]) == (
        0.2,
        0,
        "the last part of the schedule is trained at masking.final_rate 0.2",
    )
    assert [step for step in range(35, 41) if parts.chooser.due(step, 40)] == []
    # Rounds of segments start anew: those of another rate are divided otherwise.
    assert parts.loader.repeats.base > 0


def test_late_masks_reach_the_model_and_end_before_the_run_does(monkeypatch: Any) -> None:
    parts = Parts(final_step=70, late_layers=(2,), rows=8)
    chooser, module = parts.chooser, parts.engine.module

    def hidden() -> int | None:
        late = module.late_in_training
        return None if late is None else late.hidden

    parts.measured(monkeypatch, late=SURE)
    entries = [chooser.choose(step, 12 * step) for step in (10, 20)]
    assert [entry["late_layer"] for entry in entries] == [0, 2]
    assert module.late_in_training == LateMasks(2, 4, hidden=3), "halves of six positions"
    # The state has the layer; a resume sets the model's.
    resumed = Parts(final_step=70, late_layers=(2,), rows=8)
    resumed.chooser.restore(json.loads(json.dumps(chooser.state())), 25)
    assert resumed.chooser.state() == chooser.state()
    assert resumed.engine.module.late_in_training == LateMasks(2, 4, hidden=3)
    assert [entry["best"] for entry in entries] == 2 * [[SEGMENTS, 1, 0.5, 2]]
    # A lower rate keeps the layer: 2 of six positions.
    parts.measured(monkeypatch, lower_late=SURE)
    found = []
    for step in (30, 40):
        chooser.choose(step, 12 * step)
        found.append((chooser.plan, hidden()))
    assert found == [(PLANS["late"], 3), (PLANS["lower_late"], 2)]
    # In the last part of the schedule [MASK] enters at the first layer, whatever was measured, and stays there.
    assert chooser.due(70, 100)
    entry = chooser.choose(70, 840)
    assert (entry["rate"], entry["late_layer"], hidden()) == (0.2, 0, None)
    assert (
        entry["reason"]
        == "the last part of the schedule is trained at masking.final_rate 0.2, [MASK] from the first layer"
    )
    assert not chooser.due(75, 100)
    chooser.choose(80, 960)
    assert chooser._late_layers == ()


def test_late_layers_are_candidates_at_the_present_rate(monkeypatch: Any) -> None:
    """Lower rates keep the present layer; the goal is measured with [MASK] from the first."""
    seen: list[Any] = []

    def measure(candidates: Any, *_: Any, enter: Any, **__: Any) -> Any:
        layers = []
        for layer in (0, 2, 4):
            enter(layer)
            layers.append(module.late and module.late.layer)
        seen.append((candidates, layers))
        raise StopIteration

    module: Any = SimpleNamespace(late=None)
    monkeypatch.setattr(auto_strategy, "measure_candidates", measure)
    monkeypatch.setattr(auto_strategy, "Sketcher", lambda *_, **__: None)
    monkeypatch.setattr(Chooser, "_full_precision_copy", lambda self: module)
    parts = Parts(late_layers=(2, 4), rows=8)
    parts.engine.module.late = None
    for now in (0, 4):
        parts.chooser.plan = replace(parts.chooser.plan, late=now)
        with pytest.raises(StopIteration):
            parts.chooser.choose(10, 120)
        candidates, layers = seen.pop()
        assert layers == [None, 2, 4]
        assert [(plan.rate, plan.late) for plan in candidates.plain] == [(r, now) for r in ladder(0.5, 0.2)]
        assert {(plan.rate, plan.late) for plan in candidates.late} == {(0.5, n) for n in (0, 2, 4) if n != now}


def test_measurements_are_independent_and_of_the_present_rate(monkeypatch: Any) -> None:
    """Two that agree say more than one: rows, masks and projections are others at every step, and the same on every
    rank. Segments are those of a row at the present rate. What a proposal could be worth pays for its time."""
    seen: list[Any] = []

    def measure(candidates: Any, *_: Any, sample: Any, sketcher: Any, masker: Any, **__: Any) -> Found:
        seen.append(((tuple(sample.rows), masker.seed, sketcher), candidates))

        def gain(factor: float) -> Any:
            return lambda counts: np.full(len(counts), factor)

        own = parts.chooser.plan
        proposal = MaskingPlan(PROPOSAL, 1, own.rate)
        return Found({own: gain(1.0), proposal: gain(1.0)}, gain(1.21), data=1.0, mask=1.0, passes=0)

    monkeypatch.setattr(auto_strategy, "measure_candidates", measure)
    monkeypatch.setattr(auto_strategy, "Sketcher", lambda *_, seed, **__: seed)
    monkeypatch.setattr(Chooser, "_full_precision_copy", lambda self: None)
    parts = Parts(rows=8)
    events = [parts.chooser.choose(step, 12 * step) for step in (10, 20)]
    again = Parts(rows=8)
    again.chooser.choose(20, 240)
    keys = [key for key, _ in seen]
    assert all(a != b for a, b in zip(*keys[:2], strict=True))
    assert keys[2] == keys[1]
    # 10% of the time for a proposal that makes 21% more progress.
    assert [event["best_expected_proposal"] for event in events] == pytest.approx([1.1, 1.1])
    # Six positions: halves at rate 0.5, thirds at 0.3684, six parts at 0.2.
    for rate, of_row, counts in ((0.5, 2, (2,)), (0.3684, 3, (2, 3)), (0.2, 6, (2, 3, 4, 6))):
        parts.chooser.plan = replace(parts.chooser.plan, rate=rate)
        parts.chooser.choose(30, 360)
        assert (seen[-1][1].of_row, seen[-1][1].counts) == (of_row, counts)


def test_rounds_start_anew_at_another_rate(monkeypatch: Any) -> None:
    """Those of segments: a round of halves and one of thirds must not share a permutation."""
    parts = Parts(final_step=70)
    parts.measured(monkeypatch, lower=SURE)
    for step in (10, 20):
        parts.chooser.choose(step, 12 * step)
    base = parts.loader.repeats.base
    assert (parts.chooser.plan.strategy, base > 0) == (UNIFORM, True), "from segments"
    parts.chooser.choose(70, 840)
    assert (parts.chooser.plan.strategy, parts.loader.repeats.base > base) == (SEGMENTS, True), "to segments"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy") / "corpus")


# Global batch; seconds of a step at the rates 1/2, 0.3467 (k = 2) and below (k = 1), and the k that is best.
@pytest.mark.parametrize(
    ("batch", "seconds"),
    [(5, (1.0, 1.0, 1.0)), (35, (1.0, 1.0, 1.0)), (605, (1.0, 1.0, 1.0)), (5, (2.0, 1.0, 1.0)), (5, (5.0, 4.0, 1.0))],
)
def test_the_best_rate_is_found(toy: Toy, batch: int, seconds: tuple[float, ...], monkeypatch: Any) -> None:
    """Against enumerated progress per injected second; no batch divides into segments."""
    rates = ladder(0.5, GOAL)
    of_rate = dict(zip(rates, (*seconds, seconds[-1]), strict=True))
    exact = {k: toy.exact(k / n, batch) / s for k, s in zip((3, 2, 1), seconds, strict=True)}
    chooser = of_toy(
        toy, batch, AutoConfig(rows=60, proposal=False), StepCosts(of_rate, {SEGMENTS: 0.0}, {}), monkeypatch
    )
    course = [chooser.choose(step, step * batch)["rate"] for step in range(1, 9)]
    assert course == sorted(course, reverse=True)
    assert course[0] == 0.5
    found = dict(zip(rates, (3, 2, 1, 1), strict=True))[course[-1]]
    assert exact[found] == max(exact.values()), (exact, course)


def test_a_measurement_has_the_rows_that_its_seconds_allow(toy: Toy, monkeypatch: Any) -> None:
    rates = ladder(0.5, GOAL)
    # Masks of four rates, of the goal, and of segments (at the lowest rate, 5 in a batch), 2 · 2 of each of 10 rows: as
    # many seconds as a step.
    costs = StepCosts(dict.fromkeys(rates, 1.0), {SEGMENTS: 0.0}, {}, per_pass=1 / (6 * 4 * 10))
    for limit, expected, every in ((None, 10, 1000), (0.00215, 21, 1000), (0.0005, 10, 2000), (0.05, 40, 1000)):
        auto = AutoConfig(rows=10, draws=2, proposal=False, max_share=limit, max_rows=40)
        chooser = of_toy(toy, 5, auto, costs, monkeypatch)
        assert (chooser.spacing.rows, chooser.spacing.every) == (expected, every)
        assert chooser.choose(1000, 5000)["passes"] == 5 * 4 * expected


def of_toy(toy: Toy, batch: int, auto: AutoConfig, costs: StepCosts, monkeypatch: Any) -> Chooser:
    """A chooser of the rates 0.5 to GOAL that measures the toy's gradients."""
    model: Any = toy.model
    monkeypatch.setattr(auto_strategy, "Sketcher", lambda *_, **__: model)
    monkeypatch.setattr(Chooser, "_full_precision_copy", lambda self: None)
    monkeypatch.setattr(
        auto_strategy,
        "rows_of_epoch",
        lambda _, seed, count: np.random.default_rng(seed % 2**63).permutation(toy.rows)[:count],
    )
    return Chooser(
        MaskingConfig(strategy="auto", rate=0.5, final_rate=GOAL, auto=auto),
        engine=None,
        masker=Masker.for_corpus(toy.corpus.manifest, seed=0, corruption=Corruption(1.0, 0.0)),
        loader=Loader(toy.corpus, seed=0, global_size=batch),
        proposer=None,
        costs=costs,
        micro_size=64,
        seed=11,
    )
