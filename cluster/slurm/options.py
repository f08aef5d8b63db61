"""Parser of `--sbatch NAME[=VALUE]`, options of sbatch that `python -m cluster slurm` has no option for; checks of
paths that other options name."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cluster.slurm.script import OPTION, SlurmError
from maskvr_ds.run_folder import checkpoints

_LOG = "every start appends to RUN/slurm/JOB.log; remove this option"
_REQUEUE = "the script requeues itself, up to --max-restarts; remove this option"
_RANKS = "use --gpus-per-node, or --tasks-per-node on CPUs"
# Options that the script sets or relies on -> what to do instead.
_RESERVED = {
    "array": "it would start several tasks on one run; use --seeds for one run per task",
    "chdir": "the job runs in the current folder; change to another one, and remove this option",
    "cpus-per-task": "use --cpus-per-task, which also applies to the ranks",
    "error": _LOG,
    "gpus-per-node": "use --gpus-per-node",
    "job-name": "use --job-name",
    "mincpus": "it follows from --cpus-per-task and the ranks per node; use these",
    "no-requeue": _REQUEUE,
    "nodes": "use --nodes",
    "ntasks": f"it follows from --nodes and the ranks per node; {_RANKS}",
    "ntasks-per-node": _RANKS,
    "open-mode": _LOG,
    "output": _LOG,
    "requeue": _REQUEUE,
    "signal": "the script needs its signal to save before the time limit; use --signal-seconds",
    "tasks-per-node": _RANKS,
    "test-only": "nothing would be queued; use `sbatch --test-only RUN/slurm/job.sbatch`",
}
# sbatch accepts abbreviations of option names; these prefixes of reserved names are options themselves.
_NOT_ABBREVIATIONS = {"gpus"}
# Options about who a job is for and how it is reported, not about the nodes that it needs.
DATA_JOB_OPTIONS = ("clusters", "comment", "export", "mail-type", "mail-user", "nice", "reservation", "wckey")

# Variables of sbatch for an option, where they are not SBATCH_ and its name.
_VARIABLES = {
    "array": ("SBATCH_ARRAY_INX",),
    "mem": ("SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU", "SBATCH_MEM_PER_GPU"),
    "requeue": ("SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"),
    "time": ("SBATCH_TIMELIMIT",),
}


def parse_options(texts: Iterable[str], named: Iterable[str]) -> dict[str, str | None]:
    """Option name -> value, None for a flag. named: options that this command has under the same name.

    Raises SlurmError if a name is not a long option name, is an option of this command, is set by the script, or is
    repeated.
    """
    reserved = {**{name: f"use --{name}" for name in named}, **_RESERVED}
    options: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch(OPTION, name) or len(name) == 1:
            raise SlurmError(
                f"--sbatch {text}: expected NAME=VALUE, or NAME of a flag: the long name of an option of sbatch, "
                "without leading dashes"
            )
        for option, remedy in reserved.items():
            if name == option or (option.startswith(name) and name not in _NOT_ABBREVIATIONS):
                what = option if name == option else f"{name}, which sbatch reads as {option},"
                raise SlurmError(f"--sbatch {text}: {what} cannot be set here: {remedy}")
        if name in options:
            raise SlurmError(f"--sbatch {text}: {name} is given twice; remove one")
        options[name] = value if equals else None
    return options


def data_job_options(options: Mapping[str, str | None], other_partition: bool) -> dict[str, str | None]:
    """The options that apply to the job of --build-data too.

    other_partition: it runs in another partition, where it would never start in a reservation of the training's nodes.
    """
    excluded = {"reservation"} if other_partition else set()
    return {name: value for name, value in options.items() if name in DATA_JOB_OPTIONS and name not in excluded}


def inherited(script: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for the sbatch of a script: without what sbatch would prefer to the script's directives.

    A log of errors and an array that the script does not have would be as wrong. Nor may a job that is submitted within
    another one inherit the variables of that one.
    """
    names = {"array", "error", *re.findall(rf"^#SBATCH --({OPTION})", script, re.MULTILINE)}
    given = {v for name in names for v in _VARIABLES.get(name, (f"SBATCH_{name.upper().replace('-', '_')}",))}
    return {
        name: value
        for name, value in environment.items()
        if name not in given and (not name.startswith("SLURM_") or name == "SLURM_CONF")
    }


def check_venv(venv: str | None, container: str | None) -> None:
    """Raise SlurmError if there is no virtual environment `venv`. container: the image in which the ranks run."""
    if venv is None:
        return
    python = Path(venv).absolute() / "bin" / "python"
    # The Python of one created in a container is a link that is valid in the container only.
    if not (python.exists() or (container is not None and python.is_symlink())):
        raise SlurmError(
            f"--venv {venv}: no virtual environment there ({python} is missing); correct the path, or create "
            "it on a file system that all nodes share"
        )


def checkpoint_to_resume(text: str, run: Path, seeds: Sequence[int]) -> Path | None:
    """The checkpoint that `--resume` names: it, or a run's newest one; None for "auto". run, seeds: the job's.

    Raises SlurmError if seeds are given, CheckpointError if there is no such checkpoint, or if the run exists and was
    not started from it.
    """
    if text == "auto":
        return None
    if seeds:
        raise SlurmError(f"--resume {text}: a checkpoint belongs to one seed; remove --seeds")
    folder = checkpoints.newest(Path(text)).absolute()
    try:
        checkpoints.find(run, text)
    except checkpoints.CheckpointError:
        # The same command as at the first submission, and the run has checkpoints of its own by now.
        if not checkpoints.complete_checkpoints(run) or checkpoints.origin(run) != folder.resolve():
            raise
    return folder
