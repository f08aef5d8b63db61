"""`python -m cluster slurm`: a training as a Slurm job that survives its time limit, preemption and lost nodes.

The script (templates/job.sbatch) goes into RUN/slurm/, where its logs will be too, and beside it the resolved
configuration, which every start of the job reads: changes to run.yaml are for the next submission. What can be known
to go wrong is told before it is queued: a configuration that does not hold, corpora that are not there or do not fit,
a global batch that does not divide among the ranks of every number of nodes that Slurm may give.
A run with `phases` crosses from one to the next by itself; --dependency is for runs that follow one another.
"""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.slurm.corpora import Build, check_corpora, parse_build
from cluster.slurm.options import FOR_DATA, for_data, parse_options
from cluster.slurm.script import SlurmError, Surroundings, TrainingJob, data_script, training_script
from maskvr_ds.config import (
    ConfigError,
    RunConfig,
    add_config_options,
    deepspeed_config_path,
    dump_config,
    load_config,
)
from maskvr_ds.run_folder.layout import JOBS

EXAMPLES = """examples:
  python -m cluster slurm --config run.yaml --nodes 4 --gpus-per-node 8 --time 1-00:00:00 --partition gpu --submit
  python -m cluster slurm --config run.yaml --nodes 2-8 --gpus-per-node 4 --seeds 0 1 2 --container bert.sif
  python -m cluster slurm --config run.yaml --nodes 4 --gpus-per-node 8 --submit \\
      --build-data '--input texts --tokenizer tokenizer --sequence-length 128 --output corpus --workers 16'
"""
# Passed on to sbatch as they are.
_OPTIONS = {
    "time": "limit of one start, as sbatch takes it: minutes, HH:MM:SS, D-HH:MM:SS",
    "partition": "where to queue",
    "account": "who pays",
    "qos": "quality of service",
    "constraint": "features of the nodes",
    "mem": "memory a node",
    "dependency": "e.g. afterok:1234, a job that must be done before",
}
_NODES = re.compile(r"([1-9]\d*)(?:-([1-9]\d*))?")
# Minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS
_TIME = re.compile(r"(?:(?P<days>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)|(?P<rest>\d+(?::\d+){0,2})")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "slurm",
        help="write a training's job script, and submit it",
        description="Write a training as one Slurm job: checkpoint and requeue before the time limit, going on after "
        "preemption and lost nodes, also on fewer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser)
    parser.add_argument("--nodes", required=True, metavar="N[-M]", help="with M: as many as there are, at least N")
    parser.add_argument("--gpus-per-node", required=True, type=int, metavar="G", help="ranks a node; 0: on CPUs")
    parser.add_argument("--tasks-per-node", type=int, metavar="T", help="ranks a node where there are no GPUs")
    parser.add_argument("--cpus-per-task", type=int, metavar="C", help="CPUs a rank")
    for name, what in _OPTIONS.items():
        parser.add_argument(f"--{name}", help=what)
    parser.add_argument("--job-name", help="default: the name of output_dir")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="another option of sbatch, by its long name: reservation=big, gres=gpu:8; a flag alone: exclusive. May be "
        f"repeated. The job of --build-data has of these {', '.join(FOR_DATA)}",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="S", help="a job array: a run for each")
    parser.add_argument("--module", nargs="+", default=[], metavar="NAME", help="environment modules to load")
    parser.add_argument("--venv", metavar="DIR", help="virtual environment; default: the Python that runs this")
    parser.add_argument("--container", metavar="IMAGE", help="run in this Apptainer image, with its python3")
    parser.add_argument("--max-restarts", type=int, default=100, metavar="R", help="starts after the first (100)")
    parser.add_argument(
        "--signal-seconds", type=int, default=300, metavar="S", help="time for the last checkpoint (300)"
    )
    parser.add_argument("--build-data", metavar="ARGUMENTS", help="of `data_pipeline build`: a job that runs before")
    parser.add_argument("--build-cpus", type=int, default=16, metavar="C", help="of that job (16)")
    parser.add_argument("--build-time", metavar="TIME", help="of that job")
    parser.add_argument("--build-mem", metavar="MEM", help="of that job; default: Slurm's")
    parser.add_argument(
        "--build-partition", metavar="NAME", help="of that job, which is then in no reservation; default: --partition"
    )
    parser.add_argument("--build-qos", metavar="NAME", help="of that job; default: --qos")
    what_then = parser.add_mutually_exclusive_group()
    what_then.add_argument("--submit", action="store_true", help="hand it to sbatch")
    what_then.add_argument("--print", action="store_true", help="print it to look at, write nothing")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.assignments)
    scripts = render_scripts(arguments, config)
    if arguments.print:
        print("\n".join(scripts.values()), end="")
        return 0
    folder = config.output_dir.absolute() / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    keep_config(config)
    for name, text in scripts.items():
        _write(folder / name, text)
    dependency: list[str] = []
    for name in scripts:
        command = ["sbatch", *dependency, str(folder / name)]
        if arguments.submit:
            job = submit(command)
            print(f"{name}: job {job}; logs in {folder}")
            dependency = follow(job, arguments.dependency)
        else:
            print(shlex.join(command))
            dependency = follow("JOB_ID", arguments.dependency)
    return 0


def config_file(config: RunConfig) -> Path:
    """Where a job finds its configuration. Named by its content, so that no submission changes what an earlier one,
    which may still be queued or come back, reads."""
    digest = hashlib.sha256(dump_config(config).encode()).hexdigest()
    return config.output_dir.absolute() / JOBS / f"config-{digest[:12]}.yaml"


def keep_config(config: RunConfig) -> None:
    """Write it there. Raises SlurmError where the file has been edited: a job may be reading it as it is."""
    path, text = config_file(config), dump_config(config)
    if not path.exists():
        _write(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise SlurmError(f"{path}: edited since it was written; make the change in --config, and remove this file")


def _write(path: Path, text: str) -> None:
    """Whole or not at all: Slurm may start a job on another node at any time."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def follow(job: str, others: str | None) -> list[str]:
    """Options of sbatch: after `job`, and after what was asked for besides; never, where the job fails."""
    # On the command line it replaces the script's line.
    return [f"--dependency={','.join(filter(None, [others, f'afterok:{job}']))}", "--kill-on-invalid-dep=yes"]


def render_scripts(arguments: argparse.Namespace, config: RunConfig) -> dict[str, str]:
    """File name → script, in the order of submission. Raises ConfigError and SlurmError for what cannot work."""
    nodes = parse_nodes(arguments.nodes)
    gpus, tasks = arguments.gpus_per_node, arguments.gpus_per_node or arguments.tasks_per_node
    if gpus < 0 or not tasks or tasks < 1:
        raise SlurmError(f"--gpus-per-node {gpus}: number of GPUs expected, or 0 and --tasks-per-node with CPU ranks")
    if gpus and arguments.tasks_per_node not in (None, gpus):
        raise SlurmError(f"--tasks-per-node {arguments.tasks_per_node}: a rank has one GPU; leave it out")
    _check_least(arguments)
    _check_venv(arguments)
    check_batch(config, nodes, tasks)
    deepspeed_config_path(config.deepspeed)  # raises where there is none
    if (limit := arguments.time) and (seconds := parse_time(limit)) <= arguments.signal_seconds:
        raise SlurmError(
            f"--time {limit}: {seconds} s, and the last checkpoint begins {arguments.signal_seconds} s before that; "
            "raise --time or lower --signal-seconds"
        )
    further = parse_options(arguments.sbatch, _OPTIONS)
    options = {name: value for name in _OPTIONS if (value := getattr(arguments, name)) is not None}
    run = config.output_dir.absolute()
    options = {"job-name": arguments.job_name or run.name, "nodes": arguments.nodes, **options}
    if gpus:
        options["gpus-per-node"] = str(gpus)
    if len(set(arguments.seeds)) < len(arguments.seeds) or min(arguments.seeds, default=0) < 0:
        raise SlurmError(f"--seeds {' '.join(map(str, arguments.seeds))}: different numbers from 0 expected")
    build = None if arguments.build_data is None else parse_build(arguments.build_data)
    check_corpora(config, build)
    surroundings = Surroundings(
        folder=Path.cwd(),
        python=sys.executable,
        modules=tuple(arguments.module),
        venv=None if arguments.venv is None else Path(arguments.venv).absolute(),
        container=arguments.container,
        binds=(run, *_shown(config, build)),
        gpus=gpus > 0,
    )
    scripts = {}
    if build is not None:
        scripts["data.sbatch"] = _data_script(arguments, further, run, build, surroundings)
    job = TrainingJob(
        options={**options, **further},
        run=run,
        arguments=["--config", str(config_file(config))],
        surroundings=surroundings,
        tasks_per_node=tasks,
        max_restarts=arguments.max_restarts,
        signal_seconds=arguments.signal_seconds,
        cpus_per_task=arguments.cpus_per_task,
        seeds=tuple(arguments.seeds),
    )
    return {**scripts, "job.sbatch": training_script(job)}


def _data_script(
    arguments: argparse.Namespace,
    further: Mapping[str, str | None],
    run: Path,
    build: Build,
    surroundings: Surroundings,
) -> str:
    parent = build.output.parent
    if surroundings.container is not None and not parent.is_dir():
        raise SlurmError(f"--build-data: {parent}: no such folder, and a container is shown what is there; make it")
    options = {
        "job-name": f"{arguments.job_name or run.name}-data",
        "cpus-per-task": str(arguments.build_cpus),
        "partition": arguments.build_partition or arguments.partition,
        "account": arguments.account,
        "qos": arguments.build_qos or arguments.qos,
        "mem": arguments.build_mem,
        "time": arguments.build_time,
    }
    elsewhere = arguments.build_partition not in (None, arguments.partition)
    given = {name: value for name, value in options.items() if value is not None} | for_data(further, elsewhere)
    # The corpus' own folder is yet to be made.
    return data_script(given, run, build.words, replace(surroundings, binds=(parent, *build.reads)))


def _check_least(arguments: argparse.Namespace) -> None:
    for name, least in (("max_restarts", 0), ("signal_seconds", 1), ("cpus_per_task", 1), ("build_cpus", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise SlurmError(f"--{name.replace('_', '-')} {value}: at least {least} expected")


def _check_venv(arguments: argparse.Namespace) -> None:
    if arguments.venv is None:
        return
    python = Path(arguments.venv).absolute() / "bin" / "python"
    # One made within a container points to a Python that is only there.
    if not (python.exists() or (arguments.container is not None and python.is_symlink())):
        raise SlurmError(
            f"--venv {arguments.venv}: no virtual environment there ({python} is missing); correct the path, or make "
            "it where all nodes see it"
        )


def _inputs(config: RunConfig) -> list[Path]:
    """Folders that the run reads."""
    phases = [config.phase(index) for index in range(max(1, len(config.phases)))]
    paths = [path for p in phases for path in (*(c.path for c in p.data.corpora), p.data.held_out_path)]
    # Needed at the first start only: it may be gone by now.
    model = config.model.initialize_from
    paths += [model] if model is not None and model.is_dir() else []
    return [path.absolute() for path in paths if path is not None]


def _shown(config: RunConfig, build: Build | None) -> list[Path]:
    """What a container is shown of that: what is there or will be built, for it refuses what is not."""
    own = Path(config.deepspeed)
    paths = [*_inputs(config), *([own.absolute()] if own.is_file() else [])]
    return [path for path in paths if path.exists() or (build is not None and path.is_relative_to(build.output))]


def parse_nodes(text: str) -> range:
    """ "4" or "2-8" → the numbers of nodes that Slurm may give. Raises SlurmError."""
    match = _NODES.fullmatch(text)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if least > most:
        raise SlurmError(f"--nodes {text}: N or N-M expected, 1 ≤ N ≤ M")
    return range(least, most + 1)


def parse_time(text: str) -> int:
    """A time limit as sbatch takes it → seconds. Raises SlurmError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise SlurmError(f"--time {text}: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS expected")
    if match["rest"] is None:
        return int(match["days"]) * 86400 + sum(int(match[k] or 0) * n for k, n in (("h", 3600), ("m", 60), ("s", 1)))
    parts = [int(part) for part in match["rest"].split(":")]
    units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(parts)]
    return sum(part * unit for part, unit in zip(parts, units, strict=True))


def check_batch(config: RunConfig, nodes: range, tasks_per_node: int) -> None:
    """Raise ConfigError where a phase's global batch does not divide among the ranks of some number of nodes."""
    for index in range(max(1, len(config.phases))):
        phase = config.phase(index)
        fits, faults = [], {}
        for count in nodes:
            try:
                phase.accumulation_steps(count * tasks_per_node)
                fits.append(count)
            except ConfigError as error:
                faults[count] = error
        if faults:
            which = f" --nodes {nodes[0]}-{nodes[-1]} works with {_list(fits)} only: " if fits else " "
            named = f"phase {config.phases[index].name!r}, " if config.phases else ""
            raise ConfigError(f"{named}{min(faults)} nodes:{which}{faults[min(faults)]}")


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def submit(command: list[str]) -> str:
    """Run sbatch → the job's id. Raises SlurmError with its words."""
    # Submitted from inside of a job, the new one must not take over what that one is.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
    run = partial(subprocess.run, capture_output=True, text=True, env=inherited, check=False)
    try:
        result = run([command[0], "--parsable", *command[1:]])
    except FileNotFoundError:
        raise SlurmError("sbatch: not found; run this on a node of a Slurm cluster, or without --submit") from None
    if result.returncode:
        raise SlurmError(f"{shlex.join(command)}: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]
