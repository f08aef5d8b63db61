"""What a phase goes on from: the checkpoint's tensors, the mask proposal; and going back after a divergence."""

import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskvr_ds.checkpoint import load
from maskvr_ds.config import ConfigError, ModelConfig, RunConfig
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.models.pretrained import WEIGHTS, InitialWeights, weights_file
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder import checkpoints as manifest
from maskvr_ds.run_folder.checkpoints import CheckpointError, CheckpointState, read_state
from maskvr_ds.run_folder.layout import CONFIG, MAPNET_STATE
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.distributed import say
from maskvr_ds.runtime.files import sha256
from maskvr_ds.training.phases import RunPhase, apply_start, next_phase, run_wide

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
    begins = len(distributed.run_on_rank0(lambda: checkpoints.read_state(latest)).phases) == phase.index > 0
    expected = replace(state, identity=run_wide(state.identity)) if begins else state
    masking = phase.config.masking
    may_differ = ("masking", "mapnet", "auto") if masking.change_at_resume and not begins else ()
    loaded = load.load(run, latest, engine, expected, may_differ)
    if may_differ:
        distributed.run_collectively(
            lambda: _check_order(latest, loaded.identity["masking"], state.identity["masking"])
        )
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
        distributed.run_collectively(lambda: _restore_proposer(proposer, latest, found))
    return proposer


def _restore_proposer(proposer: Proposer, latest: Path, found: bool) -> None:
    proposer.run_step = checkpoints.read_state(latest).step
    if not found:
        return
    if (tensors := load.read_beside(latest, MAPNET_STATE)) is None:
        raise CheckpointError(f"{latest / MAPNET_STATE}: rank 0 sees it, {socket.gethostname()} does not (yet); resume")
    proposer.load(tensors)


def find_checkpoint(config: RunConfig, resume: str | None) -> Path | None:
    """The checkpoint to go on from, if any. Raises ValueError where output_dir holds what must not be written over."""
    run = config.output_dir
    used = manifest.begun(run)
    if used and resume is None:
        raise ConfigError(f"output_dir {run} is not empty; add --resume auto to go on, or name another folder")
    latest = None if resume is None else checkpoints.find(run, resume)
    if used and latest is None and not (run / CONFIG).is_file():
        raise ConfigError(f"output_dir {run} is not empty and not a run's folder ({CONFIG} is missing)")
    return latest


def resolve_model_config(model: ModelConfig, latest: Path | None) -> tuple[ModelConfig, InitialWeights | None]:
    """The section with all sizes known, and what the run began or begins with; None: weights from the seed. One rank.

    latest: the checkpoint to go on from. Without one the folder must be there; with one, it may be gone. Raises
    ConfigError where it is missing or of a kind that is not read, CheckpointError where the run began otherwise.
    """
    folder = model.initialize_from
    if latest is None:
        return model, None if folder is None else InitialWeights(folder, sha256(weights_file(folder)))
    state = read_state(latest)
    trained = dict(state.identity["model"])
    began_with, named = trained.pop("initialize_from", None), state.settings.get("model.initialize_from")
    found = sha256(folder / WEIGHTS) if folder is not None and (folder / WEIGHTS).is_file() else None
    # Of a folder that is gone its name is all there is to compare.
    if found is None and folder is not None and str(folder) == named:
        found = began_with
    if found != began_with or (folder is None) != (began_with is None):
        was = "weights from the seed" if began_with is None else f"those of {named} (SHA-256 {began_with[:12]})"
        now = "is not set" if folder is None else f"is {folder} ({f'SHA-256 {found[:12]}' if found else 'not there'})"
        raise CheckpointError(
            f"{latest}: belongs to another run: it began with {was}, and model.initialize_from {now}. Restore the "
            "setting to resume, or start a new run in another output_dir"
        )
    if folder is None:
        return model, None
    given = model.model_dump(exclude_unset=True)
    return ModelConfig.model_validate({**trained, **given}), InitialWeights(folder, began_with)


def remaining_phases(phases: list[RunPhase], latest: Path | None) -> list[RunPhase]:
    """The phases still to train after a checkpoint, perhaps the first of them in part. Every rank calls."""
    if latest is None:
        return phases
    return phases[distributed.run_on_rank0(lambda: next_phase(phases, checkpoints.read_state(latest))) :]
