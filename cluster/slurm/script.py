"""Job scripts from templates/*.sbatch: options become #SBATCH directives and shell words, with every value quoted.

The script has two readers. For bash, `shlex.quote` makes one word of any text. sbatch has quoting rules of its own:
within double quotes all characters but `"` are literal, except that backslashes are dropped and a line break ends the
directive.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from data_pipeline.hub import snapshot_name
from maskvr_ds.run_folder.layout import JOBS

# Script of the training, and its template.
TRAINING = "job.sbatch"
_PLACEHOLDER = re.compile(r"<<([A-Z_]+)>>")
_PLAIN = re.compile(r"[\w.,:/+@%=-]+")
# Long name of an option of sbatch.
OPTION = r"[a-z][a-z0-9-]*"


class SlurmError(ValueError):
    """A job script that cannot be written, or that Slurm rejects."""


@dataclass(frozen=True)
class JobEnvironment:
    """Environment of a job's commands.

    folder: working directory. python: interpreter, unless venv or container has one. modules: arguments of `module
    load`, in this order. venv: virtual environment. container: Apptainer image. binds: files and folders to bind into
    the container, in addition to folder and venv. gpus: False to train on CPUs.
    """

    folder: Path
    python: str
    modules: tuple[str, ...] = ()
    venv: Path | None = None
    container: str | None = None
    binds: tuple[Path, ...] = ()
    gpus: bool = True

    def lines(self) -> str:
        """Shell commands that set it up."""
        lines = [f"module load {shlex.quote(module)} || exit 1" for module in self.modules]
        if self.venv is not None:
            venv = shlex.quote(str(self.venv))
            lines.append(f'export VIRTUAL_ENV={venv} PATH={venv}/bin:"$PATH"')
        if not self.gpus:
            lines.append("export DS_ACCELERATOR=cpu")
        return "\n".join(lines)

    def command(self) -> list[str]:
        """Command line of Python in it. Raises SlurmError for a path that Apptainer cannot bind."""
        if self.container is None:
            return [self.python if self.venv is None else str(self.venv / "bin" / "python")]
        words = ["apptainer", "exec"] + (["--nv"] if self.gpus else [])
        for path in dict.fromkeys(map(_with_blobs, (self.folder, *self.binds, *([self.venv] if self.venv else [])))):
            if set(",:") & set(str(path)):
                raise SlurmError(f"{path}: a path with a comma or colon cannot be bound into a container; rename it")
            words += ["--bind", str(path)]
        return [*words, self.container, "python3" if self.venv is None else str(self.venv / "bin" / "python")]


def _with_blobs(path: Path) -> Path:
    """The folder of a model in the hub's cache for one of its snapshots, whose files are links to ../../blobs."""
    return path.parents[1] if snapshot_name(path) is not None else path


@dataclass(frozen=True)
class TrainingJob:
    """Parameters of a training job.

    options: of sbatch, long name -> value, None for a flag. run: the run's folder, with seeds the parent of the runs'
    folders. arguments: of maskvr_ds.train, without --resume. tasks_per_node: ranks per node. cpus_per_task: None for
    Slurm's default. seeds: a job array with one task, and one run, per seed. resume: a checkpoint that the run starts
    from, unless it has one of its own.
    """

    options: Mapping[str, str | None]
    run: Path
    arguments: Sequence[str]
    environment: JobEnvironment
    tasks_per_node: int
    max_restarts: int
    signal_seconds: int
    cpus_per_task: int | None = None
    seeds: tuple[int, ...] = field(default=())
    resume: Path | None = None


def words(values: Iterable[object]) -> str:
    """Values as words of a shell command."""
    return " ".join(shlex.quote(str(value)) for value in values)


def directive(name: str, value: str | None) -> str:
    """An option as #SBATCH line; value None: a flag. Raises SlurmError if sbatch would not read back this value."""
    if not re.fullmatch(OPTION, name):
        raise SlurmError(f"--{name}: not the long name of an option of sbatch")
    if value is None:
        return f"#SBATCH --{name}"
    if not value or not value.isprintable() or "\\" in value:
        raise SlurmError(
            f"--{name} {value!r}: a directive in a job script must not be empty, nor contain line breaks, other "
            "control characters or backslashes; use another value"
        )
    escaped = value.replace('"', '\\"')
    return f"#SBATCH --{name}={value}" if _PLAIN.fullmatch(value) else f'#SBATCH --{name}="{escaped}"'


def log_pattern(folder: Path, name: str) -> str:
    """Value of --output: patterns (%j) are expanded in `name`, not in `folder`."""
    return f"{folder}/".replace("%", "%%") + name


def render(template: str, values: dict[str, str]) -> str:
    """A file of templates/ with each <<NAME>> replaced; lines that become empty are removed."""
    text = (resources.files("cluster.slurm") / "templates" / template).read_text(encoding="utf-8")
    # In one pass: a value may contain what looks like a placeholder.
    lines = []
    for line in text.splitlines():
        filled = _PLACEHOLDER.sub(lambda match: values[match[1]], line)
        if filled.strip() or not line.strip():
            lines.append(filled.rstrip(" ") if not filled.strip() else filled)
    return "\n".join(lines) + "\n"


def training_script(job: TrainingJob) -> str:
    """Job script of a training. Raises SlurmError for values that cannot be written to it."""
    options: dict[str, str | None] = {
        **job.options,
        **_size_options(job),
        "output": log_pattern(job.run / JOBS, "%A_%a.log" if job.seeds else "%j.log"),
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_seconds}",
    }
    # --export: after `sbatch --export=NONE` or a list, srun would withhold what the script itself has set.
    srun = ["--export=ALL", "--kill-on-bad-exit=1", "--mpi=none", "--label", "--unbuffered"]
    if job.cpus_per_task is not None:
        # srun does not inherit it from the job (since Slurm 22.05).
        srun.append(f"--cpus-per-task={job.cpus_per_task}")
    if job.seeds:
        options["array"] = f"0-{len(job.seeds) - 1}"
    return render(
        TRAINING,
        {
            "DIRECTIVES": "\n".join([*(directive(*option) for option in options.items()), "#SBATCH --requeue"]),
            "RUN": shlex.quote(str(job.run)),
            "MAX_RESTARTS": str(job.max_restarts),
            "TASKS_PER_NODE": str(job.tasks_per_node),
            "ARGUMENTS": words(job.arguments),
            "RESUME": "auto" if job.resume is None else shlex.quote(str(job.resume)),
            "JOB": _job_id_lines(job),
            "SEEDS": _seed_lines(job),
            "FOLDER": shlex.quote(str(job.environment.folder)),
            "ENVIRONMENT": job.environment.lines(),
            "PYTHON": words(job.environment.command()),
            "SRUN": " ".join(srun),
        },
    )


def _size_options(job: TrainingJob) -> dict[str, str]:
    """Options that request the CPUs of a node."""
    if "-" in (job.options["nodes"] or ""):
        # Not --ntasks-per-node: Slurm would allocate the minimum number of nodes even if more are available.
        return {"mincpus": str(job.tasks_per_node * (job.cpus_per_task or 1))}
    size = {"ntasks-per-node": str(job.tasks_per_node)}
    return size if job.cpus_per_task is None else {**size, "cpus-per-task": str(job.cpus_per_task)}


def _job_id_lines(job: TrainingJob) -> str:
    """Shell lines that set `job` to the same id as maskvr_ds.runtime.slurm_env.job_id."""
    if job.seeds:
        return "\n".join(
            [
                "# Not SLURM_JOB_ID: for one of the tasks it is the id of the array, which addresses all tasks.",
                "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
            ]
        )
    # Inherited if this job was submitted by a task of an array.
    return "job=$SLURM_JOB_ID\nunset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID"


def _seed_lines(job: TrainingJob) -> str:
    if not job.seeds:
        return ""
    runs = [job.run / f"seed-{seed}" for seed in job.seeds]
    return "\n".join(
        [
            "# Each task of the array trains its own run.",
            f"seeds=({words(job.seeds)})",
            f"runs=({words(runs)})",
            f"outputs=({words(f'output_dir={yaml_text(run)}' for run in runs)})",
            "run=${runs[SLURM_ARRAY_TASK_ID]}",
            'arguments+=(--set "seed=${seeds[SLURM_ARRAY_TASK_ID]}" --set "${outputs[SLURM_ARRAY_TASK_ID]}")',
        ]
    )


def yaml_text(value: object) -> str:
    """A text as YAML scalar: `--set` parses YAML."""
    import yaml

    return yaml.safe_dump(str(value), default_style='"', allow_unicode=True, width=10**9).rstrip("\n")


@dataclass(frozen=True)
class ContinuedJob:
    """A job on one node whose command continues where an earlier start of it ended.

    title: first line of the script. what: name in messages. command: module and subcommand for `python -m`. log: name
    of the log in RUN/slurm, a pattern of sbatch. options, run, arguments, environment: as of TrainingJob.
    """

    title: str
    what: str
    command: Sequence[str]
    log: str
    options: Mapping[str, str | None]
    run: Path
    arguments: Sequence[str]
    environment: JobEnvironment
    max_restarts: int
    signal_seconds: int


def continued_script(job: ContinuedJob) -> str:
    """Job script of a command that continues. Raises SlurmError as `training_script`."""
    options = {
        **job.options,
        "nodes": "1",
        "ntasks": "1",
        "output": log_pattern(job.run / JOBS, job.log),
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_seconds}",
    }
    return render(
        "continued.sbatch",
        {
            "TITLE": job.title,
            "DIRECTIVES": "\n".join([*(directive(*option) for option in options.items()), "#SBATCH --requeue"]),
            "MAX_RESTARTS": str(job.max_restarts),
            "ARGUMENTS": words(job.arguments),
            "FOLDER": shlex.quote(str(job.environment.folder)),
            "ENVIRONMENT": job.environment.lines(),
            "PYTHON": words(job.environment.command()),
            "COMMAND": words(job.command),
            "WHAT": job.what,
        },
    )
