"""The phases that a run still has to train: only their corpora are needed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from maskvr_ds.config import RunConfig
from maskvr_ds.run_folder.checkpoints import CheckpointError, complete_checkpoints, read_state


def phases_ahead(config: RunConfig, runs: Sequence[Path] = ()) -> Iterator[tuple[str, RunConfig]]:
    """Of each phase that is not finished: "phase NAME: ", empty without phases, and its configuration.

    runs: folders of the runs that continue, several of a job array; none: output_dir of the configuration.
    """
    first = min(_finished(config, run) for run in runs or [config.output_dir])
    for index in range(first, max(1, len(config.phases))):
        yield f"phase {config.phases[index].name!r}: " if config.phases else "", config.phase(index)


def _finished(config: RunConfig, run: Path) -> int:
    """Number of phases that a run has finished, by its newest checkpoint; 0 if that cannot be read."""
    found = complete_checkpoints(run) if config.phases else []
    try:
        history = read_state(found[-1]).phases if found else []
    except CheckpointError:
        return 0
    current = len(history) - 1
    if not 0 <= current < len(config.phases) - 1:
        return max(0, min(current, len(config.phases) - 1))
    steps = config.phase(current).training.steps
    return current + (steps is not None and history[-1]["steps"] >= steps)
