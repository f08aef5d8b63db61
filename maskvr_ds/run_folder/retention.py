"""Checkpoint retention: selection and deletion of old checkpoints. Loads no torch.

Nothing that may still be needed is deleted before its successor is complete and was read back. Links are removed, what
they lead to is not touched. A deletion that fails is a warning (`files.discard`): housekeeping never costs a save.
"""

import logging
import math
from collections.abc import Collection
from pathlib import Path

from maskvr_ds.run_folder.checkpoints import CheckpointError, checkpoints, complete_checkpoints, read_state, step_of
from maskvr_ds.run_folder.layout import BEST, CHECKPOINTS, DELETING, LATEST, SAVING
from maskvr_ds.runtime.files import atomic_write, discard, set_aside, warn_of

logger = logging.getLogger(__name__)
# Of `CheckpointState.held_out`: the loss, and what it was measured on.
LOSS, MEASURED = "held_out_loss", ("held_out_rows", "held_out_unigram_entropy")
_MEANING = {LATEST: "newest", BEST: "best"}


def remove(folder: Path) -> None:
    """Delete a checkpoint. Renamed first, so that an interrupted deletion leaves no partial checkpoint behind."""
    if folder.is_symlink():
        discard(folder)
        return
    try:
        hidden = set_aside(folder, DELETING)
    except OSError as error:
        warn_of(folder, error)
        return
    discard(hidden)


def remove_remains(run: Path) -> None:
    """Delete what interrupted saves and deletions have left."""
    for prefix in (SAVING, DELETING):
        for rest in (run / CHECKPOINTS).glob(f"{prefix}*"):
            discard(rest)


def make_way(final: Path) -> None:
    """Rename whatever has the name of a checkpoint that is complete now: one of an abandoned history, which is then
    deleted with other remains, or a file or checkpoint that is not the run's, which is kept under its new name.

    Raises CheckpointError if it cannot be renamed.
    """
    if not final.is_symlink() and not final.exists():
        return
    try:
        if final.is_symlink() or (final.is_dir() and not _is_misnamed(final)):
            set_aside(final, DELETING)
        else:
            logger.warning("%s is no checkpoint of that step; renamed %s", final, set_aside(final, "not-of-this-run-"))
    except OSError as error:
        raise CheckpointError(f"{final}: in the way of the new checkpoint of that step ({error}); move it") from error


def _is_misnamed(folder: Path) -> bool:
    """Whether the content is a checkpoint of another step than the folder's name says."""
    try:
        return read_state(folder).step != step_of(folder)
    except CheckpointError:
        return False


def best_of_phases(run: Path, saved: Path) -> list[Path]:
    """The checkpoint with the lowest held-out loss of each phase, in order, among those up to `saved`; the earliest of
    equal ones. Phases may have other held-out corpora, so that their losses do not compare; if a phase has changed its
    own, or the number of rows, at a resume, only those count that were measured as the newest one was, and those of
    earlier versions, which do not say how."""
    best: dict[int, tuple[float, Path]] = {}
    measured: dict[int, list[float | None]] = {}
    for folder in reversed(checkpoints(run)):
        try:
            state = read_state(folder)
        except CheckpointError:
            continue
        loss, phase = state.held_out.get(LOSS, math.nan), len(state.phases)
        if state.step == step_of(folder) <= step_of(saved) and math.isfinite(loss):
            # Rounded: another version of numpy may sum the entropy in another order.
            how = [None if (x := state.held_out.get(name)) is None else round(x, 6) for name in MEASURED]
            # What earlier versions kept as the best is not to be lost by an update.
            if how in (measured.setdefault(phase, how), [None] * len(MEASURED)):
                best[phase] = min(best.get(phase, (math.inf, folder)), (loss, folder))
    return [best[phase][1] for phase in sorted(best)]


def remove_old(run: Path, saved: Path, *, keep_last: int, keep_every_steps: int, keep: Collection[Path] = ()) -> None:
    """Delete checkpoints once `saved` is complete: later ones, and all but the newest `keep_last`, those of every n-th
    step (0: none) and those in `keep`.

    Later ones belong to a history that was abandoned: they were skipped as damaged, or led to divergence. Damaged ones
    do not count as kept. Folders that hold another step than their name's, copies made by hand, are neither counted nor
    deleted; neither are files.
    """
    step = step_of(saved)
    good: list[Path] = []
    others: list[Path] = []
    for folder in checkpoints(run):
        try:
            stored = read_state(folder).step
        except CheckpointError:
            if folder.is_dir() or folder.is_symlink():
                others.append(folder)
            continue
        if stored == step_of(folder):
            (good if stored <= step else others).append(folder)
        else:
            logger.warning("%s holds a checkpoint of step %d under another step's name; it is ignored", folder, stored)
    complete = set(complete_checkpoints(run))
    for folder in [*good[:-keep_last], *others]:
        later = step_of(folder) > step
        kept = folder in keep or (keep_every_steps and step_of(folder) % keep_every_steps == 0)
        # Incomplete folders before this step are not this job's work: they are left for whoever made them.
        if later or (folder in complete and not kept):
            remove(folder)


def point_to(folder: Path, name: str) -> None:
    """Write the name of a checkpoint's folder to the file `name` (LATEST, BEST) next to it, atomically. It is for
    people and scripts only: a failure is a warning."""
    path = folder.with_name(name)
    try:
        atomic_write(path, folder.name + "\n")
    except OSError as error:
        logger.warning("%s could not be written (%s); it does not name the %s checkpoint", path, error, _MEANING[name])
