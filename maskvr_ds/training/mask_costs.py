"""Seconds of a step per candidate of masking.strategy auto, and of a measurement: measured once, stored, never again.

Choices must not depend on a clock that is read while training: ranks would differ, and so would a resumed run. The
costs of a phase are taken, in this order, from

1. the checkpoint that the run resumes from,
2. RUN/mask_costs.json, written before the first step,
3. the file masking.auto.costs, which must come from an equal machine and run,
4. steps of an engine that is made for this purpose and destroyed before the run's own one is made. Its learning rate is
   0, and its weights are not those of the run. Candidates take turns; of each, the median over rounds counts, and of
   the ranks' medians the highest.

A resume on other ranks or another machine keeps the costs: 1 comes first.

Model of the costs: uniform masks are measured at every rate and at every layer at which [MASK] may enter; disjoint
segments and the proposal (with its training) add to that what they add at the highest rate. A proposal that learns at
every n-th step only (mapnet.learn_every) adds the mean over n steps, of which one learns and n − 1 propose alone; both
kinds are measured. A measurement of progress, with all candidates, is timed once, too: how often the run makes one
follows from its seconds (auto_spacing.py). Seconds are those of the clock on GPUs, and those of the process's CPU time
without one, where other programs would disturb the clock.

Collectives: those of training steps and of two measurements; `run_on_rank0` and two `gather_objects`.
"""

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, MapNetConfig, RunConfig
from maskvr_ds.config.deepspeed import zero_stage
from maskvr_ds.config.masking import FEWEST_ROWS
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.deepspeed_patches import free_memory
from maskvr_ds.engine.ds_config import model_dtype
from maskvr_ds.engine.engine import set_learning_rate
from maskvr_ds.masking.checks import maskable_counts
from maskvr_ds.masking.factory import create_masker, create_proposer
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import STRATEGIES
from maskvr_ds.run_folder.checkpoints import CheckpointError
from maskvr_ds.run_folder.layout import MASK_COSTS
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import atomic_write, parse_json
from maskvr_ds.training.auto_choice import PROPOSAL, SEGMENTS, UNIFORM, MaskingPlan, ladder, plain, segment_counts
from maskvr_ds.training.auto_measurement import late_masks_of
from maskvr_ds.training.auto_strategy import Chooser
from maskvr_ds.training.phases import RunPhase
from maskvr_ds.training.resume import ResumePoint
from maskvr_ds.training.step import run_step
from maskvr_ds.training.step_costs import Needed, StepCosts

# Timed rounds, after one that is not.
_ROUNDS = 5
# Rows of the timed measurement: its seconds are proportional to them.
_TIMED_ROWS = 8
# A case besides the strategies: a step at which MAPNet proposes the masks and does not learn.
_BETWEEN = "mapnet without learning"
# What of `machine` belongs to the run and not to where it trains.
_OF_SETTINGS = ("global_size", "sequence_length", "vocab_size", "attention", "late_layer", "mapnet", "model")
# Strategy or _BETWEEN, rate, layer at which [MASK] enters.
_Case = tuple[str, float, int]

logger = logging.getLogger(__name__)


def needed(config: RunConfig, corpus: Corpus) -> Needed:
    """config: of a phase."""
    masking, n, counts = config.masking, corpus.sequence_length - 2, maskable_counts(corpus)
    rates = ladder(masking.rate, masking.final_rate)
    divided = any(
        segment_counts(n, rate, config.batch.global_size) or plain(counts, rate).strategy == SEGMENTS for rate in rates
    )
    strategies = (*((SEGMENTS,) if divided else ()), *((PROPOSAL,) if masking.auto.proposal else ()))
    return Needed(rates, strategies, masking.auto.late_layers)


def machine(config: RunConfig, corpus: Corpus, deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """What the seconds of a step depend on besides the masks, of rank 0, in JSON types. Collective: call on all
    ranks."""

    def describe() -> dict[str, Any]:
        found = {
            "device": distributed.device_name(),
            "ranks": distributed.world_size(),
            "global_size": config.batch.global_size,
            "micro_size": config.batch.micro_size,
            "sequence_length": corpus.sequence_length,
            "vocab_size": corpus.manifest.vocab_size,
            "zero_stage": zero_stage(deepspeed_config),
            "dtype": str(model_dtype(deepspeed_config)).removeprefix("torch."),
            "compile": config.training.compile,
            "attention": config.data.attention,
            "late_layer": config.masking.late_layer,
            "mapnet": _network(config.masking.mapnet),
            "model": config.model.identity(),
        }
        return dict(json.loads(json.dumps(found)))

    return distributed.run_on_rank0(describe)


def _network(mapnet: MapNetConfig) -> dict[str, Any]:
    """What the time of MAPNet depends on. Without learn_every 1, which costs of earlier versions do not name: those of
    other values were measured as if it were 1."""
    found = mapnet.model_dump(include={"layers", "hidden", "reach", "cost", "learn_every"})
    if found["learn_every"] == 1:
        del found["learn_every"]
    return found


def resolve_costs(
    phase: RunPhase, corpus: Corpus, here: Mapping[str, Any], point: ResumePoint, make_engine: Callable[[], Any]
) -> tuple[StepCosts, float]:
    """Costs of a phase's candidates: stored ones, or measured now. Also the seconds that measuring took; 0 if another
    run measured them, or if metrics.jsonl has them already. Collective: call on all ranks."""
    config, started, took = phase.config, time.perf_counter(), 0.0
    wanted = needed(config, corpus)
    state = None if point.checkpoint is None else point.checkpoint.state
    # A phase that starts from the last checkpoint of the previous one has none yet.
    auto = {} if state is None or len(state.phases) == phase.index > 0 else state.auto

    def find() -> StepCosts | None:
        check_plan_of_checkpoint(config, auto)
        return stored_costs(config, phase.index, wanted, here, auto.get("costs"))

    costs = distributed.run_on_rank0(find)
    if costs is None:
        logger.info("masking.strategy auto: measuring the seconds of a step with each candidate")
        costs = measure_costs(config, corpus, wanted, here, make_engine)
        took = time.perf_counter() - started
        if auto and (auto.get("costs") or {}).get("per_pass") is None:
            costs = replace(costs, per_pass=None)  # a run of an earlier version keeps its interval
    elif point.checkpoint is None:
        took = distributed.run_on_rank0(lambda: _seconds_of_run(config.output_dir, phase.index, wanted, here))
    if costs.machine != here:
        differ = [name for name in here if costs.machine.get(name) != here[name]]
        logger.info("masking.strategy auto: costs of another machine or layout (%s) are kept", ", ".join(differ))
    logger.info("masking.strategy auto: seconds of a step: %s", costs)
    return costs, took


def check_plan_of_checkpoint(config: RunConfig, auto: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the run could not continue with the masks that a checkpoint had chosen. auto: its
    state."""
    masking = config.masking
    if auto and "rate" not in auto and masking.final_rate is not None:
        raise CheckpointError(
            f"masking.final_rate {masking.final_rate:g}: the checkpoint is of an earlier version, whose strategy auto "
            "followed a linear schedule of the rate; this version decides by measurements when it falls, and could not "
            "continue it. Start a new run, or resume with that version"
        )
    rates = ladder(masking.rate, masking.final_rate)
    if (rate := auto.get("rate", masking.rate)) not in rates:
        raise CheckpointError(
            f"masking.rate {masking.rate:g}: strategy auto trains at {rate:g}, which is not among the rates "
            f"{', '.join(f'{x:g}' for x in rates)} from masking.rate to final_rate; restore both"
        )
    if (late := auto.get("late_layer", 0)) not in (0, *masking.auto.late_layers):
        raise CheckpointError(
            f"masking.auto.late_layers: strategy auto trains with [MASK] from layer {late} at this checkpoint; add it"
        )
    if auto.get("strategy") == PROPOSAL and not masking.auto.proposal:
        raise CheckpointError(
            "masking.auto.proposal false: strategy auto trains with the proposal at this checkpoint; set it to true"
        )


def stored_costs(
    config: RunConfig, phase: int, needed: Needed, here: Mapping[str, Any], in_checkpoint: Any
) -> StepCosts | None:
    """Costs that need not be measured. Call on one rank. Raises ConfigError for a file that does not apply.

    in_checkpoint: content of the checkpoint, None if it has none. here: `machine`.
    """
    file = config.masking.auto.costs
    own = _of_run(config.output_dir, phase, here) if in_checkpoint is None else StepCosts.read(in_checkpoint)
    if own is not None and own.lacks(needed) is None:
        if file is not None and file.is_file() and _imported(file).stored() != own.stored():
            raise ConfigError(
                f"masking.auto.costs {file}: differs from the costs that the run has followed so far, and a run keeps "
                "its costs; remove the setting, or start a new run"
            )
        return own
    if file is None:
        return None
    costs = _imported(file)
    for name, value in here.items():
        if costs.machine.get(name) != value:
            raise ConfigError(
                f"masking.auto.costs {file}: measured with {name} {costs.machine.get(name)!r}, this run has {value!r}, "
                "and seconds of another machine or batch say nothing about this one's; remove the setting to measure "
                "them here, or measure them by `maskvr benchmark strategy-cost --config`"
            )
    if (missing := costs.lacks(needed)) is not None:
        raise ConfigError(
            f"masking.auto.costs {file}: no seconds of {missing}, which is a candidate; measure them with this "
            "configuration (`maskvr benchmark strategy-cost --config`), or remove the setting"
        )
    return costs


def _imported(file: Path) -> StepCosts:
    try:
        content = parse_json(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"masking.auto.costs {file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise ConfigError(f"masking.auto.costs {file}: not valid JSON") from None
    # Of a run, those of its first phase.
    if isinstance(content, dict) and "phases" in content:
        content = next(iter(content["phases"].values()), None) if isinstance(content["phases"], dict) else None
    try:
        return StepCosts.read(content)
    except ValueError as error:
        raise ConfigError(f"masking.auto.costs {file}: {error}") from None


def _of_run(run: Path, phase: int, here: Mapping[str, Any]) -> StepCosts | None:
    """Costs in the run's folder; None if it has none, or none that can be read, or those of a start with other settings
    that has left no checkpoint."""
    try:
        costs = StepCosts.read(parse_json((run / MASK_COSTS).read_bytes())["phases"][str(phase)])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if changed := [name for name in _OF_SETTINGS if costs.machine.get(name) != here.get(name)]:
        logger.info("%s: of a start with other settings (%s), not used", run / MASK_COSTS, ", ".join(changed))
        return None
    return costs


def _seconds_of_run(run: Path, phase: int, needed: Needed, here: Mapping[str, Any]) -> float:
    """Seconds that an earlier start of the run took to measure the costs in its folder; 0 if these are not used."""
    own = _of_run(run, phase, here)
    if own is None or own.lacks(needed) is not None:
        return 0.0
    try:
        return float(parse_json((run / MASK_COSTS).read_bytes())["seconds"][str(phase)])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def write_costs(run: Path, phase: int, costs: StepCosts, took: float = 0.0) -> None:
    """Add the phase's costs, and the seconds that measuring them took, to RUN/mask_costs.json. Call on one rank, not
    before `run.mark_running`: a start that fails must leave a folder in which another one may start."""
    try:
        content = dict(parse_json((run / MASK_COSTS).read_bytes()))
        phases, seconds = dict(content["phases"]), dict(content.get("seconds", {}))
    except (OSError, ValueError, KeyError, TypeError):
        phases, seconds = {}, {}
    phases[str(phase)] = costs.stored()
    if took:
        seconds[str(phase)] = took
    measured = {"seconds": seconds} if seconds else {}
    atomic_write(run / MASK_COSTS, json.dumps({"phases": phases, **measured}, indent=1) + "\n")


def measure_costs(
    config: RunConfig,
    corpus: Corpus,
    needed: Needed,
    here: Mapping[str, Any],
    make_engine: Callable[[], Any],
    rounds: int = _ROUNDS,
) -> StepCosts:
    """Measure the candidates' costs. Collective: call on all ranks.

    make_engine: an engine like the run's; it is destroyed. rounds: timed steps of every candidate.
    """
    engine = make_engine()
    engine.train()
    device, masking = distributed.device(), config.masking
    highest, learn_every = needed.rates[0], masking.mapnet.learn_every
    proposer = _proposer(config, corpus, engine) if PROPOSAL in needed.strategies else None
    timed = proposer is not None and masking.mapnet.cost is None
    masker = create_masker(
        masking, corpus, seed=0, device=device, proposal=None if proposer is None else proposer.propose
    )
    loader = Loader(
        corpus,
        seed=0,
        global_size=config.batch.global_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        device=device,
    )
    cases = [(UNIFORM, rate, late) for late in (0, *needed.late_layers) for rate in needed.rates]
    cases += [(s, highest, 0) for s in needed.strategies if s != PROPOSAL or timed]
    if timed and learn_every > 1:
        cases.append((_BETWEEN, highest, 0))
    times: dict[_Case, list[float]] = {case: [] for case in cases}
    set_learning_rate(engine, 0.0)
    batches = loader.batches()
    for round_ in range(rounds + 1):
        # Rotate the order: the state of the caches depends on the previous step.
        for case in _rotated(cases, round_):
            name, rate, late = case
            strategy = PROPOSAL if name == _BETWEEN else name
            learner = proposer if strategy == PROPOSAL else None
            masker.strategy = STRATEGIES[strategy]
            masker.fix_rate(rate)
            engine.module.observer = None
            engine.module.late_in_training = late_masks_of(MaskingPlan(strategy, 1, rate, late), corpus)
            if learner is not None:
                # The step before one at which it learns, or before one at which it does not.
                learner.run_step = learn_every - 1 if name == PROPOSAL else 0
                learner.attach(engine.module)
            seconds = _step_seconds(engine, masker, next(batches), config, learner)
            if round_:
                times[case].append(seconds)
    batches.close()
    ranks = distributed.gather_objects({case: statistics.median(found) for case, found in times.items()})
    of_case = {case: max(each[case] for each in ranks) for case in cases}
    uniform, *others = (
        {rate: of_case[UNIFORM, rate, late] for rate in needed.rates} for late in (0, *needed.late_layers)
    )
    added = {name: of_case[name, highest, 0] - uniform[highest] for name, _, _ in cases if name != UNIFORM}
    if _BETWEEN in added:
        added[PROPOSAL] = (added[PROPOSAL] + (learn_every - 1) * added.pop(_BETWEEN)) / learn_every
    added = {name: max(0.0, seconds) for name, seconds in added.items()}
    if PROPOSAL in needed.strategies and masking.mapnet.cost is not None:
        added[PROPOSAL] = masking.mapnet.cost * uniform[highest]
    costs = StepCosts(uniform, added, dict(here), dict(zip(needed.late_layers, others, strict=True)))
    engine.module.observer = None
    per_pass = _seconds_per_pass(config, engine, masker, loader, proposer, costs)
    engine.destroy()
    free_memory()
    return replace(costs, per_pass=per_pass)


def _proposer(config: RunConfig, corpus: Corpus, engine: Any) -> Proposer:
    proposer = create_proposer(config.masking.mapnet, corpus, engine.module.mlm.config, seed=0)
    proposer.gate = "always"
    return proposer


def _seconds_per_pass(
    config: RunConfig, engine: Any, masker: Masker, loader: Loader, proposer: Proposer | None, costs: StepCosts
) -> float:
    """Seconds of a measurement of all candidates, per pass of a row; a short one before it is the warm-up. It has few
    rows, though at least one per rank where auto.rows has as many. Collective: call on all ranks."""
    chooser = Chooser(
        config.masking,
        engine=engine,
        masker=masker,
        loader=loader,
        proposer=proposer,
        costs=costs,
        micro_size=config.batch.micro_size,
        seed=0,
    )
    for rows in (FEWEST_ROWS, min(config.masking.auto.rows, max(_TIMED_ROWS, distributed.world_size()))):
        distributed.barrier()
        distributed.wait_for_device()
        start = _clock()
        passes = chooser.rehearse(rows)
        distributed.wait_for_device()
        seconds = _clock() - start
    return max(distributed.gather_objects(seconds)) / passes


def _rotated(cases: Sequence[_Case], by: int) -> Sequence[_Case]:
    first = by % len(cases)
    return [*cases[first:], *cases[:first]]


def _step_seconds(engine: Any, masker: Any, batch: Any, config: RunConfig, proposer: Proposer | None) -> float:
    distributed.barrier()
    distributed.wait_for_device()
    start = _clock()
    run_step(engine, masker, batch, config.batch.micro_size, proposer, objectives=config.objectives)
    if proposer is not None:
        proposer.step()
    distributed.wait_for_device()
    return _clock() - start


def _clock() -> float:
    """Seconds: of the CPU time of this process without a GPU, where other programs would disturb the clock."""
    return time.process_time() if distributed.device().type == "cpu" else time.perf_counter()
