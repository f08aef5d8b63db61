"""`python -m cluster slurm`: train in a Slurm job that survives its time limit, preemption and lost nodes.

Writes the job script (from templates/job.sbatch) and the resolved configuration to RUN/slurm/, next to the job's logs.
Every start of the job reads that configuration; later changes to run.yaml affect the next submission only. Errors that
can be found before the job is queued are reported here: an invalid configuration, missing or incompatible corpora, a
global batch that cannot be divided among the ranks for some number of nodes that Slurm may allocate. One job trains all
`phases` of a run; --dependency is for runs that depend on each other.
"""

import argparse
import hashlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cluster.slurm.corpora import Build, check_corpora, check_initial_model, parse_build
from cluster.slurm.evaluation import (
    EVALUATE,
    add_evaluation_options,
    check_options,
    evaluation_script,
    parse_evaluation,
)
from cluster.slurm.options import (
    DATA_JOB_OPTIONS,
    check_venv,
    checkpoint_to_resume,
    data_job_options,
    parse_options,
)
from cluster.slurm.script import (
    TRAINING,
    ContinuedJob,
    JobEnvironment,
    SlurmError,
    TrainingJob,
    continued_script,
    training_script,
)
from cluster.slurm.submission import check_dependency, dependency_options, submit_all
from maskvr_ds.config import (
    ConfigError,
    RunConfig,
    add_config_options,
    dump_config,
    load_config,
    with_local_model,
)
from maskvr_ds.run_folder.layout import JOBS
from maskvr_ds.run_folder.marks import is_run, output_fault
from maskvr_ds.runtime.files import atomic_write
from maskvr_ds.runtime.numbers import MAX_NODES, MAX_SEED, MAX_SLOTS, integer, shortened
from maskvr_ds.training.references import file_faults, settings_faults

EXAMPLES = """examples:
  python -m cluster slurm --config run.yaml --nodes 4 --gpus-per-node 8 --time 1-00:00:00 --partition gpu --submit
  python -m cluster slurm --config run.yaml --nodes 2-8 --gpus-per-node 4 --seeds 0 1 2 --container bert.sif
  python -m cluster slurm --config run.yaml --nodes 4 --gpus-per-node 8 --submit \\
      --build-data '--input texts --tokenizer tokenizer --sequence-length 128 --output corpus --workers 16'
"""
# Options passed to sbatch unchanged.
_OPTIONS = {
    "time": "time limit of one start, in a format of sbatch: minutes, HH:MM:SS, D-HH:MM:SS",
    "partition": "Slurm partition",
    "account": "account to charge",
    "qos": "quality of service",
    "constraint": "required node features",
    "mem": "memory per node",
    "dependency": "job that must end first, e.g. afterok:1234",
}
_BUILD_CPUS = 16
# Seconds before its time limit at which a build is requeued: it has nothing to save.
_BUILD_SIGNAL = 60
_NODES = re.compile(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", re.ASCII)
# Minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)|(?P<rest>\d+(?::\d+){0,2})")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "slurm",
        help="write and submit the job script of a training",
        description="Train in one Slurm job: it saves a checkpoint and requeues itself before the time limit, and "
        "resumes\nafter preemption and lost nodes, on fewer nodes if --nodes allows it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser)
    _add_job_options(parser)
    _add_build_options(parser)
    add_evaluation_options(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--submit", action="store_true", help="submit the job (default: print the sbatch command)")
    mode.add_argument("--print", action="store_true", help="print the script, write nothing")
    parser.set_defaults(run=_run)


def _add_job_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", required=True, metavar="N[-M]", help="N-M: as many as available, at least N")
    parser.add_argument(
        "--gpus-per-node",
        required=True,
        type=integer(0, MAX_SLOTS),
        metavar="G",
        help="GPUs, and ranks, per node; 0: train on CPUs",
    )
    parser.add_argument(
        "--tasks-per-node", type=integer(1, MAX_SLOTS), metavar="T", help="ranks per node when training on CPUs"
    )
    parser.add_argument("--cpus-per-task", type=integer(1, MAX_SLOTS), metavar="C", help="CPUs per rank")
    for name, text in _OPTIONS.items():
        parser.add_argument(f"--{name}", help=text)
    parser.add_argument("--job-name", help="default: the name of output_dir")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="further option of sbatch by its long name, e.g. reservation=big, gres=gpu:8, exclusive; may be repeated. "
        f"The jobs of --build-data and --evaluate get only {', '.join(DATA_JOB_OPTIONS)}",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=integer(0, MAX_SEED),
        default=[],
        metavar="S",
        help="job array with one run per seed",
    )
    parser.add_argument("--module", nargs="+", default=[], metavar="NAME", help="environment modules to load")
    parser.add_argument("--venv", metavar="DIR", help="virtual environment; default: the Python that runs this command")
    parser.add_argument("--container", metavar="IMAGE", help="run in this Apptainer image, with its python3")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="PATH",
        help="start from this checkpoint, or this run's newest one; later starts resume the job's own run (auto)",
    )
    parser.add_argument(
        "--max-restarts", type=integer(0, 10**6), default=100, metavar="R", help="restarts allowed (100)"
    )
    parser.add_argument(
        "--signal-seconds",
        type=integer(1, 65_535),
        default=300,
        metavar="S",
        help="time before the limit for a last checkpoint (300)",
    )


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build-data", metavar="ARGUMENTS", help="first run a job `data_pipeline build` with these arguments"
    )
    parser.add_argument(
        "--build-cpus", type=integer(1, MAX_SLOTS), metavar="C", help=f"CPUs of the build job ({_BUILD_CPUS})"
    )
    parser.add_argument("--build-time", metavar="TIME", help="time limit of one start of the build job")
    parser.add_argument("--build-mem", metavar="MEM", help="memory of the build job; default: Slurm's")
    parser.add_argument(
        "--build-partition",
        metavar="NAME",
        help="partition of the build job, which then ignores --sbatch reservation; default: --partition",
    )
    parser.add_argument("--build-qos", metavar="NAME", help="quality of service of the build job; default: --qos")


def _run(arguments: argparse.Namespace) -> int:
    arguments.assignments = with_local_model(arguments.config, arguments.assignments)
    config = load_config(arguments.config, arguments.assignments)
    scripts = render_scripts(arguments, config)
    if arguments.print:
        print("\n".join(scripts.values()), end="")
        return 0
    folder = config.output_dir.absolute() / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config)
    # Atomically: Slurm may start a job on another node at any time.
    for name, text in scripts.items():
        atomic_write(folder / name, text)
    if arguments.submit:
        submit_all(folder, list(scripts), arguments.dependency, TRAINING)
        return 0
    dependency: list[str] = []
    for name in scripts:
        print(shlex.join(["sbatch", *dependency, str(folder / name)]))
        dependency = dependency_options("JOB_ID", arguments.dependency)
    return 0


def config_file(config: RunConfig) -> Path:
    """Path of a job's configuration. Its name contains a hash of the content, so that a new submission does not change
    the configuration of an earlier job that is still queued or may be requeued."""
    digest = hashlib.sha256(dump_config(config).encode()).hexdigest()
    return config.output_dir.absolute() / JOBS / f"config-{digest[:12]}.yaml"


def write_config(config: RunConfig) -> None:
    """Write `config_file`. Raises SlurmError if it was edited: a job may be using it."""
    path, text = config_file(config), dump_config(config)
    if not path.exists():
        atomic_write(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise SlurmError(f"{path}: edited since it was written; make the change in --config, and delete this file")


def render_scripts(arguments: argparse.Namespace, config: RunConfig) -> dict[str, str]:
    """File name -> script, in the order of submission. Raises ConfigError or SlurmError if the job would fail."""
    nodes = parse_nodes(arguments.nodes)
    gpus, tasks = arguments.gpus_per_node, arguments.gpus_per_node or arguments.tasks_per_node
    if gpus < 0 or not tasks or tasks < 1:
        raise SlurmError(f"--gpus-per-node {gpus}: expected a number of GPUs, or 0 and --tasks-per-node for CPUs")
    if gpus and arguments.tasks_per_node not in (None, gpus):
        raise SlurmError(f"--tasks-per-node {arguments.tasks_per_node}: a rank has one GPU; remove this option")
    check_venv(arguments.venv, arguments.container)
    # Every start of the job resumes.
    if (fault := output_fault(config.output_dir, "auto")) is not None:
        raise SlurmError(fault)
    check_batch(config, nodes, tasks)
    if (limit := arguments.time) and (seconds := parse_time(limit)) <= arguments.signal_seconds:
        raise SlurmError(
            f"--time {limit}: {seconds} s, but the last checkpoint starts {arguments.signal_seconds} s before the "
            "limit; raise --time or lower --signal-seconds"
        )
    extra = parse_options(arguments.sbatch, _OPTIONS)
    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    run = config.output_dir.absolute()
    options = {"job-name": arguments.job_name or run.name, "nodes": arguments.nodes, **options}
    if gpus:
        options["gpus-per-node"] = str(gpus)
    if len(set(arguments.seeds)) < len(arguments.seeds):
        raise SlurmError(f"--seeds {' '.join(map(str, arguments.seeds))}: expected different numbers")
    for name in ("cpus", "time", "mem", "partition", "qos"):
        if arguments.build_data is None and getattr(arguments, f"build_{name}") is not None:
            raise SlurmError(f"--build-{name}: there is no build job; add --build-data ARGUMENTS, or omit it")
    build = None if arguments.build_data is None else parse_build(arguments.build_data)
    runs = [config.output_dir / f"seed-{seed}" for seed in arguments.seeds] or [config.output_dir]
    check_corpora(config, build, runs)
    resume = checkpoint_to_resume(arguments.resume, run, arguments.seeds)
    _check_start(config, build, runs, resume)
    check_options(arguments)
    evaluation = None if arguments.evaluate is None else parse_evaluation(arguments.evaluate, run)
    check_dependency(arguments.dependency, 1 + (build is not None) + (evaluation is not None))
    if (limit := arguments.build_time) and parse_time(limit, "--build-time") <= _BUILD_SIGNAL:
        raise SlurmError(f"--build-time {limit}: expected more than {_BUILD_SIGNAL} s; the job requeues itself then")
    if (limit := arguments.evaluate_time) and parse_time(limit, "--evaluate-time") <= arguments.signal_seconds:
        raise SlurmError(f"--evaluate-time {limit}: not longer than --signal-seconds {arguments.signal_seconds}")
    environment = JobEnvironment(
        folder=Path.cwd(),
        python=sys.executable,
        modules=tuple(arguments.module),
        venv=None if arguments.venv is None else Path(arguments.venv).absolute(),
        container=arguments.container,
        binds=(run, *([resume] if resume else []), *_container_binds(config, build)),
        gpus=gpus > 0,
    )
    scripts = {}
    if build is not None:
        scripts["data.sbatch"] = _data_script(arguments, extra, run, build, environment)
    job = TrainingJob(
        options={**options, **extra},
        run=run,
        arguments=["--config", str(config_file(config))],
        environment=environment,
        tasks_per_node=tasks,
        max_restarts=arguments.max_restarts,
        signal_seconds=arguments.signal_seconds,
        cpus_per_task=arguments.cpus_per_task,
        seeds=tuple(arguments.seeds),
        resume=resume,
    )
    scripts[TRAINING] = training_script(job)
    if evaluation is not None:
        extra = data_job_options(extra, other_partition=False)
        scripts[EVALUATE] = evaluation_script(arguments, extra, run, evaluation, environment)
    return scripts


def _check_start(config: RunConfig, build: Build | None, runs: Sequence[Path], resume: Path | None) -> None:
    """Raise ConfigError, one line per fault, for what `maskvr config` finds too, and print its warnings: the DeepSpeed
    file, the model's settings, and, unless a job resumes or a corpus is still to be built, initial model, corpora."""
    faults = settings_faults(config, None)
    # A run that has started needs neither the initial model nor the corpora of finished phases.
    if resume is None and not any(map(is_run, runs)):
        if build is None:
            found, remarks = file_faults(config, monitors=False)
            faults += found
            for line in remarks:
                print(f"warning: {line}", file=sys.stderr)
        else:
            check_initial_model(config.model, build)
    if faults:
        raise ConfigError("\n  ".join(faults))


def _data_script(
    arguments: argparse.Namespace,
    extra: Mapping[str, str | None],
    run: Path,
    build: Build,
    environment: JobEnvironment,
) -> str:
    parent = build.output.parent
    if environment.container is not None and not parent.is_dir():
        raise SlurmError(f"--build-data: {parent}: no such folder, so it cannot be bound into a container; create it")
    options = {
        "job-name": f"{arguments.job_name or run.name}-data",
        "cpus-per-task": str(arguments.build_cpus or _BUILD_CPUS),
        "partition": arguments.build_partition or arguments.partition,
        "account": arguments.account,
        "qos": arguments.build_qos or arguments.qos,
        "mem": arguments.build_mem,
        "time": arguments.build_time,
    }
    other_partition = arguments.build_partition not in (None, arguments.partition)
    given = {name: value for name, value in options.items() if value is not None}
    given |= data_job_options(extra, other_partition)
    # The parent: the corpus folder does not exist yet.
    return continued_script(
        ContinuedJob(
            title="Builds the corpus of a training, written by `python -m cluster slurm --build-data`",
            what="build",
            command=("data_pipeline", "build"),
            log="data-%j.log",
            options=given,
            run=run,
            arguments=build.words,
            environment=replace(environment, binds=(parent, *build.inputs)),
            max_restarts=arguments.max_restarts,
            signal_seconds=_BUILD_SIGNAL,
        )
    )


def _inputs(config: RunConfig) -> list[Path]:
    """Folders that the run reads: corpora of all phases, initial model."""
    phases = [config.phase(index) for index in range(max(1, len(config.phases)))]
    paths = [path for p in phases for path in (*(c.path for c in p.data.corpora), p.data.held_out_path)]
    # Read at the first start only: it may be deleted by now.
    model = config.model.initialize_from
    paths += [model] if model is not None and model.is_dir() else []
    return [path.absolute() for path in paths if path is not None]


def _container_binds(config: RunConfig, build: Build | None) -> list[Path]:
    """Inputs to bind into a container: those that exist or will be built (Apptainer fails on a missing path)."""
    deepspeed_file = Path(config.deepspeed)
    paths = [*_inputs(config), *([deepspeed_file.absolute()] if deepspeed_file.is_file() else [])]
    return [path for path in paths if path.exists() or (build is not None and path.is_relative_to(build.output))]


def parse_nodes(text: str) -> range:
    """Numbers of nodes that Slurm may allocate, from "4" or "2-8". Raises SlurmError."""
    match = _NODES.fullmatch(text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last <= MAX_NODES:
        raise SlurmError(f"--nodes {shortened(text)}: expected N or N-M, 1 ≤ N ≤ M ≤ {MAX_NODES:,}")
    return range(first, last + 1)


def parse_time(text: str, option: str = "--time") -> int:
    """Seconds of a time limit in a format of sbatch. Raises SlurmError, which names the option."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise SlurmError(f"{option} {text}: expected minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS")
    if match["rest"] is None:
        return int(match["days"]) * 86400 + sum(int(match[k] or 0) * n for k, n in (("h", 3600), ("m", 60), ("s", 1)))
    parts = [int(part) for part in match["rest"].split(":")]
    units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
    return sum(part * unit for part, unit in zip(parts, units, strict=True))


def check_batch(config: RunConfig, nodes: range, tasks_per_node: int) -> None:
    """Raise ConfigError if a phase's global batch cannot be divided among the ranks for some number of nodes."""
    for index in range(max(1, len(config.phases))):
        phase = config.phase(index)
        valid, errors = [], {}
        for count in nodes:
            try:
                phase.accumulation_steps(count * tasks_per_node)
                valid.append(count)
            except ConfigError as error:
                errors[count] = error
        if errors:
            which = f" --nodes {nodes[0]}-{nodes[-1]} works with {_list(valid)} only: " if valid else " "
            where = f"phase {config.phases[index].name!r}, " if config.phases else ""
            raise ConfigError(f"{where}{min(errors)} node{'s' * (min(errors) > 1)}:{which}{errors[min(errors)]}")


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
