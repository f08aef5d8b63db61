"""What a phase goes on from: the checkpoint's tensors, the mask proposal; and going back after a divergence."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskvr_ds.checkpoint import save
from maskvr_ds.checkpoint.save import CheckpointError, CheckpointState
from maskvr_ds.config import RunConfig
from maskvr_ds.masking.proposer import STATE as MAPNET_STATE
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.reliability.divergence import DivergedError, merge, position, read_rollbacks, windows_of, write_rollbacks
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.runtime import distributed, terminal
from maskvr_ds.telemetry.metrics import METRICS, append_event
from maskvr_ds.training.phases import RunPhase, apply_start, run_wide

if TYPE_CHECKING:
    import deepspeed


def resume_from(
    run: Path, latest: Path, engine: "deepspeed.DeepSpeedEngine", phase: RunPhase, state: CheckpointState
) -> CheckpointState:
    """Load a verified checkpoint; → the state of this phase with its step, samples, history and guard. Every rank
    calls.

    At the start of a phase, with the last checkpoint of the one before, the phase's policy is applied. Until this
    phase has saved, every resume comes by here again, with that same checkpoint: it is applied once.
    """
    begins = len(distributed.agreed(lambda: save.read_state(latest), on=0).phases) == phase.index > 0
    expected = replace(state, identity=run_wide(state.identity)) if begins else state
    masking = phase.config.masking
    may_differ = ("masking", "mapnet", "auto") if masking.change_at_resume and not begins else ()
    loaded = save.load(run, latest, engine, expected, may_differ)
    if may_differ:
        distributed.agreed(lambda: _check_order(latest, loaded.identity["masking"], state.identity["masking"]))
    say(f"resumed from {latest}: step {loaded.step}, {loaded.samples:,} samples")
    if begins:
        assert phase.start is not None
        apply_start(engine.basic_optimizer, phase.start)
        start = ", ".join(f"{what} {do}" for what, do in phase.start)
        say(f"phase {phase.name} begins: {start}")
    else:
        for name, value in state.settings.items():
            if (was := loaded.settings.get(name)) != value:
                say(f"  changed since: {name} {was!r} -> {value!r}")
        for section in may_differ:
            before = loaded.identity.get(section) or {}
            for name, value in state.identity.get(section, {}).items():
                if (was := before.get(name)) != value:
                    say(f"  changed since: {section}.{name} {was!r} -> {value!r}")
    auto = {} if begins else loaded.auto
    return replace(state, step=loaded.step, samples=loaded.samples, phases=loaded.phases, guard=loaded.guard, auto=auto)


def _check_order(latest: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError where rows would come in another order: samples so far say which are next."""
    copies = [_copies(was), _copies(now)]
    if was["strategy"] == "auto" != now["strategy"]:
        copies[0] = "what auto chose"
    if copies[0] != copies[1]:
        raise CheckpointError(
            f"{latest}: the segments of a row in a global batch were {copies[0]}, are {copies[1]}: the data would not "
            "go on where they stopped. Keep masking.placement and segments_per_sequence, or start a new run"
        )


def _copies(masking: dict[str, Any]) -> int | str:
    """How often a row comes in a global batch; auto begins with once."""
    if masking["placement"] != "same_batch":
        return 1
    return masking["segments_per_sequence"] or f"all at rate {masking['rate']:g}"


def make_proposer(
    config: RunConfig, vocab_size: int, engine: "deepspeed.DeepSpeedEngine", latest: Path | None, seed: int
) -> Proposer | None:
    """The mask proposal, as the checkpoint left it, or new where it has none (a phase before went without)."""
    if not config.learns_proposal:
        return None
    proposer = Proposer(
        config.mapnet,
        vocab_size=vocab_size,
        max_length=config.model.max_position_embeddings,
        seed=seed,
        device=distributed.device(),
    )
    proposer.attach(engine.module)
    if latest is not None:
        # Rank 0 says whether there is one: what other nodes see of a shared folder may be older.
        found = distributed.broadcast_object((latest / MAPNET_STATE).is_file())
        distributed.agreed(lambda: _restore_proposer(proposer, latest, found))
    return proposer


def _restore_proposer(proposer: Proposer, latest: Path, found: bool) -> None:
    proposer.run_step = save.read_state(latest).step
    if not found:
        return
    if (tensors := save.read_beside(latest, MAPNET_STATE)) is None:
        raise CheckpointError(f"{latest / MAPNET_STATE}: rank 0 sees it, {socket.gethostname()} does not (yet); resume")
    proposer.load(tensors)


def go_back(config: RunConfig, phase: RunPhase, error: DivergedError, latest: Path | None, fence: Fence) -> Path | None:
    """After a divergence → the checkpoint to go on from (None: the run's beginning), the roll-back on record. Every
    rank calls.

    latest: what the phase had gone on from. Raises FloatingPointError, on every rank alike, where the run has gone back
    to that checkpoint as often as it may, FencedError where another job has taken the run.
    """
    run = config.output_dir

    def decide() -> tuple[Path | None, dict[str, Any], bool]:
        fence.check()
        back_to = save.find(run, "auto") or latest
        state = None if back_to is None else save.read_state(back_to)
        rollbacks = read_rollbacks(run, {} if state is None else state.guard)
        to_step = 0 if state is None else state.step
        begin = position(max(0, to_step - phase.first_step), windows_of(rollbacks, phase.index))
        entry = {
            "event": "rollback",
            "phase": phase.index,
            "step": error.step,
            "to_step": to_step,
            "reason": error.reason,
            # What was trained before that checkpoint stays trained.
            "passed_over": [(max(first, begin), end) for first, end in merge(error.windows) if end > begin],
        }
        so_far = sum(before["to_step"] == to_step for before in rollbacks)
        allowed = so_far < config.divergence.max_rollbacks
        if allowed:
            write_rollbacks(run, [*rollbacks, entry])
        else:
            append_event(run / METRICS, {**entry, "event": "diverged", "rollbacks": so_far, "passed_over": []})
        return back_to, entry, allowed

    back_to, entry, allowed = distributed.agreed(decide, on=0)
    if not allowed:
        raise FloatingPointError(
            f"step {error.step}: {error.reason}, and the run has gone back to step {entry['to_step']} "
            f"{config.divergence.max_rollbacks} times (divergence.max_rollbacks); other data did not help. Resume from "
            "that checkpoint with a lower optimizer.lr or more schedule.warmup_steps"
        )
    passed_over = ", ".join(f"{first} to {end - 1}" for first, end in entry["passed_over"]) or "none"
    say(f"step {error.step}: {error.reason}; back to step {entry['to_step']}, batches passed over: {passed_over}")
    return back_to


def say(text: str) -> None:
    if distributed.rank() == 0:
        terminal.say(text)
