"""CPU-seconds and FLOPs of a training step of every case of masks.py, in one process, cases taking turns."""

import statistics
import time
from functools import partial
from typing import Any, NamedTuple

from maskvr_ds.config import RunConfig, load_config, run_deepspeed_config
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.engine import set_learning_rate
from maskvr_ds.masking.factory import create_masker
from maskvr_ds.masking.masker import Masker
from maskvr_ds.models.flops import flops_per_sequence
from maskvr_ds.runtime import distributed
from maskvr_ds.training.corpora import open_and_verify
from maskvr_ds.training.phases import RunPhase, plan
from maskvr_ds.training.setup import encoder_config, late_masks, trial_engine
from maskvr_ds.training.step import run_step


class Case(NamedTuple):
    """engine: shared by the cases in which [MASK] enters at the same layer."""

    config: RunConfig
    masker: Masker
    engine: Any
    flops: float


def measure(common: list[str], cases: dict[str, dict[str, Any]], rounds: int) -> dict[str, Any]:
    """Name → median and quartiles of the CPU-seconds of a step, and its FLOPs. On one rank.

    Steps of an engine like the run's at learning rate 0, each on the next rows of the corpus; the order rotates. A
    schedule is measured in the middle of its rates, with the slots per row of that stage.
    """
    engines: dict[int, Any] = {}
    prepared, loader = {}, None
    for name, values in cases.items():
        run = load_config("demo_cpu", [*common, *(f"{key}={value}" for key, value in values.items())])
        phase = plan(run)[0]
        corpus, _ = open_and_verify(phase)
        prepared[name] = _prepare(phase, corpus, run_deepspeed_config(run), engines)
        if loader is None:
            size = run.batch.global_size
            loader = Loader(corpus, seed=0, global_size=size, rank=0, world_size=1, device=distributed.device())
    assert loader is not None, "no cases"
    times: dict[str, list[float]] = {name: [] for name in cases}
    batches, order = loader.batches(), list(cases)
    for round_ in range(rounds + 1):
        first = round_ % len(order)
        for name in order[first:] + order[:first]:
            case, batch = prepared[name], next(batches)
            started = time.process_time()
            run_step(case.engine, case.masker, batch, case.config.batch.micro_size)
            if round_:
                times[name].append(time.process_time() - started)
    batches.close()
    return {
        name: {
            "quartiles": statistics.quantiles(found, n=4),
            "median": statistics.median(found),
            "flops": prepared[name].flops,
        }
        for name, found in times.items()
    }


def _prepare(phase: RunPhase, corpus: Any, deepspeed: dict[str, Any], engines: dict[int, Any]) -> Case:
    config = phase.config
    masking, size = config.masking, config.batch.micro_size
    encoder = encoder_config(config.model, corpus, None)
    make = partial(trial_engine, phase, corpus, encoder, deepspeed)
    if masking.late_layer not in engines:
        engine = engines[masking.late_layer] = make()
        engine.train()
        set_learning_rate(engine, 0.0)
    masker = create_masker(masking, corpus, seed=0, device=distributed.device())
    if masking.final_rate is not None:
        masker.set_rate((masking.rate + masking.final_rate) / 2)
    slots, late = masker.maximum_predictions, late_masks(config, corpus)
    flops = size * flops_per_sequence(encoder, corpus.sequence_length, slots, batch=size, late=late)
    return Case(config, masker, engines[masking.late_layer], flops)
