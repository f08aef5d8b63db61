"""The job of `python -m cluster slurm --evaluate`: `maskvr evaluate` after the training, restarted like it."""

import argparse
import contextlib
import io
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.slurm.script import ContinuedJob, JobEnvironment, SlurmError, continued_script
from data_pipeline.hub import MODEL_FILES, local_folder
from maskvr_ds.cli.downstream import check_evaluate
from maskvr_ds.cli.main import command_parser
from maskvr_ds.runtime.numbers import MAX_SLOTS, integer

EVALUATE = "evaluate.sbatch"
_CPUS = 8


@dataclass(frozen=True)
class Evaluation:
    """words: arguments of `maskvr evaluate`. reads: models and data, as far as they exist by now. output: folder or
    file of the scores; None if they are printed only."""

    words: tuple[str, ...]
    reads: tuple[Path, ...]
    output: Path | None


def add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--evaluate",
        metavar="ARGUMENTS",
        help="afterwards run a job `maskvr evaluate` with these arguments, e.g. 'RUN --checkpoints all --tasks sst2 "
        "--data glue --output scores'",
    )
    parser.add_argument(
        "--evaluate-cpus", type=integer(1, MAX_SLOTS), metavar="C", help=f"CPUs of the evaluation ({_CPUS})"
    )
    parser.add_argument(
        "--evaluate-gpus",
        type=integer(0, MAX_SLOTS),
        metavar="G",
        help="GPUs of the evaluation; default: --gpus-per-node. Several need --jobs in its arguments",
    )
    parser.add_argument("--evaluate-time", metavar="TIME", help="time limit of one start of the evaluation")
    parser.add_argument("--evaluate-mem", metavar="MEM", help="memory of the evaluation; default: Slurm's")


def check_options(arguments: argparse.Namespace) -> None:
    """Raise SlurmError for options of an evaluation without --evaluate."""
    for name in ("cpus", "gpus", "time", "mem"):
        if arguments.evaluate is None and getattr(arguments, f"evaluate_{name}") is not None:
            raise SlurmError(f"--evaluate-{name}: there is no evaluation; add --evaluate ARGUMENTS, or omit it")


def parse_evaluation(text: str, run: Path) -> Evaluation:
    """Parse the value of --evaluate. run: of the training, which need not exist yet.

    A model that is named as on a hub is fetched, as a node may have no access to it; the job finds it in the cache.
    Raises SlurmError for arguments that `maskvr evaluate` would reject, and for missing models and data.
    """
    said = io.StringIO()
    try:
        given = shlex.split(text)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            arguments = command_parser().parse_args(["evaluate", *given])
        check_evaluate(arguments)
        models = [_model(name, run) for name in arguments.models]
    except ValueError as error:
        raise SlurmError(f"--evaluate {text!r}: {error}") from None
    except SystemExit:
        raise SlurmError(f"--evaluate {text!r}: {said.getvalue().strip().splitlines()[-1]}") from None
    folders = [Path(arguments.data).absolute()]
    if arguments.intermediate_data is not None:
        folders.append(Path(arguments.intermediate_data).absolute())
    for option, data in zip(("--data", "--intermediate-data"), folders, strict=False):
        if not data.exists() and not data.is_relative_to(run.absolute()):
            raise SlurmError(f"--evaluate: {option} {data}: no such file or folder; correct the path")
    reads = [path for path in (*models, *folders) if path.exists()]
    output = None if arguments.output is None else Path(arguments.output).absolute()
    return Evaluation(tuple(given), tuple(reads), output)


def _model(name: str, run: Path) -> Path:
    """The folder of a MODEL, which may lie in `run`, and then be written only by the training."""
    folder = Path(name).absolute()
    if folder.exists() or folder.is_relative_to(run.absolute()):
        return folder
    folder = local_folder(name, MODEL_FILES, "MODEL")
    if not folder.is_dir():
        raise SlurmError(f"MODEL {name}: no such folder, and not in the run {run}; correct the path")
    return folder


def evaluation_script(
    arguments: argparse.Namespace,
    extra: Mapping[str, str | None],
    run: Path,
    evaluation: Evaluation,
    environment: JobEnvironment,
) -> str:
    """Job script of an evaluation. extra: options of --sbatch that apply to it.

    Raises SlurmError for values that cannot be written to it.
    """
    gpus = arguments.gpus_per_node if arguments.evaluate_gpus is None else arguments.evaluate_gpus
    parents = () if evaluation.output is None else (evaluation.output.parent,)
    if environment.container is not None and parents and not parents[0].is_dir():
        raise SlurmError(f"--evaluate: {parents[0]}: no such folder, so it cannot be bound into a container; create it")
    options: dict[str, str | None] = {
        "job-name": f"{arguments.job_name or run.name}-evaluate",
        "cpus-per-task": str(arguments.evaluate_cpus or _CPUS),
        "gpus-per-node": str(gpus) if gpus else None,
        "partition": arguments.partition,
        "account": arguments.account,
        "qos": arguments.qos,
        "mem": arguments.evaluate_mem,
        "time": arguments.evaluate_time,
    }
    given = {**{name: value for name, value in options.items() if value is not None}, **extra}
    # The training has created its own folder by then.
    environment = replace(environment, gpus=gpus > 0, binds=(run, *evaluation.reads, *parents))
    return continued_script(
        ContinuedJob(
            title="An evaluation, written by `python -m cluster slurm --evaluate`",
            what="evaluation",
            command=("maskvr_ds.cli", "evaluate"),
            log="evaluate-%j.log",
            options=given,
            run=run,
            arguments=evaluation.words,
            environment=environment,
            max_restarts=arguments.max_restarts,
            signal_seconds=arguments.signal_seconds,
        )
    )
