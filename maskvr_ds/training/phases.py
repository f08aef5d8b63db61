"""The phases of a run, counted: which steps, samples and learning rates are whose, and what one hands to the next.

Steps and samples count over the whole run. Where a phase begins is a function of the configuration alone; what has been
done stands in every checkpoint (CheckpointState.phases), so the corpora of finished phases are not needed any more.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from maskvr_ds import hashing
from maskvr_ds.config import RunConfig
from maskvr_ds.config.phases import PhaseStart, schedule_span
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState
from maskvr_ds.training.schedule import learning_rate, masking_rate

T = TypeVar("T")
# What of a run's identity (run.run_identity) holds beyond a phase.
_RUN_WIDE = ("tokenizer", "model", "seed", "optimizer")


@dataclass(frozen=True)
class RunPhase:
    """One phase with its place in the run; a run without phases is one of them, without a name.

    config: resolved, without phases. start: None for the first. first_step, first_sample: done before it begins.
    schedule_begin: the run's step at which its schedule began. run_steps: steps of all phases.
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
        return self.first_step + self.config.training.steps

    def key(self, use: int) -> int:
        """Seed of one use of randomness, another one in every phase."""
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
        """Share of the maskable positions that the run's 0-based update `step` predicts."""
        masking = self.config.masking
        return masking_rate(
            step - self.schedule_begin, masking.rate, masking.final_rate, total_steps=self.config.schedule_steps
        )

    def naming(self, action: Callable[[], T]) -> T:
        """What `action` returns; a ValueError that it raises says in its words which phase it is about."""
        try:
            return action()
        except ValueError as error:
            if self.name is not None:
                error.args = (f"phase {self.name!r}: {error}",)
            raise


def plan(config: RunConfig) -> list[RunPhase]:
    """The phases of a run in order."""
    resolved = [config.phase(index) for index in range(max(1, len(config.phases)))]
    steps = [phase.training.steps for phase in resolved]
    phases = []
    for index, phase in enumerate(resolved):
        declared = config.phases[index] if config.phases else None
        first_of_schedule, _ = schedule_span(config.phases, index) if config.phases else (0, 1)
        phases.append(
            RunPhase(
                index=index,
                name=declared.name if declared else None,
                config=phase,
                start=declared.start if declared else None,
                first_step=sum(steps[:index]),
                first_sample=sum(p.training.steps * p.batch.global_size for p in resolved[:index]),
                schedule_begin=sum(steps[:first_of_schedule]),
                run_steps=sum(steps),
            )
        )
    return phases


def done(phase: RunPhase, steps: int, sequence_length: int) -> dict[str, Any]:
    """A line of CheckpointState.phases: `steps` steps of this phase are done."""
    return {
        "name": phase.name,
        "steps": steps,
        "global_size": phase.config.batch.global_size,
        "sequence_length": sequence_length,
    }


def tokens_done(history: list[dict[str, Any]]) -> int:
    return sum(entry["steps"] * entry["global_size"] * entry["sequence_length"] for entry in history)


def next_phase(phases: list[RunPhase], state: CheckpointState) -> int:
    """Index of the phase in which a run goes on from a checkpoint.

    That of the checkpoint where steps of it are left, the one after it where not. Raises CheckpointError where a
    phase that is over by then is not the one that was trained.
    """
    history = state.phases or [{"name": None}]
    index = len(history) - 1
    names = [phase.name for phase in phases]
    if (trained := [entry["name"] for entry in history]) != names[: index + 1]:
        raise CheckpointError(
            f"step {state.step} was reached in phases {_list(trained)}, the configuration has {_list(names)}; "
            "restore the names of phases that have begun"
        )
    if state.step >= phases[index].last_step and index + 1 < len(phases):
        index += 1
    for phase, entry in zip(phases[:index], history, strict=False):
        was = (entry["steps"], entry["global_size"])
        if was != (now := (phase.config.training.steps, phase.config.batch.global_size)):
            raise CheckpointError(
                f"phase {phase.name!r} is over: {was[0]} steps of {was[1]} sequences were trained, the configuration "
                f"has {now[0]} of {now[1]}; restore phases.{phase.name}.training.steps and batch.global_size"
            )
    return index


def _list(names: list[str | None]) -> str:
    return ", ".join("(unnamed)" if name is None else name for name in names)


def run_wide(identity: dict[str, Any]) -> dict[str, Any]:
    """What of a run's identity must hold when one phase goes on from the last checkpoint of another."""
    return {key: identity[key] for key in _RUN_WIDE}


def apply_start(optimizer: torch.optim.Optimizer, start: PhaseStart) -> None:
    """Zero what the phase does not take over. Call with the loaded state, at the start of a phase alone.

    optimizer: the innermost one (engine.basic_optimizer), whose state holds this rank's partitions. Its moments are
    all tensors beside `step`; `step` is an int (Lamb) or a tensor (torch's AdamW) of the state, or an int of the
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
