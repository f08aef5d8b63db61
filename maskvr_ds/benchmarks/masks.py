"""`maskvr benchmark masking-speed` (rows per CPU-second) and `strategy-cost` (time that a strategy adds to a step)."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.benchmarks.corpus import (
    FIRST_ORDINARY,
    SPECIAL,
    VOCABULARY,
    make_corpus,
    one_thread,
    rows_per_cpu_second,
)
from maskvr_ds.config import BatchConfig, MapNetConfig, ModelConfig, OptimizerConfig, deepspeed_config_path
from maskvr_ds.config.deepspeed import read_deepspeed_config
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.engine import create_engine
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import Parameters, span_thresholds
from maskvr_ds.models.architectures import transformers_config
from maskvr_ds.runtime import distributed
from maskvr_ds.training.step import run_step

# Name → strategy, sampler, estimator. The baseline is uniform.
_CASES = {
    "uniform": ("uniform", "pareto", "horvitz_thompson"),
    "fully_explored": ("fully_explored", "pareto", "horvitz_thompson"),
    "whole_word": ("whole_word", "pareto", "horvitz_thompson"),
    "span": ("span", "pareto", "horvitz_thompson"),
    "frequency": ("frequency", "pareto", "horvitz_thompson"),
    "frequency_exact": ("frequency", "conditional_poisson", "hajek"),
    "mapnet": ("mapnet", "pareto", "horvitz_thompson"),
}


def _parameters(**options: Any) -> Parameters:
    """Synthetic parameters: words of one and a half tokens on average, scores of a Zipf distribution."""
    order = torch.arange(VOCABULARY)
    return Parameters(
        token_scores=(order + 1.0).double().sqrt(),
        floor=0.3,
        word_starts=order % 3 < 2,
        span_thresholds=span_thresholds(0.2, 10),
        **options,
    )


def masking_speed(*, strategy: str = "uniform", batch_size: int = 256, sequence_length: int = 128) -> dict[str, Any]:
    """Rows masked per CPU-second of one thread: rate 15%, corruption 80/10/10, new rows in each batch. mapnet:
    including its own training, one step per batch."""
    proposer = None
    if strategy == "mapnet":
        proposer = Proposer(
            MapNetConfig(), vocab_size=VOCABULARY, max_length=sequence_length, seed=0, device=torch.device("cpu")
        )
    masker = Masker(
        vocab_size=VOCABULARY,
        mask_id=SPECIAL.mask,
        special_ids=SPECIAL.all,
        sequence_length=sequence_length,
        seed=0,
        strategy=strategy,
        parameters=_parameters(proposal=None if proposer is None else proposer.propose),
    )
    batches = 300 if proposer is None else 5
    ids = np.random.default_rng(0).integers(FIRST_ORDINARY, VOCABULARY, (batch_size, sequence_length))
    ids[:, 0], ids[:, -1] = SPECIAL.cls, SPECIAL.sep
    input_ids = torch.from_numpy(ids.astype(np.uint16))
    samples = torch.arange(batch_size)
    epochs = torch.zeros(batch_size, dtype=torch.int64)

    def round_() -> int:
        nonlocal samples
        for _ in range(batches):
            samples = samples + batch_size
            batch = TokenBatch(input_ids, samples, epochs)
            masked = masker(batch)
            if proposer is not None:
                # Instead of BERT: gradients of the right shape that cost almost nothing.
                hidden = torch.rand(*masked.positions.shape, 1, requires_grad=True)
                losses = hidden.square().sum(-1)
                proposer.norms.watch(hidden, losses)
                (losses * masked.weights).sum().backward()
                proposer.observe(batch, masker.maskable(batch), masked)
                proposer.step()
        return batches * batch_size

    with one_thread():
        figures = rows_per_cpu_second(round_)
    what = f"masking ({strategy}) and corruption, L = {sequence_length}, batches of {batch_size}"
    return {"what": what, **figures}


class _Stopwatch:
    """CPU seconds that this process spends in the calls of selected methods."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = function(*args, **options)
            self.seconds += time.process_time() - start
            return result

        return call

    @contextmanager
    def on(self, owner: type, *names: str) -> Iterator[None]:
        """Time these methods of a class inside the `with` block."""
        originals = {name: getattr(owner, name) for name in names}
        for name, method in originals.items():
            setattr(owner, name, self.timed(method))
        try:
            yield
        finally:
            for name, method in originals.items():
                setattr(owner, name, method)


@dataclass(frozen=True)
class _StepTimes:
    """Strategy → a value per round. elapsed, cpu_time: seconds of a step. shares: CPU time of all masking code divided
    by that of the rest of the step."""

    elapsed: dict[str, list[float]]
    cpu_time: dict[str, list[float]]
    shares: dict[str, list[float]]


def strategy_cost(
    *, preset: str, deepspeed: str, micro_size: int, rounds: int, sequence_length: int, threads: int | None
) -> dict[str, Any]:
    """Optimizer steps of one engine, one micro-batch per rank, with each strategy in turn; the first round is warm-up.

    Returns, for each strategy, by how much a step takes longer than the step with uniform masks of the same round, in
    elapsed and in CPU time (`adds`); this resolves only what exceeds the noise of steps. On CPUs also `share`, which
    resolves more: the CPU time of selecting, corrupting and training the proposal, divided by that of the rest of the
    step.
    """
    distributed.initialize()
    device, world_size = distributed.device(), distributed.world_size()
    if threads is not None:
        torch.set_num_threads(threads)
    model = ModelConfig.model_validate({"preset": preset, "max_position_embeddings": max(512, sequence_length)})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(distributed.broadcast_object(scratch))
        if distributed.rank() == 0:
            make_corpus(folder / "corpus", rows=4_096, sequence_length=sequence_length)
        distributed.barrier()
        corpus = Corpus(folder / "corpus")
        engine = create_engine(
            transformers_config(model, vocab_size=VOCABULARY, pad_id=SPECIAL.pad),
            read_deepspeed_config(deepspeed_config_path(deepspeed)),
            model=model,
            batch=BatchConfig(global_size=micro_size * world_size, micro_size=micro_size),
            optimizer=OptimizerConfig(),
            accumulation=1,
            seed=0,
        )
        engine.train()
        proposer = Proposer(
            MapNetConfig(), vocab_size=VOCABULARY, max_length=model.max_position_embeddings, seed=0, device=device
        )
        loader = Loader(
            corpus,
            seed=0,
            global_size=micro_size * world_size,
            rank=distributed.rank(),
            world_size=world_size,
            device=device,
        )
        times = _time_steps(engine, proposer, _maskers(corpus, proposer, device), loader, rounds)
    threads_used = f"cpu, {torch.get_num_threads()} threads"
    figures: dict[str, Any] = {
        "what": f"step of {preset}, L = {sequence_length}, {deepspeed}, {world_size} ranks × {micro_size} sequences",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads_used,
        "versions": f"torch {torch.__version__}",
        "rounds": rounds,
        "uniform_seconds_median": statistics.median(times.elapsed["uniform"]),
    }
    return figures | _added_cost(times, with_shares=device.type == "cpu")


def _maskers(corpus: Corpus, proposer: Proposer, device: torch.device) -> dict[str, Masker]:
    """A masker for each of _CASES."""
    return {
        name: Masker.for_corpus(
            corpus.manifest,
            seed=0,
            strategy=strategy,
            parameters=_parameters(sampler=sampler, estimator=estimator, proposal=proposer.propose),
            device=device,
        )
        for name, (strategy, sampler, estimator) in _CASES.items()
    }


def _time_steps(engine: Any, proposer: Proposer, maskers: dict[str, Masker], loader: Loader, rounds: int) -> _StepTimes:
    """Time a step with each masker, `rounds` times after a warm-up round. Collective: call on all ranks."""
    names = list(maskers)
    times = _StepTimes(*({name: list[float]() for name in names} for _ in range(3)))
    batches = loader.batches()
    for round_ in range(rounds + 1):
        # Rotate the order: the state of the caches depends on the previous step.
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            batch, masker = next(batches), maskers[name]
            engine.module.observer = None
            if name == "mapnet":
                proposer.attach(engine.module)
            distributed.barrier()
            distributed.wait_for_device()
            masking = _Stopwatch()
            with masking.on(Masker, "__call__"), masking.on(Proposer, "observe", "step"):
                start, cpu_start = time.perf_counter(), time.process_time()
                run_step(engine, masker, batch, loader.share, proposer if name == "mapnet" else None)
                if name == "mapnet":
                    proposer.step()
                distributed.wait_for_device()
                seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if round_:
                times.elapsed[name].append(seconds)
                times.cpu_time[name].append(cpu_seconds)
                times.shares[name].append(masking.seconds / (cpu_seconds - masking.seconds))
    batches.close()
    return times


def _added_cost(times: _StepTimes, *, with_shares: bool) -> dict[str, float]:
    """Minimum, median and maximum over rounds of each strategy's added time and, if asked for, share."""
    figures: dict[str, float] = {}
    for name in (name for name in times.elapsed if name != "uniform"):
        for kind, seconds in (("", times.elapsed), ("_cpu_time", times.cpu_time)):
            ratios = [own / uniform - 1 for own, uniform in zip(seconds[name], seconds["uniform"], strict=True)]
            for statistic in (min, statistics.median, max):
                figures[f"{name}_adds{kind}_{statistic.__name__}"] = statistic(ratios)
    for name in times.shares if with_shares else ():
        for statistic in (min, statistics.median, max):
            figures[f"{name}_share_{statistic.__name__}"] = statistic(times.shares[name])
    return figures
