"""`batch.micro_size: auto`: the largest micro-batch that fits into the GPUs' memory, found by real training steps.

Candidates are the divisors of a rank's share of the global batch, so that the global batch stays what it is. They are
tried by doubling until one does not fit, then by bisection. All ranks try the same one at the same time, and it fits if
it does on all of them. A trial is two micro-batches of the corpus' rows and an update, at ZeRO stages 0 to 2, without
communication (engine/silent.py) and without torch.compile, which needs less memory, within `_USABLE` of the memory. In
fp16 DeepSpeed skips updates until the loss scale is low enough: a trial continues until one took place.

The number goes into config.yaml of the run: a resume takes it from there and tries nothing.

Collectives: `distributed.run_collectively`, `gather_objects` and `run_on_rank0`; those of `create_engine`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.shards import Corpus
from maskvr_ds.config import ConfigError, RunConfig, load_config, run_deepspeed_config
from maskvr_ds.config.deepspeed import zero_stage
from maskvr_ds.config.run import raw_values, validated
from maskvr_ds.data.batch import TokenBatch
from maskvr_ds.data.loader import read_rows, to_device
from maskvr_ds.data.mixture import open_training_corpus
from maskvr_ds.engine.deepspeed_patches import free_memory
from maskvr_ds.engine.engine import create_engine, loss_scale, step_and_norm
from maskvr_ds.engine.silent import without_communication
from maskvr_ds.masking.factory import create_masker
from maskvr_ds.models.losses import objective_losses
from maskvr_ds.run_folder.layout import CONFIG
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE
from maskvr_ds.training.resume import ResumePoint
from maskvr_ds.training.setup import encoder_config, late_masks, separator_of

logger = logging.getLogger(__name__)

# Share of the free memory that trials may use: the rest is for the communication library, fragmentation and what else a
# run allocates (evaluation, metrics).
_USABLE = 0.92


def resolve_micro_sizes(config: RunConfig, point: ResumePoint) -> RunConfig:
    """The configuration with a number for every batch.micro_size that is auto. Collective: call on all ranks.

    point: where the run resumes; the run that its checkpoint is of has found its numbers already. With another number
    of ranks, the largest divisor of their share up to that number is taken. Raises ConfigError on all ranks if there
    are no GPUs, or unequal ones, or a setting that the trials do not cover, or if a single sequence does not fit.
    """
    phases = config.named_phases()
    if not any(phase.batch.is_auto for _, phase in phases):
        return config
    stored = distributed.run_on_rank0(lambda: _stored(point.folder, len(phases)))
    found: dict[int, int] = {}
    for index, (where, phase) in enumerate(phases):
        if not phase.batch.is_auto:
            continue
        share = distributed.run_collectively(partial(phase.accumulation_steps, distributed.world_size()))
        candidates = [n for n in divisors(share) if n <= MAX_MICRO_SIZE]
        if index in stored:
            found[index] = max(n for n in candidates if n <= stored[index])
        else:
            found[index] = _search(phase, candidates)
        logger.info("%sbatch.micro_size auto: %d", where, found[index])
    return _with_numbers(config, found)


def divisors(number: int) -> list[int]:
    """Ascending."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def largest_fitting(candidates: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of the ascending candidates that fits, by doubling and bisection; 0 if none does.

    fits: monotone. It is called for no candidate twice, and for candidates above one that does not fit never.
    """
    good, bad, doubled = -1, len(candidates), 0
    for place, number in enumerate(candidates):
        if number < doubled and place < len(candidates) - 1:
            continue
        if not fits(number):
            bad = place
            break
        good, doubled = place, 2 * number
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(candidates[middle]):
            good = middle
        else:
            bad = middle
    return candidates[good] if good >= 0 else 0


def _stored(checkpoint: Path | None, phases: int) -> dict[int, int]:
    """Phase → batch.micro_size in config.yaml of the run that the checkpoint is of; of none that cannot be read."""
    if checkpoint is None:
        return {}
    try:
        batches = [phase.batch for _, phase in load_config(checkpoint.parents[1] / CONFIG).named_phases()]
    except (ValueError, OSError):
        return {}
    if len(batches) != phases:
        return {}
    return {index: batch.micro_size for index, batch in enumerate(batches) if not batch.is_auto}


def _with_numbers(config: RunConfig, found: dict[int, int]) -> RunConfig:
    """found: phase → batch.micro_size."""
    values = raw_values(config)
    if not config.phases:
        values["batch"]["micro_size"] = found[0]
    for index, number in found.items() if config.phases else ():
        values["phases"][index].setdefault("batch", {})["micro_size"] = number
    # The run's own value is that of no phase, but is read.
    if values["batch"]["micro_size"] == "auto":
        values["batch"]["micro_size"] = min(found.values())
    return validated(values)


def _search(config: RunConfig, candidates: list[int]) -> int:
    """config: of a phase. Raises ConfigError on all ranks."""
    deepspeed_config = distributed.run_collectively(lambda: run_deepspeed_config(config))
    distributed.run_collectively(lambda: _check(config, zero_stage(deepspeed_config)))
    devices = distributed.gather_objects(_device())
    if other := next((rank for rank, device in enumerate(devices) if device != devices[0]), None):
        raise ConfigError(
            f"batch.micro_size auto needs equal GPUs: rank 0 has {devices[0][0]} with {devices[0][1] / 2**30:.1f} GiB, "
            f"rank {other} {devices[other][0]} with {devices[other][1] / 2**30:.1f} GiB; set a number"
        )
    trial = _Trial(config, deepspeed_config)
    with _memory_limit():
        found = largest_fitting(candidates, trial.fits)
    trial.close()
    if not found:
        raise ConfigError(
            f"batch.micro_size auto: a single sequence of {trial.corpus.sequence_length} tokens does not fit into "
            f"{devices[0][1] / 2**30:.1f} GiB at ZeRO stage {zero_stage(deepspeed_config)}; set a higher stage, "
            "model.activation_checkpointing, or a smaller model"
        )
    return found


def _check(config: RunConfig, stage: int) -> None:
    """Raise ConfigError for what the trials do not cover."""
    if distributed.device().type != "cuda":
        raise ConfigError(
            f"batch.micro_size auto needs GPUs, and this rank trains on {distributed.device().type}, where a trial "
            "could take the memory of other programs; set a number"
        )
    if stage == 3:
        raise ConfigError("batch.micro_size auto needs ZeRO stage 0, 1 or 2; set a number, or another deepspeed")
    if (strategy := config.masking.strategy) in ("mapnet", "auto"):
        raise ConfigError(
            f"batch.micro_size auto does not know the memory that masking.strategy {strategy} takes; set a number"
        )


def _device() -> tuple[str, int]:
    """Name and memory in bytes of this rank's GPU."""
    properties = torch.cuda.get_device_properties(distributed.device())
    return properties.name, properties.total_memory


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Within: torch raises OutOfMemoryError beyond a share of what is free now on the fullest GPU.

    The same limit on all ranks: an engine that did not fit on one of them would leave the others waiting in its
    collectives. Collective: call on all ranks.
    """
    device = distributed.device()
    free, total = torch.cuda.mem_get_info(device)
    usable = min(distributed.gather_objects(torch.cuda.memory_reserved(device) + free))
    torch.cuda.set_per_process_memory_fraction(usable * _USABLE / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class _Trial:
    """Trains single steps of a phase with any micro-batch. Collective: call on all ranks."""

    def __init__(self, config: RunConfig, deepspeed_config: dict[str, Any]) -> None:
        self._config, self._deepspeed = config, deepspeed_config
        self.corpus: Corpus = distributed.run_collectively(lambda: open_training_corpus(config.data))
        self._masker = create_masker(config.masking, self.corpus, seed=0, device=distributed.device())
        self._engine: Any = None

    def fits(self, rows: int) -> bool:
        """Whether a step with micro-batches of as many rows fits into the memory of all ranks."""
        mine = distributed.run_collectively(lambda: self._train(rows))
        fits = all(distributed.gather_objects(mine))
        if not fits:
            # What a step leaves behind that ended in the middle is of no use.
            self.close()
        logger.info("batch.micro_size auto: %d %s", rows, "fits" if fits else "does not fit")
        return fits

    def _train(self, rows: int) -> bool:
        try:
            if self._engine is None:
                self._engine = self._make_engine()
            with without_communication():
                batch = self._batch(rows)
                while not self._updates(batch):
                    pass
        except torch.OutOfMemoryError:
            return False
        return True

    def _updates(self, batch: TokenBatch) -> bool:
        """One step; whether the optimizer updated the weights, and so had all of its memory. If it did not, the loss
        scale is lower now, or at its minimum, for which `step_and_norm` raises FloatingPointError."""
        masked = self._masker(batch)
        # The second micro-batch finds the sums of the first one in memory.
        for last in (False, True):
            loss, pair_loss = objective_losses(self._engine, masked)
            total = loss if pair_loss is None else loss + pair_loss
            # Means, as in training: in fp16 sums over many rows would overflow at any scale.
            self._engine.backward(total / masked.weights.numel())
            if not last:
                self._engine.step()
        step_and_norm(self._engine)
        return loss_scale(self._engine) is None or not self._engine.optimizer.overflow

    def _batch(self, rows: int) -> TokenBatch:
        corpus = self.corpus
        numbers = np.arange(rows, dtype=np.int64) % corpus.rows
        pairs = self._config.pair_objective is not None
        batch = read_rows(corpus, numbers, np.zeros_like(numbers), pairs=pairs)
        # Padded rows take the memory of another kind of attention: also if these have none, but others do.
        if batch.attention_mask is None and corpus.manifest.tokens < corpus.rows * corpus.sequence_length:
            mask = torch.ones(batch.input_ids.shape, dtype=torch.bool)
            mask[0, -1] = False
            batch = replace(batch, attention_mask=mask)
        return to_device(batch, distributed.device())

    def _make_engine(self) -> Any:
        config = self._config
        encoder = encoder_config(config.model, self.corpus, None, pair_head=config.pair_objective is not None)
        engine = create_engine(
            encoder,
            self._deepspeed,
            model=config.model,
            batch=config.batch.model_copy(update={"global_size": 2 * distributed.world_size(), "micro_size": 1}),
            optimizer=config.optimizer,
            accumulation=2,
            seed=0,
            row_length=self.corpus.sequence_length,
            separator=separator_of(config, self.corpus),
            late=late_masks(config, self.corpus),
        )
        engine.train()
        return engine

    def close(self) -> None:
        """Free the engine."""
        if self._engine is not None:
            self._engine.destroy()
        self._engine = None
        free_memory()
