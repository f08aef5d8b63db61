"""Resume: find, read and check the checkpoint once, and load its state into the engine.

Collectives: those of checkpoint/load.py; `distributed.run_collectively` for MAPNet's state.
"""

import hashlib
import logging
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed

from data_pipeline.shards import Corpus
from maskvr_ds.checkpoint import load
from maskvr_ds.config import ConfigError, ModelConfig, RunConfig
from maskvr_ds.masking.factory import create_proposer
from maskvr_ds.masking.proposer import Proposer
from maskvr_ds.models.initial_folder import InitialWeights, table_rows, weights_digest
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.checkpoints import Checkpoint, CheckpointError, CheckpointState
from maskvr_ds.run_folder.fence import Fence
from maskvr_ds.run_folder.layout import BERT, MANIFEST, MAPNET_STATE
from maskvr_ds.run_folder.marks import output_fault
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.files import parse_json, sha256
from maskvr_ds.training.phases import RunPhase, apply_start, next_phase, run_wide

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """Starting point of training. Made on rank 0 and broadcast, so that all ranks decide by the same state.

    model: section of the configuration with all sizes known. initial: pretrained weights that the run was initialised
    from; None: random ones. table_rows: of the embedding table of that model, or of the checkpoint's; None: by the
    configuration and the corpus. checkpoint: verified; None: training starts at step 0. has_proposal: whether the
    checkpoint stores MAPNet's state, as seen by rank 0. refusals: folder -> SHA-256 of checkpoint.json and fault of
    checkpoints that this job could not load.
    """

    model: ModelConfig
    initial: InitialWeights | None
    table_rows: int | None = None
    checkpoint: Checkpoint | None = None
    has_proposal: bool = False
    refusals: Mapping[Path, tuple[str, str]] = field(default_factory=dict)

    def at(self, checkpoint: Checkpoint | None) -> "ResumePoint":
        """The same run at another checkpoint."""
        has_proposal = checkpoint is not None and (checkpoint.folder / MAPNET_STATE).is_file()
        return replace(self, checkpoint=checkpoint, has_proposal=has_proposal)

    def at_verified(self, folder: Path) -> "ResumePoint":
        """The same run at the checkpoint in `folder`. Raises CheckpointError if its files are not intact."""
        return self.at(checkpoints.verify(folder))

    @property
    def refused(self) -> dict[Path, str]:
        """Folder -> fault of the checkpoints that could not be loaded and have not been replaced since."""
        return {
            folder: fault
            for folder, (written, fault) in self.refusals.items()
            if (folder / MANIFEST).is_file() and sha256(folder / MANIFEST) == written
        }

    @property
    def folder(self) -> Path | None:
        return None if self.checkpoint is None else self.checkpoint.folder

    @property
    def step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.state.step

    def remaining_phases(self, phases: list[RunPhase]) -> list[RunPhase]:
        """The phases still to train, the first of them possibly in part. Raises CheckpointError (`next_phase`)."""
        return phases if self.checkpoint is None else phases[next_phase(phases, self.checkpoint.state) :]


def find_resume_point(config: RunConfig, resume: str | None, fence: Fence) -> ResumePoint:
    """Find and verify the checkpoint to resume from (see `checkpoints.find`). Call on one rank.

    Raises FencedError if another job is running the run, ConfigError if output_dir holds something that must not be
    overwritten, CheckpointError if no checkpoint is intact or it belongs to another run.
    """
    run = config.output_dir
    fence.look()
    if (fault := output_fault(run, resume)) is not None:
        raise ConfigError(fault)
    checkpoint = None if resume is None else checkpoints.find(run, resume)
    _check_versions(run, checkpoint)
    model, initial = resolve_model_config(config.model, checkpoint)
    rows = None
    if checkpoint is not None:
        rows = table_rows(checkpoint.folder / BERT)
    elif initial is not None:
        rows = table_rows(initial.folder)
    return ResumePoint(model, initial, rows).at(checkpoint)


def _check_versions(run: Path, found: Checkpoint | None) -> None:
    """Raise CheckpointError if the run has a later checkpoint than `found` that a newer version has written: to take it
    for damaged would end in its deletion."""
    for folder in checkpoints.complete_checkpoints(run):
        if found is None or checkpoints.step_of(folder) <= found.state.step:
            continue
        try:
            text = (folder / MANIFEST).read_bytes()
            content = parse_json(text)
            number, head = content["format"], f'{{"sha256": "{content["sha256"]}",'.encode()
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged
        intact = text.startswith(head) and hashlib.sha256(text[len(head) :]).hexdigest() == content["sha256"]
        if intact and type(number) is int and number > checkpoints.FORMAT:
            raise CheckpointError(
                f"{folder}: format {number}, written by a newer version of maskvr_ds, and would be deleted once this "
                f"one saves; update maskvr_ds, or remove this folder to resume from {found.folder.name}"
            )


def pass_by(run: Path, error: load.ContentError, point: ResumePoint, *, named: bool) -> ResumePoint:
    """The run at the newest earlier checkpoint, after `point`'s could not be loaded. Collective: call on all ranks.

    named: whether --resume names that checkpoint. Raises `error` then, and if it is another run's or was refused
    before; CheckpointError if the run has no other intact checkpoint.
    """

    def decide() -> ResumePoint:
        if named or error.folder in point.refusals or error.folder not in checkpoints.checkpoints(run):
            raise error
        refusals = {**point.refusals, error.folder: (sha256(error.folder / MANIFEST), str(error))}
        passed = replace(point, refusals=refusals)
        passed = passed.at(checkpoints.find(run, "auto", passed.refused))
        logger.warning("%s. It is passed by: resuming from %s", error.fault, passed.folder)
        return passed

    return distributed.run_on_rank0(decide)


def resolve_model_config(
    model: ModelConfig, checkpoint: Checkpoint | None
) -> tuple[ModelConfig, InitialWeights | None]:
    """The section with all sizes known, and the weights that the run is initialised from. Call on one rank.

    Without a checkpoint, the folder `initialize_from` must exist; with one, it may be gone. Raises ConfigError if it is
    missing or cannot be read, CheckpointError if the run was initialised otherwise.
    """
    folder = model.initialize_from
    if checkpoint is None:
        return model, None if folder is None else InitialWeights(folder, weights_digest(folder), model.new_head)
    state = checkpoint.state
    trained = dict(state.identity["model"])
    initialised, named = trained.pop("initialize_from", None), state.settings.get("model.initialize_from")
    found = None
    if folder is not None:
        with suppress(ConfigError):  # it may be gone, or no longer complete
            found = weights_digest(folder)
    # Of a folder that is gone, only its name can be compared.
    if found is None and folder is not None and str(folder) == named:
        found = initialised
    if found != initialised or (folder is None) != (initialised is None):
        was = "from scratch" if initialised is None else f"from {named} (SHA-256 {initialised[:12]})"
        now = "is not set" if folder is None else f"is {folder} ({f'SHA-256 {found[:12]}' if found else 'not found'})"
        raise CheckpointError(
            f"{checkpoint.folder}: belongs to another run: it was initialised {was}, and model.initialize_from {now}. "
            "Restore the setting to resume, or start a new run in another output_dir"
        )
    if folder is None:
        return model, None
    if (was := state.settings.get("model.vocabulary", "same")) != model.vocabulary:
        raise CheckpointError(
            f"{checkpoint.folder}: the run started with model.vocabulary {was}, and it is {model.vocabulary} now, which"
            " would change nothing: restore the setting to resume, or start a new run in another output_dir"
        )
    given = model.model_dump(exclude_unset=True)
    trained = {key: value for key, value in trained.items() if key not in given.get("settings", {})}
    resolved = ModelConfig.model_validate({"architecture": "bert", **trained, **given})
    return resolved, InitialWeights(folder, initialised, model.new_head)


def restore_engine(
    run: Path,
    checkpoint: Checkpoint,
    engine: deepspeed.DeepSpeedEngine,
    phase: RunPhase,
    state: CheckpointState,
) -> CheckpointState:
    """Load the checkpoint into the engine. Collective: call on all ranks.

    state: of the present run at step 0; returned with the checkpoint's step, samples, history and guard. If the
    checkpoint is the last one of the previous phase, the phase's `start` policy is applied; until the phase has saved
    a checkpoint of its own, every resume loads that same checkpoint, so the policy is applied exactly once.
    """
    loaded = checkpoint.state
    starts_phase = len(loaded.phases) == phase.index > 0
    expected = replace(state, identity=run_wide(state.identity)) if starts_phase else state
    masking = phase.config.masking
    may_differ = ("masking",) if masking.change_at_resume and not starts_phase else ()
    load.load(run, checkpoint, engine, expected, may_differ)
    if may_differ:
        was, now = loaded.identity["masking"], state.identity["masking"]
        distributed.run_on_rank0(lambda: _check_order(checkpoint.folder, was, now))
    logger.info("resumed from %s: step %d, %s samples", checkpoint.folder, loaded.step, f"{loaded.samples:,}")
    if loaded.digests != state.digests:
        logger.info(
            "digests up to step %d are of version %d, those after it of version %d: the two cannot be compared",
            loaded.step,
            loaded.digests,
            state.digests,
        )
    if starts_phase:
        assert phase.start is not None
        apply_start(engine.basic_optimizer, phase.start)
        start = ", ".join(f"{what} {do}" for what, do in phase.start)
        logger.info("phase %s starts: %s", phase.name, start)
    else:
        _log_changes(loaded, state, may_differ)
    auto = {} if starts_phase else loaded.auto
    return replace(state, step=loaded.step, samples=loaded.samples, phases=loaded.phases, guard=loaded.guard, auto=auto)


def _log_changes(was: CheckpointState, now: CheckpointState, sections: tuple[str, ...]) -> None:
    """Log the settings, and the values in `sections` of the identity, that differ from the checkpoint's."""
    changes = [(name, was.settings.get(name), value) for name, value in now.settings.items()]
    changes = [change for change in changes if change[1] != change[2]]
    for section in sections:
        changes += load.differences(section, was.identity.get(section), now.identity.get(section))
    for name, before, value in changes:
        logger.info("  changed: %s %r -> %r", name, before, value)


def _check_order(latest: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise CheckpointError if the data order would change: the samples consumed determine which rows are next."""
    copies = [_copies(was), _copies(now)]
    if was["strategy"] == "auto" != now["strategy"]:
        copies[0] = "what auto chose"
    if copies[0] != copies[1]:
        raise CheckpointError(
            f"{latest}: segments of a row per global batch were {copies[0]}, are {copies[1]}: the data order could not "
            "continue. Keep masking.fully_explored, or start a new run"
        )


def _copies(masking: dict[str, Any]) -> int | str:
    """Copies of each row in a global batch; auto starts with one."""
    section = masking.get("fully_explored", {})
    if section.get("placement") != "same_batch":
        return 1
    return section["segments_per_sequence"] or f"all at rate {masking['rate']:g}"


def restore_proposer(
    config: RunConfig, corpus: Corpus, engine: deepspeed.DeepSpeedEngine, point: ResumePoint, seed: int
) -> Proposer | None:
    """The mask proposal network in the checkpoint's state, or new if the checkpoint has none (an earlier phase trained
    without it). None if the strategy does not use one. Collective: call on all ranks."""
    if not config.masking.learns_proposal:
        return None
    proposer = create_proposer(config.masking.mapnet, corpus, engine.module.mlm.config, seed=seed)
    proposer.attach(engine.module)
    proposer.run_step = point.step
    if point.checkpoint is not None and point.has_proposal:
        folder = point.checkpoint.folder
        distributed.run_collectively(lambda: _load_proposer(proposer, folder))
    return proposer


def _load_proposer(proposer: Proposer, folder: Path) -> None:
    if (tensors := load.read_extra(folder, MAPNET_STATE)) is None:
        raise CheckpointError(
            f"{folder / MAPNET_STATE}: rank 0 sees it, {socket.gethostname()} does not (yet); resume again"
        )
    proposer.load(tensors)
