"""masking.strategy auto: measures the gradient's variance at intervals and continues with the best masks.

Let J disjoint segments of a row share a batch; V_d is the data part of the variance, V_m the mask part, e_a the
deviation caused by segment a of a round given the row (random_effects.py), c = E⟨e_a, e_b⟩ for two segments of one
round. Of the pairs among the J copies of a row in a batch, a share f belongs to one round (`same_round_share`): if J
does not divide the row's S segments, some batches start with the last segments of a round and end with the first of the
next, whose deviations are independent. The mean of J segments has variance V_m/J + f c (J − 1)/J, a batch of B passes
contains B/J rows, so its gradient has the variance

    total(J) / B,   total(J) = J V_d + V_m + (J − 1) f c.

Pairs of segments of one round give c, which is negative, since disjoint masks complement each other; V_d is the price:
J different rows would have averaged it out.

The baseline is one mask of a row per batch: `fully_explored` across epochs if its segments are as long as uniform masks
(within a step it is uniform masks then), `uniform` otherwise, since ⌈n/k⌉ equal segments of up to 17% fewer predictions
have more variance. Its variance is measured under uniform masks of k predictions, as many as the proposal makes, drawn
from the same random numbers: a proposal that is uniform draws the same masks. An alternative (all segments; the
proposal, with its cost added) is better if the confidence interval of its total, divided by the baseline's, lies below
1; among those the smallest estimate wins. It is adopted once two consecutive measurements agree: among many
measurements on few rows some are far off, and a plan adopted by chance would stay for long.

Rows are drawn as training draws them, from a mixture by weight.

Cost: `rows` · `draws` · 2 forward and backward passes each for uniform masks, segments (if more than one may share a
batch) and the proposal, and temporarily a full fp32
copy of the model. Collectives, over the world group: one broadcast per tensor of the model, those of moments.py, one
broadcast of the decision, which rank 0 makes: rounding must not lead the ranks to different plans.
"""

import copy
import time
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from maskvr_ds import hashing
from maskvr_ds.analysis.gradient_variance.moments import Sample, measure, measure_segments
from maskvr_ds.analysis.gradient_variance.random_effects import (
    Counts,
    Floats,
    Resampling,
    VarianceComponents,
    variances,
)
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.config import AutoConfig
from maskvr_ds.data.loader import Loader, RepeatSchedule, sample_rows
from maskvr_ds.engine.master_weights import full_fp32_weights
from maskvr_ds.masking.checks import predictions_lost, segments
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import STRATEGIES
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics_file import AUTO_EVENT

UNIFORM, SEGMENTS, PROPOSAL = "uniform", "fully_explored", "mapnet"
# Share of the predictions that segments may lose to uniform masks as the baseline.
_LOSS_ALLOWED = 0.001
# Strategy, and segments of a row per global batch.
MaskingPlan = tuple[str, int]
# The baseline of runs whose checkpoints do not say.
BASELINE: MaskingPlan = (SEGMENTS, 1)
# Purposes of keys: no two uses share random numbers.
_ROWS, _MASKS, _SKETCH, _BOOTSTRAP = range(4)
_FIGURES = ("data", "mask", "segment_covariance", "all_segments", "proposal")


class Chooser:
    """Chooses the masks of a phase. Every rank has one; all ranks make the same calls.

    Args:
        config: the section.
        engine: DeepSpeed's, around a MaskedLanguageModel.
        masker, loader: the phase's; set to the plan that is chosen.
        proposer: MAPNet, trained under any masks; None: not a candidate.
        most: the largest J to consider.
        proposal_cost: time of MAPNet relative to the rest of a step.
        micro_size: rows per pass.
        seed: for rows, masks, projections and bootstrap.
    """

    def __init__(
        self,
        config: AutoConfig,
        *,
        engine: Any,
        masker: Masker,
        loader: Loader,
        proposer: Proposer | None,
        most: int,
        proposal_cost: float,
        micro_size: int,
        seed: int,
    ) -> None:
        self._config, self._engine, self._masker, self._loader = config, engine, masker, loader
        self._proposer, self._most, self._cost = proposer, most, proposal_cost
        self._micro_size, self._seed = micro_size, seed
        self._baseline = baseline(loader.corpus.sequence_length - 2, masker.rate)
        self._best = self._baseline  # by the last measurement
        self._take(self._baseline[0])

    def state(self) -> dict[str, Any]:
        """State stored in checkpoints, in JSON types."""
        return {"strategy": self._strategy, "stretch": asdict(self._loader.repeats)} | {
            "best": list(self._best),
            "baseline": list(self._baseline),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._loader.repeats = RepeatSchedule(**state["stretch"])
        # Both are absent in old checkpoints.
        self._baseline, self._best = (
            (str(strategy), int(count))
            for strategy, count in (state.get("baseline", BASELINE), state.get("best", BASELINE))
        )
        self._take(state["strategy"])

    def _take(self, strategy: str) -> None:
        self._strategy = strategy
        self._masker.strategy = STRATEGIES[strategy]
        if self._proposer is not None:
            self._proposer.gate = "always" if strategy == PROPOSAL else "never"

    def due(self, step: int, last_step: int) -> bool:
        """Whether to measure after `step` steps."""
        return step % self._config.every_steps == 0 and step < last_step

    def choose(self, step: int, samples: int) -> dict[str, Any]:
        """Measure, choose, set masker and loader; returns the event for metrics.jsonl. Collective: call on all ranks.

        step: of the run. samples: consumed by the phase's loader, including skipped ones.
        """
        started, key = time.perf_counter(), hashing.fold(self._seed, step)
        figures, passes = self._measure(key)
        best, figures = distributed.broadcast_object((better(figures, self._most) or self._baseline, figures))
        current = self._strategy, self._loader.repeats.copies
        strategy, copies = confirm_choice(best, self._best, current, self._baseline)
        self._best = best
        if copies != self._loader.repeats.copies:
            self._loader.change_copies(samples, copies)
        self._take(strategy)
        return {
            "event": AUTO_EVENT,
            "step": step,
            "strategy": strategy,
            "segments": copies,
            "best": list(best),
            "most_segments": self._most,
            **figures,
            "passes": passes,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def _measure(self, key: int) -> tuple[dict[str, list[float] | None], int]:
        """_FIGURES by name: [estimate, low, high], None if not a candidate; and the number of passes over all ranks."""
        config, corpus = self._config, self._loader.corpus
        # The first slots of an epoch in an order of their own: of a mixture, each corpus by its weight.
        rows, _ = sample_rows(np.arange(config.rows), self._loader.shares, hashing.fold(key, _ROWS))
        sample = Sample(corpus, rows, key, self._micro_size, distributed.device())
        sketcher = Sketcher(self._full_precision_copy(), size=config.sketch_size, seed=hashing.fold(key, _SKETCH))
        masker = copy.copy(self._masker)
        masker.seed, masker.strategy = hashing.fold(key, _MASKS), STRATEGIES[UNIFORM]
        uniform, _ = measure(sample, sketcher, masker, draws=2 * config.draws, copies=1)
        passes = 2 * config.rows * config.draws
        several: tuple[VarianceComponents, Floats] | None = None
        if self._most > 1:
            masker.strategy = STRATEGIES[SEGMENTS]
            several = measure_segments(sample, sketcher, masker, draws=config.draws, copies=2, one_round=True)[:2]
            passes += 2 * config.rows * config.draws
        proposed = None
        if self._proposer is not None:
            masker.strategy = STRATEGIES[PROPOSAL]
            gate, self._proposer.gate = self._proposer.gate, "always"
            self._proposer.learning = False
            proposed, _ = measure(sample, sketcher, masker, draws=2 * config.draws, copies=1)
            self._proposer.gate, self._proposer.learning = gate, True
            passes += 2 * config.rows * config.draws
        together = same_round_share(self._most, segments(corpus.sequence_length - 2, masker.rate))
        resampling = Resampling(config.rows, seed=hashing.fold(key, _BOOTSTRAP), level=config.confidence)
        found = resampling.interval(
            partial(_figures, uniform, several, proposed, self._most, together=together, cost=self._cost)
        )
        named: dict[str, list[float] | None] = {n: list(f) for n, f in zip(_FIGURES, found, strict=True)}
        possible = {"segment_covariance": several, "all_segments": several, "proposal": proposed}
        for name, measured in possible.items():
            if measured is None:
                named[name] = None
        return named, passes

    def _full_precision_copy(self) -> MaskedLanguageModel:
        """The model with its full fp32 weights, on this rank's device."""
        weights = full_fp32_weights(self._engine)
        with torch.random.fork_rng(devices=[]):
            module = self._engine.module
            copied = MaskedLanguageModel(module.mlm.config, separator=module.separator, late=module.late).float()
        copied.to(distributed.device())
        for name, parameter in copied.mlm.named_parameters():
            if distributed.rank() == 0:
                parameter.data.copy_(weights[name])
            distributed.broadcast(parameter.data)
        return copied


def baseline(n: int, rate: float) -> MaskingPlan:
    """The plan with one mask of a row per batch, for rows of n maskable positions."""
    return (SEGMENTS if predictions_lost(n, rate) <= _LOSS_ALLOWED else UNIFORM), 1


def same_round_share(copies: int, of_row: int) -> float:
    """Share of the pairs among `copies` consecutive epochs that lie in one round of `of_row` segments, over all places
    in a round where the first may lie; 1 if copies is 1."""
    pairs = [
        (start + a) // of_row == (start + b) // of_row
        for start in range(0, copies * of_row, copies)
        for a in range(copies)
        for b in range(a)
    ]
    return sum(pairs) / len(pairs) if pairs else 1.0


def _figures(
    uniform: VarianceComponents,
    several: tuple[VarianceComponents, Floats] | None,
    proposed: VarianceComponents | None,
    most: int,
    ways: Counts,
    *,
    together: float,
    cost: float,
) -> Floats:
    """_FIGURES of the full gradient, the last two relative to the baseline's total: float64 [C, 5].

    several: pairs of segments of one round, and the variance of single ones [N, G]. together: `same_round_share`.
    """
    data, mask = (v[:, -1] for v in variances(uniform, ways))
    total, covariance, everything, by_proposal = data + mask, np.zeros_like(data), data + mask, data + mask
    if several is not None:
        pairs, single = several
        of_rows, of_pairs = (v[:, -1] for v in variances(pairs, ways))
        sizes = ways.counts @ pairs.relative_sizes / ways.counts.sum(1)
        of_one = (ways.counts @ single).sum(1) / ways.counts.sum(1) / sizes**2
        covariance = of_pairs - of_one
        everything = most * of_rows + of_one + (most - 1) * together * covariance
    if proposed is not None:
        of_data, of_masks = variances(proposed, ways)
        by_proposal = of_data[:, -1] + of_masks[:, -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = everything / total, by_proposal * (1 + cost) / total
    return np.stack([data, mask, covariance, *ratios], 1)


def better(figures: dict[str, list[float] | None], most: int) -> MaskingPlan | None:
    """The candidate with the smallest estimate among those whose interval lies below 1, or None."""
    found = []
    for name, choice in (("all_segments", (SEGMENTS, most)), ("proposal", (PROPOSAL, 1))):
        interval = figures[name]
        # Comparisons with NaN are false: then nothing is better.
        if interval is not None and interval[2] < 1:
            found.append((interval[0], choice))
    return min(found)[1] if found else None


def confirm_choice(
    best: MaskingPlan, best_before: MaskingPlan, current: MaskingPlan, fallback: MaskingPlan = BASELINE
) -> MaskingPlan:
    """The plan to continue with: leaving the baseline `fallback` requires that the last two measurements agree."""
    return best if best in (fallback, best_before) else current
