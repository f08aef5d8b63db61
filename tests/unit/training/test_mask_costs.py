"""Costs of the candidates of strategy auto: what is measured, stored, imported and refused. Steps on ranks:
tests/distributed/test_auto.py."""

import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, RunConfig
from maskvr_ds.run_folder.checkpoints import CheckpointError
from maskvr_ds.run_folder.layout import MASK_COSTS
from maskvr_ds.training import mask_costs
from maskvr_ds.training.auto_choice import MaskingPlan
from maskvr_ds.training.mask_costs import (
    _seconds_of_run,
    check_plan_of_checkpoint,
    machine,
    measure_costs,
    needed,
    resolve_costs,
    stored_costs,
    write_costs,
)
from maskvr_ds.training.step_costs import Needed, StepCosts
from tests.support.corpora import make_corpus

HERE = {"device": "GPU A", "ranks": 2, "micro_size": 8}
NEEDED = Needed((0.45, 0.15), ("mapnet",))
ONLY_MASK = {"mask_probability": 1, "random_probability": 0}
# Of a measurement, injected.
PER_PASS = 0.01
COSTS = StepCosts({0.45: 2.0, 0.15: 1.5}, {"mapnet": 0.25}, HERE)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(make_corpus(tmp_path_factory.mktemp("costs") / "corpus", rows=40, length=32, words=20))


def config(run: Path, **masking: Any) -> RunConfig:
    values = {"strategy": "auto", "rate": 0.45, "final_rate": 0.15, **masking}
    batch = {"global_size": 12, "micro_size": 6}
    return RunConfig.model_validate(
        {"output_dir": str(run), "data": {"path": "c"}, "training": {"steps": 4}, "masking": values, "batch": batch}
    )


def importing(run: Path, file: Path) -> RunConfig:
    return config(run, auto={"costs": str(file)})


def test_seconds_add_up() -> None:
    assert COSTS.seconds(MaskingPlan("uniform", 1, 0.15)) == 1.5
    assert COSTS.seconds(MaskingPlan("mapnet", 1, 0.45)) == 2.25
    assert COSTS.seconds(MaskingPlan("fully_explored", 3, 0.45)) == 2.0
    assert StepCosts.read(json.loads(json.dumps(COSTS.stored()))) == COSTS
    late = replace(COSTS, late={2: {0.45: 1.0, 0.15: 1.25}})
    assert late.seconds(MaskingPlan("mapnet", 1, 0.45, 2)) == 1.25
    assert late.seconds(MaskingPlan("uniform", 1, 0.45)) == 2.0
    assert StepCosts.read(json.loads(json.dumps(late.stored()))) == late
    assert late.lacks(Needed((0.45,), (), (2,))) is None
    assert (
        late.lacks(Needed((0.45,), (), (3,)))
        == COSTS.lacks(Needed((0.45,), (), (3,)))
        == "[MASK] from layer 3 at rate 0.45"
    )
    assert str(COSTS) == "uniform masks 2 s at rate 0.45, 1.5 s at rate 0.15; mapnet adds 0.25 s"


def test_what_a_run_needs(tmp_path: Path, corpus: Corpus) -> None:
    assert needed(config(tmp_path), corpus) == Needed((0.45, 0.312, 0.2163, 0.15), ("fully_explored", "mapnet"))
    alone = config(tmp_path, rate=0.45, final_rate=None, auto={"proposal": False})
    # 30 positions have 3 segments at this rate, and 12 rows are groups of 2 and of 3.
    assert needed(alone, corpus) == Needed((0.45,), ("fully_explored",))
    prime = alone.model_copy(update={"batch": alone.batch.model_copy(update={"global_size": 13})})
    assert needed(prime, corpus) == Needed((0.45,), ())


def test_the_checkpoint_comes_first_then_the_folder_then_the_file(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    run = tmp_path / "run"
    run.mkdir()
    assert stored_costs(config(run), 0, NEEDED, HERE, None) is None
    file.write_text(json.dumps(COSTS.stored()), encoding="utf-8")
    assert stored_costs(importing(run, file), 0, NEEDED, HERE, None) == COSTS
    of_folder = StepCosts({0.45: 3.0, 0.15: 1.0}, {"mapnet": 0.0}, {**HERE, "ranks": 1})
    write_costs(run, 0, of_folder)
    write_costs(run, 1, COSTS)
    # Measured on another number of ranks: kept, since it is the run's own.
    assert stored_costs(config(run), 0, NEEDED, HERE, None) == of_folder
    assert stored_costs(config(run), 1, NEEDED, HERE, None) == COSTS
    assert stored_costs(config(run), 2, NEEDED, HERE, None) is None
    assert stored_costs(config(run), 0, NEEDED, HERE, COSTS.stored()) == COSTS
    # Another run's file is that of its first phase.
    other = importing(tmp_path / "other", run / MASK_COSTS)
    assert stored_costs(other, 0, NEEDED, {**HERE, "ranks": 1}, None) == of_folder
    with pytest.raises(ConfigError, match=r"differs from the costs that the run has followed so far.*remove"):
        stored_costs(importing(run, file), 0, NEEDED, HERE, of_folder.stored())
    file.unlink()
    assert stored_costs(importing(run, file), 0, NEEDED, HERE, of_folder.stored()) == of_folder
    # A damaged file in the folder is measured anew, other candidates too.
    (run / MASK_COSTS).write_text("{", encoding="utf-8")
    assert stored_costs(config(run), 0, NEEDED, HERE, None) is None
    write_costs(run, 0, of_folder)
    assert stored_costs(config(run), 0, Needed((0.3,), ()), HERE, None) is None


def test_costs_of_a_start_with_other_settings_are_not_used(tmp_path: Path) -> None:
    """It has left no checkpoint, and what a checkpoint has comes first."""
    write_costs(tmp_path, 0, COSTS, 12.5)
    for other in ({"model": {"num_hidden_layers": 2}}, {"global_size": 24}):
        assert stored_costs(config(tmp_path), 0, NEEDED, {**HERE, **other}, None) is None
        assert _seconds_of_run(tmp_path, 0, NEEDED, {**HERE, **other}) == 0
    assert stored_costs(config(tmp_path), 0, NEEDED, {**HERE, "ranks": 1}, None) == COSTS


def test_the_seconds_of_measuring_outlive_a_kill_before_the_first_checkpoint(tmp_path: Path, corpus: Corpus) -> None:
    values = config(tmp_path, auto={"proposal": False}, final_rate=None)
    phase: Any = SimpleNamespace(config=values, index=0)
    point: Any = SimpleNamespace(checkpoint=None)
    write_costs(tmp_path, 0, StepCosts({0.45: 2.0}, {"fully_explored": 0.1}, HERE), 12.5)
    costs, took = resolve_costs(phase, corpus, HERE, point, lambda: pytest.fail("measured again"))
    assert (costs.uniform, took) == ({0.45: 2.0}, 12.5)
    # Costs of a file: nothing was measured by this run.
    write_costs(tmp_path / "..", 0, costs)
    assert _seconds_of_run(tmp_path / "..", 0, NEEDED, HERE) == 0


@pytest.mark.parametrize(
    ("change", "needs", "text"),
    [
        ({"device": "GPU B"}, NEEDED, "measured with device 'GPU B', this run has 'GPU A'.*remove the setting"),
        ({"ranks": 4}, NEEDED, "measured with ranks 4, this run has 2"),
        ({"micro_size": 16}, NEEDED, "measured with micro_size 16, this run has 8"),
        ({"micro_size": None}, NEEDED, "measured with micro_size None, this run has 8"),
        ({}, Needed((0.3,), ()), r"no seconds of uniform masks at rate 0\.3, which is a candidate"),
        ({}, Needed((0.45,), ("fully_explored",)), "no seconds of fully_explored, which is a candidate"),
    ],
)
def test_a_file_of_another_machine_or_run_is_refused(
    tmp_path: Path, change: dict[str, Any], needs: Needed, text: str
) -> None:
    file = tmp_path / "costs.json"
    costs = StepCosts(COSTS.uniform, COSTS.added, {**HERE, **change})
    file.write_text(json.dumps(costs.stored()), encoding="utf-8")
    with pytest.raises(ConfigError, match=text):
        stored_costs(importing(tmp_path, file), 0, needs, HERE, None)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, r"cannot be read \(No such file"),
        ("{", "not valid JSON"),
        ("[]", "not the seconds of masking strategies"),
        ('{"phases": 3}', "not the seconds of masking strategies"),
        ('{"uniform": [[0.45, 0]], "added": {}, "machine": {}}', r"must be positive, found \[0\.0\]"),
        ('{"uniform": [[0.45, NaN]], "added": {}, "machine": {}}', r"must be positive, found \[nan\]"),
        ('{"uniform": [], "added": {}, "machine": {}}', r"must be positive, found \[\]"),
        ('{"uniform": [[0.45, 1]], "added": {"mapnet": -1}, "machine": {}}', "must not be negative"),
    ],
)
def test_a_faulty_file_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    file = tmp_path / "costs.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"masking\.auto\.costs .*costs\.json: .*{text}"):
        stored_costs(importing(tmp_path, file), 0, NEEDED, HERE, None)


@pytest.mark.parametrize(
    ("masking", "text"),
    [
        (
            {"rate": 0.15, "final_rate": 0.3},
            r"final_rate 0\.3 is above rate 0\.15; under strategy auto the rate",
        ),
        ({"rate_decay": "cosine"}, "rate_decay cosine: strategy auto decides itself when the rate falls; remove"),
        ({"auto": {"rows": 4}}, "masking.auto.rows"),
        ({"auto": {"rows": 64, "max_rows": 32}}, "max_rows 32 is below rows 64; raise it, or set rows lower"),
        ({"auto": {"late_layers": [1]}}, r"auto\.late_layers 1: all predicted positions must be \[MASK\]"),
        (
            ONLY_MASK | {"auto": {"late_layers": [1]}, "late_layer": 2},
            r"late_layer 2 is fixed, .* 1 one is to be chosen",
        ),
        (ONLY_MASK | {"auto": {"late_layers": [3, 3]}}, r"auto\.late_layers 3, 3: a layer is named twice"),
        (ONLY_MASK | {"auto": {"late_layers": [1, 12]}}, r"masking\.auto\.late_layers 12: .* at most 11"),
    ],
)
def test_settings_that_auto_refuses(tmp_path: Path, masking: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        config(tmp_path, **masking)


def measured(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, wanted: Needed = NEEDED, **more: Any
) -> tuple[StepCosts, list[tuple[int, bool]]]:
    """Costs from steps that take `rate` seconds, half a second more if MAPNet learns and 0.2 if it only proposes; and
    (width of the masks, whether MAPNet runs) of the steps, in order."""
    steps: list[tuple[int, bool]] = []

    mlm = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    engine = SimpleNamespace(
        module=SimpleNamespace(observer=None, mlm=mlm),
        optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}]),
        train=lambda: None,
        destroy=lambda: steps.append((0, False)),
    )

    def step(engine: Any, masker: Any, batch: Any, config: Any, proposer: Any) -> float:
        assert engine.optimizer.param_groups[0]["lr"] == 0
        assert (engine.module.observer is not None) == (proposer is not None)
        steps.append((masker.maximum_predictions, proposer is not None))
        # The first round is slow, and one step of each later round is disturbed.
        disturbed = len(steps) <= 3 or len(steps) == 8
        own = 0.0 if proposer is None else 0.5 if proposer.learns else 0.2
        if (late := engine.module.late_in_training) is not None:
            # 30 positions, of which at 0.45 and 0.15 14 and 5 are [MASK].
            assert late.hidden == {0.45: 14, 0.15: 5}[masker.rate]
            own -= 0.01 * late.layer
        return masker.rate + own + 9 * disturbed

    monkeypatch.setattr(mask_costs, "_step_seconds", step)
    monkeypatch.setattr(mask_costs, "_seconds_per_pass", lambda *_: PER_PASS)
    run = config(tmp_path, auto={"proposal": True}, **more)
    return measure_costs(run, corpus, wanted, HERE, lambda: engine), steps


def test_candidates_take_turns_and_the_median_counts(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs, steps = measured(tmp_path, corpus, monkeypatch)
    assert costs == StepCosts({0.45: 0.45, 0.15: 0.15}, {"mapnet": pytest.approx(0.5)}, HERE, per_pass=PER_PASS)
    assert len(steps) == 3 * 6 + 1
    # Masks are as wide as their rate needs: 14 and 5 of 30.
    assert steps[:6] == [(14, False), (5, False), (14, True), (5, False), (14, True), (14, False)]
    assert steps[-1] == (0, False), "the engine is destroyed"


def test_the_slowest_rank_counts(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks wait for it, in steps and in measurements; which one is slowest may differ between candidates."""
    ranks: list[Any] = []

    def gather(mine: Any) -> list[Any]:
        ranks.append(mine)
        if isinstance(mine, float):
            return [mine / 2, mine, mine / 3]
        if mine is None:
            return [mine]
        return [mine, {case: 2 * x if case[1] == 0.15 else x / 2 for case, x in mine.items()}]

    monkeypatch.setattr(mask_costs.distributed, "gather_objects", gather)
    of_measurement = mask_costs._seconds_per_pass
    costs, _ = measured(tmp_path, corpus, monkeypatch)
    assert costs.uniform == {0.45: 0.45, 0.15: 0.3}
    rows: list[int] = []
    chooser = SimpleNamespace(rehearse=lambda number: rows.append(number) or 60)
    monkeypatch.setattr(mask_costs, "Chooser", lambda *_, **__: chooser)
    run: Any = config(tmp_path, auto={"rows": 17})
    parts: Any = SimpleNamespace()
    monkeypatch.setattr(mask_costs.distributed, "barrier", lambda: None)
    # Number of ranks, rows.
    for world, timed in ((1, 8), (12, 12), (64, 17)):
        times = iter((0.0, 9.0, 10.0, 13.0))
        monkeypatch.setattr(mask_costs, "_clock", partial(next, times))
        monkeypatch.setattr(mask_costs.distributed, "world_size", partial(int, world))
        assert of_measurement(run, parts, parts, parts, None, costs) == 3.0 / 60, "after one that warms up"
        assert (ranks[-1], rows[-2:]) == (3.0, [5, timed])


def test_the_networks_cost_can_be_given(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, steps = measured(tmp_path, corpus, monkeypatch, mapnet={"cost": 0.2})
    assert costs.added == {"mapnet": pytest.approx(0.09)}
    assert not any(trained for _, trained in steps)


@pytest.mark.parametrize("every", [2, 4])
def test_steps_between_those_that_learn_cost_less(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    costs, steps = measured(tmp_path, corpus, monkeypatch, mapnet={"learn_every": every})
    of_training = [0.5 if step % every == 0 else 0.2 for step in range(1, 1 + 6 * every)]
    assert costs.added == {"mapnet": pytest.approx(statistics.fmean(of_training))}
    assert len(steps) == 4 * 6 + 1


def test_every_layer_at_which_masks_may_enter_is_measured(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs, steps = measured(tmp_path, corpus, monkeypatch, replace(NEEDED, late_layers=(2, 4)))
    assert len(steps) == 7 * 6 + 1
    assert costs.uniform == {0.45: 0.45, 0.15: 0.15}
    assert costs.late == {n: {rate: pytest.approx(rate - 0.01 * n) for rate in NEEDED.rates} for n in (2, 4)}
    assert costs.added == {"mapnet": pytest.approx(0.5)}
    run = config(tmp_path, **ONLY_MASK, auto={"late_layers": [2, 4]})
    assert needed(run, corpus).late_layers == (2, 4)


def test_costs_of_another_learn_every_are_another_machine(tmp_path: Path, corpus: Corpus) -> None:
    """Those of earlier versions, which do not name it, are costs of a network that learns at every step."""
    one, two = (machine(config(tmp_path, mapnet={"learn_every": n}), corpus, {}) for n in (1, 2))
    assert one["mapnet"] == {"layers": 1, "reach": 4, "hidden": 96, "cost": None}
    assert two["mapnet"] == {**one["mapnet"], "learn_every": 2}
    (tmp_path / "costs.json").write_text(json.dumps(replace(COSTS, machine=one).stored()), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"measured with mapnet .*'cost': None}, this run has .*'learn_every': 2}"):
        stored_costs(importing(tmp_path, tmp_path / "costs.json"), 0, NEEDED, two, None)


def test_what_a_checkpoint_cannot_continue_with(tmp_path: Path) -> None:
    old, constant = {"strategy": "fully_explored", "stretch": {}}, config(tmp_path, final_rate=None)
    with pytest.raises(CheckpointError, match=r"final_rate 0\.15: the checkpoint is of an earlier version.*new run"):
        check_plan_of_checkpoint(config(tmp_path), old)
    check_plan_of_checkpoint(constant, old)
    check_plan_of_checkpoint(config(tmp_path), {**old, "rate": 0.312})
    check_plan_of_checkpoint(config(tmp_path), {})
    # With masking.change_at_resume.
    with pytest.raises(CheckpointError, match=r"masking\.rate 0\.45: strategy auto trains at 0\.3, .*0\.45, 0\.312,"):
        check_plan_of_checkpoint(config(tmp_path), {**old, "rate": 0.3})
    late = config(tmp_path, **ONLY_MASK, auto={"late_layers": [2]})
    check_plan_of_checkpoint(late, {**old, "rate": 0.312, "late_layer": 2})
    with pytest.raises(CheckpointError, match=r"auto\.late_layers: .* from layer 4 at this checkpoint; add it"):
        check_plan_of_checkpoint(late, {**old, "rate": 0.312, "late_layer": 4})
    without, proposed = config(tmp_path, auto={"proposal": False}), {"strategy": "mapnet", "rate": 0.45}
    with pytest.raises(CheckpointError, match=r"auto\.proposal false: .*set it to true"):
        check_plan_of_checkpoint(without, proposed)
