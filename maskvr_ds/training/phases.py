"""Phases of a run: their steps, samples and learning rates, and what one passes on to the next.

Steps and samples are counted over the entire run. Where a phase starts is a function of the configuration alone; what
has been trained is stored in every checkpoint (`CheckpointState.phases`), so the corpora of finished phases are no
longer needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from maskvr_ds import hashing
from maskvr_ds.config import RunConfig
from maskvr_ds.config.phases import PhaseStart, schedule_span
from maskvr_ds.masking.rates import masking_rate
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.training.schedule import learning_rate

T = TypeVar("T")
# Keys of a run's identity (`run.run_identity`) that must be equal across phases.
_RUN_WIDE = ("tokenizer", "special_tokens", "vocab_size", "model", "seed", "optimizer", "training.compile")


@dataclass(frozen=True)
class RunPhase:
    """One phase and its place in the run; a run without phases is a single unnamed one.

    config: resolved, without phases. start: None for the first phase. first_step, first_sample: trained before it
    starts. schedule_begin: the run's step at which its schedule starts. run_steps: steps of all phases.
    """

    index: int
    name: str | None
    config: RunConfig
    start: PhaseStart | None
    first_step: int
    first_sample: int
    schedule_begin: int
    run_steps: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.config.training.known_steps

    def key(self, use: int) -> int:
        """Seed for one use of randomness; differs between phases."""
        return hashing.fold(self.config.seed, use, *([self.index] if self.index else []))

    def learning_rate(self, step: int) -> float:
        """Learning rate of the run's 0-based update `step`."""
        return learning_rate(
            step - self.schedule_begin,
            self.config.schedule,
            peak=self.config.optimizer.lr,
            total_steps=self.config.schedule_steps,
        )

    def masking_rate(self, step: int) -> float:
        """Fraction of the maskable positions predicted in the run's 0-based update `step`."""
        masking = self.config.masking
        return masking_rate(
            step - self.schedule_begin,
            masking.rate,
            masking.final_rate,
            total_steps=self.config.schedule_steps,
            decay=masking.rate_decay,
        )

    def naming(self, action: Callable[[], T]) -> T:
        """Run `action` and return its result; a ValueError that it raises is prefixed with the phase's name."""
        try:
            return action()
        except ValueError as error:
            if self.name is not None:
                error.args = (f"phase {self.name!r}: {error}",)
            raise


def plan(config: RunConfig) -> list[RunPhase]:
    """The phases of a run in order. config: resolved, its steps are known (length.py)."""
    resolved = [phase for _, phase in config.named_phases()]
    steps = [phase.training.known_steps for phase in resolved]
    phases = []
    for index, phase in enumerate(resolved):
        declared = config.phases[index] if config.phases else None
        first_of_schedule, _ = schedule_span(config.phases, index)
        phases.append(
            RunPhase(
                index=index,
                name=declared.name if declared else None,
                config=phase,
                start=declared.start if declared else None,
                first_step=sum(steps[:index]),
                first_sample=sum(p.training.known_steps * p.batch.global_size for p in resolved[:index]),
                schedule_begin=sum(steps[:first_of_schedule]),
                run_steps=sum(steps),
            )
        )
    return phases


def done(phase: RunPhase, steps: int, sequence_length: int) -> dict[str, Any]:
    """Entry of `CheckpointState.phases` after `steps` steps of this phase."""
    return {
        "name": phase.name,
        "steps": steps,
        "global_size": phase.config.batch.global_size,
        "sequence_length": sequence_length,
    }


def ends_phase(state: CheckpointState) -> bool:
    """Whether a checkpoint is the last one of its phase, by the length that the phase had when it was written."""
    return bool(state.phases) and state.phases[-1].get("steps") == state.settings.get("training.steps")


def tokens_after(phase: RunPhase, samples: int, history: list[dict[str, Any]], sequence_length: int) -> int:
    """Tokens in the first `samples` sequences of the run, the last of which `phase` has read. history:
    `CheckpointState.phases`, which has the lengths of the earlier phases' rows. sequence_length: of this phase's."""
    before = sum(entry["steps"] * entry["global_size"] * entry["sequence_length"] for entry in history[: phase.index])
    return int(before) + (samples - phase.first_sample) * sequence_length


def next_phase(phases: list[RunPhase], state: CheckpointState) -> int:
    """Index of the phase in which a run continues from a checkpoint: the checkpoint's own if it has steps left,
    otherwise the following one.

    Raises CheckpointError if a phase that is finished by then differs from the one that was trained.
    """
    history = state.phases or [{"name": None}]
    index = len(history) - 1
    names = [phase.name for phase in phases]
    if (trained := [entry["name"] for entry in history]) != names[: index + 1]:
        raise CheckpointError(
            f"step {state.step} was reached in phases {_list(trained)}, the configuration has {_list(names)}; "
            "restore the names of phases that were started"
        )
    if state.step >= phases[index].last_step and index + 1 < len(phases):
        index += 1
    for phase, entry in zip(phases[:index], history, strict=False):
        was = (entry["steps"], entry["global_size"])
        if was != (now := (phase.config.training.known_steps, phase.config.batch.global_size)):
            raise CheckpointError(
                f"phase {phase.name!r} is finished: {was[0]} steps of {was[1]} sequences were trained, the "
                f"configuration has {now[0]} of {now[1]}; restore phases.{phase.name}.training.steps and "
                "batch.global_size"
            )
    return index


def _list(names: list[str | None]) -> str:
    return ", ".join("(unnamed)" if name is None else name for name in names)


def run_wide(identity: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's identity that must be equal when a phase continues from the previous one's checkpoint."""
    return {key: identity[key] for key in _RUN_WIDE}


def apply_start(optimizer: torch.optim.Optimizer, start: PhaseStart) -> None:
    """Zero the optimizer state that the phase does not keep. Call once, at the start of a phase, on the loaded state.

    optimizer: the innermost one (engine.basic_optimizer), whose state holds this rank's partitions. All its tensors
    except `step` are moments; `step` is an int (Lamb) or a tensor (torch's AdamW) in the state, or an int in the
    parameter group (FusedAdam).
    """
    for state in optimizer.state.values():
        for name, value in state.items():
            zero = start.step_counter if name == "step" else start.moments
            if zero == "keep":
                continue
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif name == "step":
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group and start.step_counter == "zero":
            group["step"] = 0
