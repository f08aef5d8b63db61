"""masking.strategy auto: continues with the masks that make the most progress per second, measured at intervals.

Candidates: at the present rate one mask of a row per batch (the plain plan), J disjoint segments of a row in one batch
for every J that divides the global batch, and MAPNet's proposal while it is trained; the plain plan of every lower
rate; and at the present rate the plain plan with [MASK] from every other layer of `masking.auto.late_layers`, or from
the first. Measurement: auto_measurement.py; costs: mask_costs.py; decisions: auto_choice.py.

The run starts with the plain plan of `masking.rate`, the highest rate. The rate falls when measurements say so, never
rises, and is `masking.final_rate` in the last part of the schedule in any case. In that part [MASK] enters at the first
layer, as in the exported model, of which the goal and held-out losses are.

MAPNet is neither trained nor paid for until a measurement says that a proposal could pay for its time; it then has two
measurements to prove itself.

Memory: temporarily a full fp32 copy of the model. Collectives, over the world group: one broadcast per tensor of the
model, those of moments.py, one broadcast of the decision, which rank 0 makes: rounding must not lead the ranks to
different plans.
"""

import copy
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from maskvr_ds import hashing
from maskvr_ds.analysis.gradient_variance.moments import Sample
from maskvr_ds.analysis.gradient_variance.progress import jackknife
from maskvr_ds.analysis.gradient_variance.sketch import Sketcher
from maskvr_ds.config import MaskingConfig
from maskvr_ds.data.keys import AUTO
from maskvr_ds.data.loader import Loader, RepeatSchedule
from maskvr_ds.engine.master_weights import full_fp32_weights
from maskvr_ds.masking.checks import maskable_counts, segments
from maskvr_ds.masking.masker import Masker
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.masking.strategies import STRATEGIES
from maskvr_ds.models.encoder import MaskedLanguageModel
from maskvr_ds.models.late_masks import LateMasks
from maskvr_ds.runtime import distributed
from maskvr_ds.telemetry.metrics_file import AUTO_EVENT
from maskvr_ds.training.auto_choice import (
    PROPOSAL,
    SEGMENTS,
    MaskingPlan,
    ProposalTrial,
    Rating,
    best_plan,
    ladder,
    next_plan,
    plain,
    reason,
    segment_counts,
)
from maskvr_ds.training.auto_measurement import (
    Candidates,
    late_masks_of,
    measure_candidates,
    rate_plans,
    rows_of_epoch,
)
from maskvr_ds.training.auto_spacing import Spacing, most_passes, warnings
from maskvr_ds.training.phases import RunPhase
from maskvr_ds.training.step_costs import StepCosts

# Purposes of keys: no two uses share random numbers.
_ROWS, _MASKS, _SKETCH = range(3)

logger = logging.getLogger(__name__)


class Chooser:
    """Chooses the masks of a phase. Every rank has one; all ranks make the same calls.

    Args:
        masking: the section; it starts at its rate.
        engine: DeepSpeed's, around a MaskedLanguageModel.
        masker, loader: the phase's; set to the plan that is chosen.
        proposer: MAPNet; None: not a candidate.
        costs: of all candidates.
        micro_size: rows per pass.
        seed: for rows, masks and projections.
        final_step: from which on the rate is masking.final_rate and [MASK] enters at the first layer; None: never.
        first_step: of the phase.

    spacing: of the measurements.
    """

    def __init__(
        self,
        masking: MaskingConfig,
        *,
        engine: Any,
        masker: Masker,
        loader: Loader,
        proposer: Proposer | None,
        costs: StepCosts,
        micro_size: int,
        seed: int,
        final_step: int | None = None,
        first_step: int = 0,
    ) -> None:
        config = masking.auto
        self._engine, self._masker, self._loader = engine, masker, loader
        self._proposer, self._costs, self._micro_size, self._seed = proposer, costs, micro_size, seed
        self._n, self._counts = loader.corpus.sequence_length - 2, maskable_counts(loader.corpus)
        self._rates, self._final_step = ladder(masking.rate, masking.final_rate), final_step
        proposal, batch = proposer is not None, loader.global_size
        most = most_passes(config, self._rates, self._n, batch, proposal=proposal)
        available = len(rows_of_epoch(loader.shares, 0, config.most_rows))
        self.spacing, self._first_step = Spacing.of(config, costs, most, available), first_step
        self._config = config.model_copy(update={"rows": self.spacing.rows})
        self._trial = ProposalTrial()
        self._late_layers: tuple[int, ...] = ()  # candidates of a measurement
        self.plan = self._best = plain(self._counts, masking.rate)  # _best: by the last measurement
        self._apply(0)

    @property
    def learning(self) -> bool:
        """Whether MAPNet is trained in the steps until the next measurement."""
        return self._trial.learning

    def state(self) -> dict[str, Any]:
        """State stored in checkpoints, in JSON types."""
        return {
            "strategy": self.plan.strategy,
            "stretch": asdict(self._loader.repeats),
            "rate": self.plan.rate,
            **self._entry(),
            "best": self._best.stored(),
            "trial": asdict(self._trial),
            "costs": self._costs.stored(),
        }

    def restore(self, state: dict[str, Any], step: int) -> None:
        """Continue from `state`. step: of the run.

        Checkpoints of earlier versions have no rate, which was constant (mask_costs.py refuses others), nor a trial:
        MAPNet was always trained, and is trained on. Their best plan counts as one measurement, if they have one.
        """
        self._loader.repeats = RepeatSchedule(**state["stretch"])
        rate = float(state.get("rate", self._rates[0]))
        late = int(state.get("late_layer", 0))
        self.plan = MaskingPlan(str(state["strategy"]), self._loader.repeats.copies, rate, late)
        self._best = MaskingPlan.read(state.get("best", self.plan.stored()), rate)
        trained = self._proposer is not None and "trial" not in state
        self._trial = ProposalTrial(**state.get("trial", {"learning": trained}))
        self._apply(step)

    def _apply(self, step: int) -> None:
        """Set masker and MAPNet to the plan."""
        self._masker.strategy = STRATEGIES[self.plan.strategy]
        self._masker.fix_rate(self.plan.rate)
        if self._config.late_layers:
            self._engine.module.late_in_training = late_masks_of(self.plan, self._loader.corpus)
        if self._proposer is None:
            return
        self._proposer.gate = "always" if self.plan.strategy == PROPOSAL else "never"
        self._proposer.learning = self.learning
        if self.learning:
            self._proposer.run_step = step
            self._proposer.attach(self._engine.module)
        else:
            self._engine.module.observer = None

    def _falls_now(self, step: int) -> bool:
        ahead = self.plan.rate > self._rates[-1] or self.plan.late > 0
        return self._ends(step) and ahead

    def _ends(self, step: int) -> bool:
        """Whether the last part of the schedule has begun."""
        return self._final_step is not None and step >= self._final_step

    def due(self, step: int, last_step: int) -> bool:
        """Whether to measure or to change the plan after `step` steps."""
        return step < last_step and (self.spacing.due(step, self._first_step) or self._falls_now(step))

    def warnings(self, last_step: int) -> list[str]:
        """What keeps measurements from changing anything in a phase that ends at `last_step`, a sentence each."""
        return warnings(self.spacing, self._first_step, last_step)

    def rehearse(self, rows: int) -> int:
        """Measure with all candidates on so many rows, and choose nothing; returns the number of passes. Collective:
        call on all ranks."""
        self._config = self._config.model_copy(update={"rows": rows})
        self._trial = ProposalTrial(learning=self._proposer is not None)
        self._late_layers = (0, *self._config.late_layers)
        passes: int = self._measure(self._seed)[2]["passes"]
        return passes

    def choose(self, step: int, samples: int) -> dict[str, Any]:
        """Measure, choose, set masker and loader; returns the event for metrics.jsonl. Collective: call on all ranks.

        step: of the run. samples: consumed by the phase's loader, including skipped ones.
        """
        started, cpu_started, before = time.perf_counter(), time.process_time(), self.plan
        measured: dict[str, Any] = {"passes": 0}
        if self._falls_now(step):
            chosen = best = plain(self._counts, self._rates[-1])
            rate = f"masking.final_rate {self._rates[-1]:g}" if len(self._rates) > 1 else f"rate {self._rates[-1]:g}"
            late = ", [MASK] from the first layer" if self._config.late_layers else ""
            why = f"the last part of the schedule is trained at {rate}{late}"
            # The network may be used again at this rate, but has to prove itself there.
            self._trial = ProposalTrial()
        else:
            self._late_layers = () if self._ends(step) else (0, *self._config.late_layers)
            ratings, ideal, measured = self._measure(hashing.fold(self._seed, step))
            best, ideal = distributed.broadcast_object((best_plan(ratings, before, self._plain(before.rate)), ideal))
            chosen = next_plan(best, self._best, before)
            why = reason(ratings, best, chosen, before)
            if self._proposer is not None:
                self._trial = self._trial.after(
                    promising=ideal > 1, used=chosen.strategy == PROPOSAL, best=best.strategy == PROPOSAL
                )
        self._best = best
        # Epochs count rounds of segments: under another rate they start anew, or two rounds would share a permutation.
        other_rounds = SEGMENTS in (chosen.strategy, before.strategy) and chosen.rate != before.rate
        if chosen.segments != self._loader.repeats.copies or other_rounds:
            self._loader.change_copies(samples, chosen.segments)
        self.plan = chosen
        self._apply(step)
        logger.log(logging.INFO if chosen != before else logging.DEBUG, "step %d: masks: %s (%s)", step, chosen, why)
        return {
            "event": AUTO_EVENT,
            "step": step,
            "strategy": chosen.strategy,
            "segments": chosen.segments,
            "rate": chosen.rate,
            **self._entry(),
            "best": best.stored(),
            "reason": why,
            "proposal_trained": self.learning,
            **measured,
            "seconds": round(time.perf_counter() - started, 3),
            "cpu_seconds": round(time.process_time() - cpu_started, 3),
        }

    def _entry(self) -> dict[str, int]:
        """Layer at which [MASK] enters, for states and events, if it is to be chosen."""
        return {"late_layer": self.plan.late} if self._config.late_layers else {}

    def _plain(self, rate: float, late: int = 0) -> MaskingPlan:
        """The plain plan of a rate and layer; the present plan, if it is one."""
        present = (self.plan.rate, self.plan.late) == (rate, late)
        own = present and self.plan.segments == 1 and self.plan.strategy != PROPOSAL
        return self.plan if own else plain(self._counts, rate, late)

    def _measure(self, key: int) -> tuple[dict[MaskingPlan, Rating], float, dict[str, Any]]:
        """Ratings of all plans; the progress per second of the best proposal that is expected, relative to the present
        plan, NaN if undefined; and the figures for metrics.jsonl."""
        config, corpus, now = self._config, self._loader.corpus, self.plan
        rows = rows_of_epoch(self._loader.shares, hashing.fold(key, _ROWS), config.rows)
        sample = Sample(corpus, rows, key, self._micro_size, distributed.device())
        module = self._full_precision_copy()
        sketcher = Sketcher(module, size=config.sketch_size, seed=hashing.fold(key, _SKETCH))
        masker = copy.copy(self._masker)
        masker.seed = hashing.fold(key, _MASKS)
        candidates = Candidates(
            tuple(self._plain(rate, now.late) for rate in self._rates if rate <= now.rate),
            segment_counts(self._n, now.rate, self._loader.global_size),
            segments(self._n, now.rate),
            self.learning,
            tuple(self._plain(now.rate, late) for late in self._late_layers if late != now.late),
        )

        def enter(late: int) -> None:
            # In evaluation mode as many positions are hidden as there are [MASK].
            module.late = self._staged(late) if late else self._engine.module.late

        batch = self._loader.global_size
        found = measure_candidates(
            candidates,
            config,
            sample=sample,
            sketcher=sketcher,
            masker=masker,
            proposer=self._proposer,
            batch=batch,
            enter=enter if config.late_layers else None,
        )
        seconds = {plan: self._costs.seconds(plan) for plan in found.gains}
        ratings = rate_plans(found.gains, seconds, now, config.rows, config.confidence)
        figures = {
            **dict(zip(("data", "mask"), _finite((found.data, found.mask)), strict=True)),
            "candidates": [
                {
                    "plan": plan.stored(),
                    "progress": _finite(rating.progress),
                    "seconds": seconds[plan],
                    "per_second": _finite(rating.per_second),
                }
                for plan, rating in ratings.items()
            ],
            "passes": found.passes,
        }
        ideal = math.nan
        if self._proposer is not None:
            reference, proposal = found.gains[now], MaskingPlan(PROPOSAL, 1, now.rate, now.late)
            progress = jackknife(lambda c: found.ideal(c) / reference(c), config.rows, config.confidence)[0]
            ideal = progress * self._costs.seconds(now) / self._costs.seconds(proposal)
            figures["best_expected_proposal"] = ideal if math.isfinite(ideal) else None
        return ratings, ideal, figures

    def _staged(self, layer: int | None = None) -> LateMasks:
        """[MASK] from `layer`, in evaluation mode; None: from the highest candidate."""
        mask_id = self._loader.corpus.manifest.special_tokens.mask
        return LateMasks(layer or max(self._config.late_layers), mask_id, hidden=0)

    def _full_precision_copy(self) -> MaskedLanguageModel:
        """The model with its full fp32 weights, on this rank's device."""
        weights = full_fp32_weights(self._engine)
        with torch.random.fork_rng(devices=[]):
            module = self._engine.module
            late = module.late if not self._config.late_layers else self._staged()
            copied = MaskedLanguageModel(module.mlm.config, separator=module.separator, late=late).float()
        copied.to(distributed.device())
        for name, parameter in copied.mlm.named_parameters():
            if distributed.rank() == 0:
                parameter.data.copy_(weights[name])
            distributed.broadcast(parameter.data)
        return copied


def make_chooser(
    phase: RunPhase, engine: Any, masker: Masker, loader: Loader, proposer: Proposer | None, costs: StepCosts
) -> Chooser:
    """The chooser of a phase, as at its start."""
    config = phase.config
    masking = config.masking
    final_step = None
    if masking.final_rate is not None or masking.auto.late_layers:
        final_step = phase.schedule_begin + math.floor((1 - masking.auto.final_share) * config.schedule_steps)
    return Chooser(
        masking,
        engine=engine,
        masker=masker,
        loader=loader,
        proposer=proposer,
        costs=costs,
        micro_size=config.batch.micro_size,
        seed=phase.key(AUTO),
        final_step=final_step,
        first_step=phase.first_step,
    )


def _finite(values: Sequence[float]) -> list[float | None]:
    """For JSON."""
    return [x if math.isfinite(x) else None for x in values]
