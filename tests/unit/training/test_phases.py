"""Phases: declaration, resolution, counting, and the state carried over. Real runs: distributed/test_phases.py."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from maskvr_ds.config import ConfigError, RunConfig, dump_config, load_config
from maskvr_ds.config.masking import SUBSECTIONS, MaskingConfig
from maskvr_ds.config.phases import PhaseStart
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.training.phases import apply_start, done, ends_phase, next_phase, plan, tokens_after
from maskvr_ds.training.schedule import learning_rate

RESTART = {"moments": "keep", "step_counter": "zero", "schedule": "restart"}
TWO: dict[str, Any] = {
    "output_dir": "runs/x",
    "data": {"prefetch": 5},
    "batch": {"micro_size": 4},
    "schedule": {"warmup_steps": 3},
    "phases": [
        {"name": "short", "data": {"path": "a"}, "batch": {"global_size": 16}, "training": {"steps": 10}},
        {
            "name": "long",
            "start": RESTART,
            "data": {"path": "b"},
            "batch": {"global_size": 8},
            "optimizer": {"lr": 5e-4},
            "schedule": {"warmup_share": 0.5},
            "training": {"steps": 4},
        },
    ],
}


def two(**long: Any) -> dict[str, Any]:
    """TWO with changes in the second phase; None removes a section."""
    values = copy.deepcopy(TWO)
    values["phases"][1].update(long)
    values["phases"][1] = {k: v for k, v in values["phases"][1].items() if v is not None}
    return values


def write(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_base_with_a_corpus_and_a_length(tmp_path: Path) -> None:
    values = {**TWO, "data": {"path": "c", "mixture": []}, "training": {"steps": 9}}
    with pytest.raises(ConfigError, match=r"write `data: \{path: null\}`"):
        load_config(write(tmp_path, values))
    nulls = {"data": {"path": None, "mixture": []}, "training": {"steps": None}}
    config = load_config(write(tmp_path, {**values, **nulls}))
    assert (str(config.data.path), config.training.steps) == ("a", 14)


def test_a_phase_overrides_sections_of_the_run() -> None:
    config = RunConfig.model_validate(TWO)
    assert config.training.steps == 14, "sum over the phases"
    short, long = config.phase(0), config.phase(1)
    assert not short.phases
    assert (str(short.data.path), short.data.prefetch, short.batch.micro_size) == ("a", 5, 4)
    assert (str(long.data.path), long.data.prefetch, long.batch.global_size) == ("b", 5, 8)
    assert (short.optimizer.lr, long.optimizer.lr) == (1e-3, 5e-4)
    assert short.schedule.warmup(10) == 3
    assert long.schedule.warmup(4) == 2, "a share in place of the inherited steps"


def test_a_phase_with_another_strategy_inherits_no_settings_of_the_first() -> None:
    masking = {"strategy": "frequency", "frequency": {"floor": 0.2}, "rate": 0.3, "final_rate": 0.15}
    long = RunConfig.model_validate({**two(masking={"strategy": "span", "rate": 0.2}), "masking": masking}).phase(1)
    assert (long.masking.strategy, long.masking.frequency.floor, long.masking.final_rate) == ("span", 0.3, None)
    phases = plan(RunConfig.model_validate({**two(), "masking": masking}))
    assert [phases[0].masking_rate(step) for step in (0, 9)] == [0.3, 0.15]
    assert [phases[1].masking_rate(step) for step in (10, 13)] == [0.3, 0.15], "its schedule restarts"


# A non-default value for each subsection.
OTHERS: dict[str, dict[str, Any]] = {
    "fully_explored": {"placement": "same_batch", "segments_per_sequence": 2},
    "frequency": {"power": 0.7, "floor": 0.2, "sampler": "conditional_poisson", "estimator": "hajek"},
    "span": {"geometric_p": 0.3, "max_length": 5},
    "mapnet": {"hidden": 32, "floor": 0.5, "lr": 0.01},
    "auto": {"every_steps": 7},
}


@pytest.mark.parametrize("before", ["fully_explored", "frequency", "span", "mapnet", "auto"])
@pytest.mark.parametrize("after", list(SUBSECTIONS))
def test_a_new_strategy_keeps_only_its_own_subsections(before: str, after: str) -> None:
    settings = {name: OTHERS[name] for name in SUBSECTIONS[before]}
    values = {**two(masking={"strategy": after}), "masking": {"strategy": before, **settings}}
    found = RunConfig.model_validate(values).phase(1).masking
    for name in OTHERS:
        kept = settings[name] if name in settings and name in SUBSECTIONS[after] else {}
        assert getattr(found, name).model_dump(exclude_defaults=True) == kept, name


def test_auto_inherits_no_network_settings_that_it_chooses() -> None:
    network = {"hidden": 32, "gate": "never", "sampler": "conditional_poisson", "estimator": "hajek"}
    values = {**two(masking={"strategy": "auto"}), "masking": {"strategy": "mapnet", "mapnet": network}}
    section = RunConfig.model_validate(values).phase(1).masking.mapnet
    assert section.model_dump(exclude_defaults=True) == {"hidden": 32}


def test_a_phase_changes_single_fields_of_a_subsection() -> None:
    masking = {"strategy": "mapnet", "mapnet": {"hidden": 32, "floor": 0.5}}
    values = {**two(masking={"mapnet": {"floor": 0.1}}), "masking": masking}
    section = RunConfig.model_validate(values).phase(1).masking.mapnet
    assert (section.hidden, section.floor) == (32, 0.1)
    explored = {"strategy": "fully_explored", "fully_explored": {"placement": "same_batch", "segments_per_sequence": 2}}
    values = {**two(masking={"fully_explored": {"placement": "across_epochs"}}), "masking": explored}
    found = RunConfig.model_validate(values).phase(1).masking
    assert found == MaskingConfig(strategy="fully_explored"), "segments_per_sequence is not inherited"


def test_a_run_without_phases_is_one_phase() -> None:
    values = {"output_dir": "x", "data": {"path": "c"}, "training": {"steps": 7}}
    config = RunConfig.model_validate(values)
    (phase,) = plan(config)
    assert phase.config == config
    assert (phase.name, phase.first_step, phase.last_step, phase.first_sample) == (None, 0, 7, 0)


def test_dump_round_trip(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TWO))
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_assignments_name_a_phase(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TWO), ["phases.long.training.steps=6", "phases.0.optimizer.lr=2e-3"])
    assert [plan(config)[i].last_step for i in (0, 1)] == [10, 16]
    assert config.phase(0).optimizer.lr == 2e-3
    strategy = "phases.long.masking.strategy"
    config = load_config(
        write(tmp_path, TWO), [f"{strategy}=span", "phases.long.masking.span.max_length=3", f"{strategy}=mapnet"]
    )
    assert config.phase(1).masking == MaskingConfig(strategy="mapnet"), "a later strategy drops the subsections"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**two(), "data": "corpus"}, r"data: a mapping of fields expected \(given: 'corpus'\)"),
        (two(data="corpus"), r"phases.long.data: a mapping of fields expected \(given: 'corpus'\)"),
        (two(start=None), r"phases.long.start: required, to state what is carried over from phase 'short': moments"),
        (two(start={"moments": "keep", "schedule": "restart"}), "phases.1.start.step_counter: required, but not given"),
        (two(start={**RESTART, "moments": "half"}), "phases.1.start.moments: Input should be 'keep' or 'zero'"),
        (two(name="short"), "two are named 'short'"),
        (two(name="2"), "phases.1.name: String should match pattern"),
        (two(model={"hidden_size": 8}), "phases.1.model: unknown key; known keys are name, start, data, masking"),
        (two(optimizer={"eps": 1e-8}), "phases.long.optimizer.eps: only lr may differ between phases"),
        (two(batch={"globl_size": 8}), "phases.long: batch.globl_size: unknown key; known keys are global_size"),
        (two(masking={"rate": 2}), r"phases.long: masking.rate: Input should be less than 1 \(given: 2\)"),
        (two(schedule={"warmup_steps": 5}), "phases.long: schedule.warmup_steps 5 exceeds the schedule's 4 steps"),
        (two(training={}), r"phases.long.training.steps: an integer from 1 to 1,000,000,000 required"),
        (two(data={"prefetch": 3}), "phases.long.data.path: required, but not given"),
        (two(start={**RESTART, "schedule": "continue"}), "phases.long.schedule: its schedule continues; remove it"),
        ({**TWO, "training": {"steps": 9}}, r"training.steps: set by each phase; .*set phases.NAME"),
        ({**TWO, "data": {"path": "c"}}, "data.path: set by each phase"),
        ({**TWO, "phases": [{**TWO["phases"][1]}]}, "phases.long.start: the first phase has no predecessor"),
    ],
)
def test_faults_are_named(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        load_config(write(tmp_path, values))
    assert len(str(error.value).splitlines()) == 2, "the file, then one fault"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("phases.lng.training.steps=6", "no 'lng' there; there are short, long"),
        ("phases.long=1", "phases is a list; name the field of one entry"),
        ("schedule.warmup_share=0.1", "warmup_steps 3 and warmup_share 0.1 both set the length"),
        ("schedule.decay=exponential", "decay exponential needs decay_rate and decay_steps"),
        ("schedule.decay_rate=0.9", "belong to decay exponential"),
        ("phases.long.schedule.initial_lr=1", "phases.long: schedule.initial_lr 1.0 exceeds optimizer.lr 0.0005"),
    ],
)
def test_faulty_assignments_are_named(tmp_path: Path, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, TWO), [assignment])


def test_counting() -> None:
    short, long = plan(RunConfig.model_validate(TWO))
    assert (short.first_step, short.last_step, long.first_step, long.last_step) == (0, 10, 10, 14)
    assert (short.first_sample, long.first_sample) == (0, 160)
    assert long.run_steps == 14
    assert len({phase.key(use) for phase in (short, long) for use in (1, 2)}) == 4
    history = [done(short, 10, 32), done(long, 1, 64)]
    assert tokens_after(long, long.first_sample + 2 * 8, history, 64) == 10 * 16 * 32 + 2 * 8 * 64
    assert tokens_after(short, 3 * 16, history[:1], 32) == 3 * 16 * 32


def test_a_schedule_restarts_or_continues() -> None:
    restarting = plan(RunConfig.model_validate(TWO))[1]
    own = restarting.config.schedule
    assert [restarting.learning_rate(10 + s) for s in range(4)] == [
        learning_rate(s, own, peak=5e-4, total_steps=4) for s in range(4)
    ]
    continuing = two(start={**RESTART, "schedule": "continue"}, schedule=None, optimizer=None)
    phases = plan(RunConfig.model_validate(continuing))
    joint = [learning_rate(s, phases[0].config.schedule, peak=1e-3, total_steps=14) for s in range(14)]
    assert [phases[s >= 10].learning_rate(s) for s in range(14)] == joint
    continuing["phases"][0]["training"]["schedule_steps"] = 13
    with pytest.raises(ValueError, match=r"phases.short.training.schedule_steps 13: .* take 14 steps"):
        RunConfig.model_validate(continuing)


def state(step: int, *phases: dict[str, Any]) -> CheckpointState:
    return CheckpointState(
        step=step,
        samples=0,
        world_size=2,
        zero_stage=1,
        dtype="float32",
        partitions=[],
        identity={},
        phases=list(phases),
    )


def test_phase_to_resume_in() -> None:
    phases = plan(RunConfig.model_validate(TWO))
    short, long = phases
    assert next_phase(phases, state(7, done(short, 7, 32))) == 0
    assert next_phase(phases, state(10, done(short, 10, 32))) == 1, "at the boundary: the next phase"
    assert next_phase(phases, state(12, done(short, 10, 32), done(long, 2, 64))) == 1
    assert next_phase(phases, state(14, done(short, 10, 32), done(long, 4, 64))) == 1, "finished: the last phase"
    more = plan(RunConfig.model_validate({**TWO, "phases": [{**TWO["phases"][0], "training": {"steps": 12}}]}))
    assert next_phase(more, state(10, done(short, 10, 32))) == 0, "the last phase reached may be extended"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training": {"steps": 8}},
            r"phase 'short' is finished: 10 steps of 16 sequences .* has 8 of 16",
        ),
        ({"batch": {"global_size": 32}}, "phase 'short' is finished: .* has 10 of 32; restore phases.short"),
        ({"name": "brief"}, "reached in phases short, long, the configuration has brief, long"),
    ],
)
def test_a_finished_phase_cannot_change(changes: dict[str, Any], message: str) -> None:
    short, long = plan(RunConfig.model_validate(TWO))
    changed = {**TWO, "phases": [{**TWO["phases"][0], **changes}, TWO["phases"][1]]}
    with pytest.raises(CheckpointError, match=message):
        next_phase(plan(RunConfig.model_validate(changed)), state(12, done(short, 10, 32), done(long, 2, 64)))


def test_whether_a_checkpoint_ends_its_phase() -> None:
    short, long = plan(RunConfig.model_validate(TWO))
    for step, expected in ((7, False), (10, True)):
        written = replace(state(step, done(short, step, 32)), settings={"training.steps": 10})
        assert ends_phase(written) == expected
    second = replace(state(12, done(short, 10, 32), done(long, 2, 64)), settings={"training.steps": 4})
    assert not ends_phase(second)
    assert not ends_phase(state(0))


def test_a_phase_without_warm_up_or_end_inherits_nothing_that_belongs_to_them() -> None:
    values = {**TWO, "schedule": {"warmup_steps": 3, "warmup_power": 2.0, "initial_lr": 1e-6, "final_lr": 1e-5}}

    def second(**schedule: Any) -> Any:
        phases = [TWO["phases"][0], {**TWO["phases"][1], "schedule": schedule}]
        return RunConfig.model_validate({**values, "phases": phases}).phase(1).schedule

    for off in ({"warmup_steps": 0}, {"warmup_share": 0.0}):
        found = second(**off)
        assert (found.warmup(4), found.warmup_power, found.initial_lr, found.final_lr) == (0, 1.0, 0.0, 1e-5)
    for on in ({"warmup_steps": 1}, {"warmup_steps": 0, "warmup_share": 0.5}):
        assert (second(**on).warmup_power, second(**on).initial_lr) == (2.0, 1e-6)
    assert second(decay="constant").final_lr == 0.0
    with pytest.raises(ValueError, match=r"phases\.long: schedule\.warmup_power 3: there is no warm-up"):
        second(warmup_steps=0, warmup_power=3)


def test_phases_cannot_be_added_later() -> None:
    (single,) = plan(RunConfig.model_validate({"output_dir": "x", "data": {"path": "a"}, "training": {"steps": 9}}))
    phases = plan(RunConfig.model_validate(TWO))
    for written in (state(5, done(single, 5, 32)), state(5)):
        assert next_phase([single], written) == 0
        with pytest.raises(CheckpointError, match=r"reached in phases \(unnamed\), the configuration has short, long"):
            next_phase(phases, written)


@pytest.mark.parametrize("moments", ["keep", "zero"])
@pytest.mark.parametrize("step_counter", ["keep", "zero"])
def test_start_policy_on_each_kind_of_state(moments: Any, step_counter: Any) -> None:
    """step: an int in the state (Lamb), a tensor in the state (torch's AdamW), an int in the group (FusedAdam)."""
    from maskvr_ds.lamb import Lamb

    start = PhaseStart(moments=moments, step_counter=step_counter, schedule="restart")
    optimizers: list[torch.optim.Optimizer] = []
    for make in (Lamb, torch.optim.AdamW, torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.ones(3))
        weight.grad = torch.ones(3)
        optimizers.append(make([weight], lr=0.1))
        optimizers[-1].step()
    fused = optimizers[2]
    fused.param_groups[0]["step"] = int(next(iter(fused.state.values())).pop("step"))
    for optimizer in optimizers:
        apply_start(optimizer, start)
        (values,) = optimizer.state.values()
        assert (values["exp_avg"] == 0).all() == (values["exp_avg_sq"] == 0).all() == (moments == "zero")
        step = values["step"] if "step" in values else optimizer.param_groups[0]["step"]
        assert step == (0 if step_counter == "zero" else 1)
        assert (next(iter(optimizer.param_groups[0]["params"])) != 1).all(), "weights are kept"


def test_phase_history_is_json_serializable(tmp_path: Path) -> None:
    import json

    short, _ = plan(RunConfig.model_validate(TWO))
    entry = done(short, 3, 32)
    assert json.loads(json.dumps(entry)) == entry
    assert replace(state(0), phases=[entry]).phases == [entry]
