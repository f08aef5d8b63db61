"""--sbatch NAME[=VALUE]: options of sbatch that `python -m cluster slurm` has no name for → options of a job script."""

import re
from collections.abc import Iterable, Mapping

from cluster.slurm.script import OPTION, SlurmError

_OWN_LOG = "a run's logs are RUN/slurm/JOB.log, appended to by every start; leave it out"
_REQUEUE = "the script queues itself again, --max-restarts limits it; leave it out"
# What the script lays over the rest, or what breaks it. Name of sbatch's option → what to do instead.
_TAKEN = {
    "array": "it would start several tasks on one run; say --seeds for a run each",
    "chdir": "the job runs in the folder that this command is given in; change to that, and leave it out",
    "cpus-per-task": "say --cpus-per-task, which the ranks are started with too",
    "error": _OWN_LOG,
    "gpus-per-node": "say --gpus-per-node",
    "job-name": "say --job-name",
    "mincpus": "it is made of --cpus-per-task and the ranks a node; say these",
    "no-requeue": _REQUEUE,
    "nodes": "say --nodes",
    "ntasks": "it is made of --nodes and the ranks a node; say --gpus-per-node, or --tasks-per-node on CPUs",
    "ntasks-per-node": "say --gpus-per-node, or --tasks-per-node on CPUs",
    "open-mode": _OWN_LOG,
    "output": _OWN_LOG,
    "requeue": _REQUEUE,
    "signal": "the script needs its own, by which it saves before the time limit; say --signal-seconds",
    "tasks-per-node": "say --gpus-per-node, or --tasks-per-node on CPUs",
}
# Beginnings of these that are options of their own; sbatch takes any other beginning for the whole name.
_WHOLE = {"gpus"}
# What says who a job is for and how it is told of, not what nodes it needs.
FOR_DATA = ("clusters", "comment", "export", "mail-type", "mail-user", "nice", "reservation", "wckey")


def parse_options(texts: Iterable[str], named: Iterable[str]) -> dict[str, str | None]:
    """Name → value, None for a flag. named: options that this command has, by the same name.

    Raises SlurmError for what is no long name, has an option here, is what the script sets itself, or comes twice.
    """
    taken = {**{name: f"say --{name}" for name in named}, **_TAKEN}
    options: dict[str, str | None] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not re.fullmatch(OPTION, name) or len(name) == 1:
            raise SlurmError(
                f"--sbatch {text}: NAME=VALUE expected, or NAME of a flag: the long name of an option of sbatch, "
                "without dashes before it"
            )
        for own, remedy in taken.items():
            if name == own or (own.startswith(name) and name not in _WHOLE):
                what = own if name == own else f"{name}, which sbatch takes for {own},"
                raise SlurmError(f"--sbatch {text}: {what} is not to be set so: {remedy}")
        if name in options:
            raise SlurmError(f"--sbatch {text}: {name} is given twice; leave one out")
        options[name] = value if equals else None
    return options


def for_data(options: Mapping[str, str | None], elsewhere: bool) -> dict[str, str | None]:
    """Those of them that the job of --build-data has too. elsewhere: in a partition of its own, where a reservation of
    the training's nodes would keep it from ever starting."""
    left_out = {"reservation"} if elsewhere else set()
    return {name: value for name, value in options.items() if name in FOR_DATA and name not in left_out}
