"""Submission of job scripts by sbatch, each after the one before it."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.slurm.options import inherited
from cluster.slurm.script import SlurmError
from maskvr_ds.run_folder.layout import SUBMITTED
from maskvr_ds.runtime.files import atomic_write


def check_dependency(others: str | None, jobs: int) -> None:
    """Raise SlurmError if --dependency cannot be combined with a wait for an earlier one of several `jobs`."""
    if others is not None and "?" in others and jobs > 1:
        raise SlurmError(
            f"--dependency {others}: '?' (any of them) cannot be combined with the wait for the job of --build-data or "
            "of the training, because sbatch accepts ',' or '?', not both; submit these jobs one by one"
        )


def dependency_options(job: str, others: str | None) -> list[str]:
    """Options of sbatch: start after `job` and the `others` of --dependency; never, if `job` fails."""
    # On the command line they override the directive in the script.
    return [f"--dependency={','.join(filter(None, [others, f'afterok:{job}']))}", "--kill-on-invalid-dep=yes"]


def submit_all(folder: Path, names: Sequence[str], others: str | None, training: str) -> None:
    """Submit the scripts `names` of `folder` in this order and print their jobs.

    others: value of --dependency. training: the script whose job `status` looks for. Raises SlurmError, which names the
    jobs that are queued already.
    """
    dependency: list[str] = []
    queued: dict[str, str] = {}
    for name in names:
        try:
            job = submit(["sbatch", *dependency, str(folder / name)])
        except SlurmError as error:
            if not queued:
                raise
            jobs = ", ".join(f"{job} ({script})" for script, job in queued.items())
            undo = shlex.join(["scancel", *queued.values()])
            raise SlurmError(f"{error}\n  queued before: {jobs}; before submitting again: {undo}") from None
        queued[name] = job
        if name == training:
            atomic_write(folder / SUBMITTED, job + "\n")
        print(f"{name}: job {job}; logs in {folder}", flush=True)
        dependency = dependency_options(job, others)


def submit(command: list[str]) -> str:
    """Run sbatch, the script last in its words, and return the job's id. Raises SlurmError with its message."""
    variables = inherited(Path(command[-1]).read_text(encoding="utf-8"), os.environ)
    run = partial(subprocess.run, capture_output=True, text=True, env=variables, check=False)
    try:
        result = run([command[0], "--parsable", *command[1:]])
    except FileNotFoundError:
        raise SlurmError("sbatch: not found; run this on a node of a Slurm cluster, or without --submit") from None
    if result.returncode:
        raise SlurmError(f"{shlex.join(command)}: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]
