"""Job scripts from templates/*.sbatch: options → #SBATCH lines and shell words, every value quoted for who reads it.

Two readers: bash, for which `shlex.quote` makes any text one word; and sbatch, whose lines have quoting of their own
(in double quotes all but `"` stands for itself, except that backslashes vanish and a line ends with its line).
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

_PLACE = re.compile(r"<<([A-Z_]+)>>")
_PLAIN = re.compile(r"[\w.,:/+@%=-]+")
# The long name of an option of sbatch.
OPTION = r"[a-z][a-z0-9-]*"


class SlurmError(ValueError):
    """A job that cannot be written, or that Slurm does not take."""


@dataclass(frozen=True)
class Surroundings:
    """What a job's commands run in.

    folder: working directory. modules: of the cluster's `module load`, in that order. venv: a virtual environment.
    container: an Apptainer image; binds: files and folders shown in it besides. gpus: whether there are any.
    python: the interpreter, where neither venv nor container say.
    """

    folder: Path
    python: str
    modules: tuple[str, ...] = ()
    venv: Path | None = None
    container: str | None = None
    binds: tuple[Path, ...] = ()
    gpus: bool = True

    def lines(self) -> str:
        """Shell commands that prepare it."""
        lines = [f"module load {shlex.quote(module)} || exit 1" for module in self.modules]
        if self.venv is not None:
            venv = shlex.quote(str(self.venv))
            lines.append(f'export VIRTUAL_ENV={venv} PATH={venv}/bin:"$PATH"')
        if not self.gpus:
            lines.append("export DS_ACCELERATOR=cpu")
        return "\n".join(lines)

    def command(self) -> list[str]:
        """The words that start Python in it."""
        if self.container is None:
            return [self.python if self.venv is None else str(self.venv / "bin" / "python")]
        words = ["apptainer", "exec"] + (["--nv"] if self.gpus else [])
        for path in dict.fromkeys((self.folder, *self.binds, *([self.venv] if self.venv else []))):
            if set(",:") & set(str(path)):
                raise SlurmError(f"{path}: a path with a comma or colon cannot be shown in a container; rename it")
            words += ["--bind", str(path)]
        return [*words, self.container, "python3" if self.venv is None else str(self.venv / "bin" / "python")]


@dataclass(frozen=True)
class TrainingJob:
    """A training as a job. options: of sbatch, long name → value, None for a flag.

    run: the run's folder; with seeds that of all runs. arguments: of maskvr_ds.train, without --resume. tasks_per_node:
    ranks. cpus_per_task: None: Slurm's default. seeds: one task of a job array each, with a run of its own below `run`.
    """

    options: Mapping[str, str | None]
    run: Path
    arguments: Sequence[str]
    surroundings: Surroundings
    tasks_per_node: int
    max_restarts: int
    signal_seconds: int
    cpus_per_task: int | None = None
    seeds: tuple[int, ...] = field(default=())


def words(values: Iterable[object]) -> str:
    """Values as words of a shell command."""
    return " ".join(shlex.quote(str(value)) for value in values)


def directive(name: str, value: str | None) -> str:
    """An option (value None: a flag) as a line of a job script. Raises SlurmError where sbatch would read another
    value, or none."""
    if not re.fullmatch(OPTION, name):
        raise SlurmError(f"--{name}: not the long name of an option of sbatch")
    if value is None:
        return f"#SBATCH --{name}"
    if not value or not value.isprintable() or "\\" in value:
        raise SlurmError(
            f"--{name} {value!r}: a line of a job script holds neither line breaks, other control characters nor "
            "backslashes, and must not be empty; take another value"
        )
    escaped = value.replace('"', '\\"')
    return f"#SBATCH --{name}={value}" if _PLAIN.fullmatch(value) else f'#SBATCH --{name}="{escaped}"'


def log_pattern(folder: Path, name: str) -> str:
    """A file for --output in a folder whose own % are no patterns. name: with patterns."""
    return f"{folder}/".replace("%", "%%") + name


def render(template: str, values: dict[str, str]) -> str:
    """A file of templates/, each <<NAME>> replaced; a line that becomes empty is left out."""
    text = (resources.files("cluster.slurm") / "templates" / template).read_text(encoding="utf-8")
    # In one pass: a value may hold what looks like a place.
    lines = []
    for line in text.splitlines():
        filled = _PLACE.sub(lambda place: values[place[1]], line)
        if filled.strip() or not line.strip():
            lines.append(filled.rstrip(" ") if not filled.strip() else filled)
    return "\n".join(lines) + "\n"


def training_script(job: TrainingJob) -> str:
    """The job script. Raises SlurmError for values that cannot stand in it."""
    options: dict[str, str | None] = {
        **job.options,
        **_size(job),
        "output": log_pattern(job.run / "slurm", "%A_%a.log" if job.seeds else "%j.log"),
        "open-mode": "append",
        "signal": f"B:USR1@{job.signal_seconds}",
    }
    srun = ["--kill-on-bad-exit=1", "--mpi=none", "--label", "--unbuffered"]
    if job.cpus_per_task is not None:
        # srun no longer takes it from the job by itself.
        srun.append(f"--cpus-per-task={job.cpus_per_task}")
    if job.seeds:
        options["array"] = f"0-{len(job.seeds) - 1}"
    return render(
        "job.sbatch",
        {
            "DIRECTIVES": "\n".join([*(directive(*option) for option in options.items()), "#SBATCH --requeue"]),
            "RUN": shlex.quote(str(job.run)),
            "MAX_RESTARTS": str(job.max_restarts),
            "TASKS_PER_NODE": str(job.tasks_per_node),
            "ARGUMENTS": words(job.arguments),
            "JOB": _job(job),
            "SEEDS": _seeds(job),
            "FOLDER": shlex.quote(str(job.surroundings.folder)),
            "ENVIRONMENT": job.surroundings.lines(),
            "PYTHON": words(job.surroundings.command()),
            "SRUN": " ".join(srun),
        },
    )


def _size(job: TrainingJob) -> dict[str, str]:
    """What says how much of a node is needed."""
    if "-" in (job.options["nodes"] or ""):
        # A number of tasks a node, and Slurm gives as few nodes as hold one task, also where there are more.
        return {"mincpus": str(job.tasks_per_node * (job.cpus_per_task or 1))}
    size = {"ntasks-per-node": str(job.tasks_per_node)}
    return size if job.cpus_per_task is None else {**size, "cpus-per-task": str(job.cpus_per_task)}


def _job(job: TrainingJob) -> str:
    """What the script calls its job by, as maskvr_ds.runtime.slurm_env.job_id does."""
    if job.seeds:
        return "\n".join(
            [
                "# One task's SLURM_JOB_ID is the array's own id too, which stands for all tasks.",
                "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID",
            ]
        )
    # Left over from an array whose script has submitted this one.
    return "job=$SLURM_JOB_ID\nunset SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID"


def _seeds(job: TrainingJob) -> str:
    if not job.seeds:
        return ""
    runs = [job.run / f"seed-{seed}" for seed in job.seeds]
    return "\n".join(
        [
            "# A task of the array is a run of its own.",
            f"seeds=({words(job.seeds)})",
            f"runs=({words(runs)})",
            f"outputs=({words(f'output_dir={yaml_text(run)}' for run in runs)})",
            "run=${runs[SLURM_ARRAY_TASK_ID]}",
            'arguments+=(--set "seed=${seeds[SLURM_ARRAY_TASK_ID]}" --set "${outputs[SLURM_ARRAY_TASK_ID]}")',
        ]
    )


def yaml_text(value: object) -> str:
    """A text as YAML reads it back: `--set` takes YAML."""
    import yaml

    return yaml.safe_dump(str(value), default_style='"', allow_unicode=True, width=10**9).rstrip("\n")


def data_script(
    options: Mapping[str, str | None], run: Path, arguments: Sequence[str], surroundings: Surroundings
) -> str:
    """The job script of a corpus' build. arguments: of `data_pipeline build`."""
    options = {
        **options,
        "nodes": "1",
        "ntasks": "1",
        "output": log_pattern(run / "slurm", "data-%j.log"),
        "open-mode": "append",
    }
    return render(
        "data.sbatch",
        {
            "DIRECTIVES": "\n".join([*(directive(*option) for option in options.items()), "#SBATCH --requeue"]),
            "ARGUMENTS": words(arguments),
            "FOLDER": shlex.quote(str(surroundings.folder)),
            "ENVIRONMENT": surroundings.lines(),
            "PYTHON": words(surroundings.command()),
        },
    )
