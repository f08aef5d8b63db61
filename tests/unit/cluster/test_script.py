"""Job scripts: values are passed unchanged or rejected; the end of a start is decided by files in the run's folder."""

import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cluster.slurm.options import parse_options
from cluster.slurm.script import (
    ContinuedJob,
    JobEnvironment,
    SlurmError,
    TrainingJob,
    continued_script,
    directive,
    log_pattern,
    render,
    training_script,
)
from maskvr_ds.run_folder.launched import launch_token
from tests.support.scripts import job_scripts

HOSTILE = [
    "a b",
    "it's",
    'say "hi"',
    "$(touch injected)",
    "`touch injected`",
    "a\nb",
    "\n#SBATCH --uid=0\n",
    "a; touch injected #",
    "-rf",
    "*",
    "~",
    "!!",
    "\\",
    "%j",
    "<<RUN>>",
    "ü",
]
# Any file name or argument.
texts = st.one_of(
    st.sampled_from(HOSTILE), st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20)
)
# Logs its arguments, each terminated by a NUL byte.
STUB = """#!/bin/bash
printf '%s\\0' "$@" >>"$STUB_LOG"
"""


def stubs(folder: Path) -> dict[str, str]:
    """Create stubs of Slurm's commands; returns the environment of a job's first start."""
    for name in ("srun", "squeue", "scontrol"):
        path = folder / name
        path.write_text(STUB if name == "srun" else "#!/bin/bash\necho n1\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STUB_LOG": str(folder / "log"),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_ARRAY_JOB_ID": "6",
        "SLURM_ARRAY_TASK_ID": "1",
    }


def run_script(text: str, folder: Path) -> list[str]:
    """Arguments of srun when the script is run."""
    folder.joinpath("log").unlink(missing_ok=True)
    # From a file, as Slurm does.
    (folder / "script").write_text(text)
    subprocess.run(["bash", "script"], cwd=folder, env=stubs(folder), capture_output=True, check=False, timeout=60)
    return (folder / "log").read_bytes().decode().split("\0")[:-1]


@settings(max_examples=25)
@given(arguments=st.lists(texts, max_size=3), name=texts, venv=texts, seeds=st.booleans())
@example(arguments=HOSTILE, name="plain", venv="plain", seeds=True)
@example(arguments=[], name="a\nb", venv="$(touch injected)", seeds=False)
def test_values_are_passed_unchanged(
    tmp_path_factory: pytest.TempPathFactory, arguments: list[str], name: str, venv: str, seeds: bool
) -> None:
    folder = tmp_path_factory.mktemp("script")
    # Single folders: a slash would only create more of them.
    run, environment = folder / ("run" + name.replace("/", "_")), folder / ("venv" + venv.replace("/", "_"))
    job = TrainingJob(
        options={"nodes": "1"},
        run=run,
        arguments=arguments,
        environment=JobEnvironment(folder=folder, python="python", venv=environment),
        tasks_per_node=1,
        max_restarts=3,
        signal_seconds=60,
        seeds=(3, 4) if seeds else (),
    )
    if not str(run).isprintable() or "\\" in str(run):
        with pytest.raises(SlurmError, match="--output"):
            training_script(job)
        return
    started = run_script(training_script(job), folder)
    at = started.index("maskvr_ds.train")
    # Otherwise `--sbatch export=NONE` would leave the ranks without PATH and MASTER_ADDR.
    assert "--export=ALL" in started[:at]
    given = started[at + 1 : at + 1 + len(arguments)]
    rest = started[at + 1 + len(arguments) :]
    assert (started[at - 2 : at], given) == ([f"{environment}/bin/python", "-m"], arguments)
    if seeds:
        assert rest[:3:2] == ["--set", "--set"]
        assert rest[1] == "seed=4"
        assert yaml.safe_load(rest[3].removeprefix("output_dir=")) == str(run / "seed-4")
        rest = rest[4:]
    assert rest[:3] == ["--resume", "auto", "--launch"]
    assert [launch_token(text) for text in rest[3:]] == rest[3:]
    assert len(rest) == 4
    # Variables of an array task that submitted this job are ignored.
    attempt = (run / "seed-4" if seeds else run) / "slurm" / "attempt"
    assert attempt.read_text() == ("6_1 0\n" if seeds else "7 0\n")
    assert not list(folder.rglob("injected"))


@given(value=texts)
def test_directive_is_one_line_or_rejected(value: str) -> None:
    try:
        line = directive("job-name", value)
    except SlurmError:
        assert not value.isprintable() or "\\" in value
        return
    assert len(line.splitlines()) == 1
    assert line.startswith("#SBATCH --job-name=")


def test_values_that_sbatch_would_change_are_rejected() -> None:
    for value in ("", "a\nb", "a\\b", "a\x1bb"):
        with pytest.raises(SlurmError, match="directive in a job script"):
            directive("job-name", value)
    for name in ("", "x y", "-x", "a=b", "9a"):
        for flag_or_not in ("1", None):
            with pytest.raises(SlurmError, match="long name"):
                directive(name, flag_or_not)
    assert directive("exclusive", None) == "#SBATCH --exclusive"
    assert directive("comment", 'a "b" #c') == '#SBATCH --comment="a \\"b\\" #c"'
    assert log_pattern(Path("/a%j"), "%j.log") == "/a%%j/%j.log"


def test_reserved_options_are_rejected() -> None:
    """All options that the script sets, also under the abbreviations that sbatch accepts."""
    common = {"run": Path("/r"), "arguments": [], "environment": JobEnvironment(Path("/r"), "python")}
    own = set()
    for nodes, seeds in (("1", ()), ("1-2", (3, 4))):
        job = TrainingJob({"nodes": nodes}, **common, tasks_per_node=1, max_restarts=1, signal_seconds=9, seeds=seeds)  # type: ignore[arg-type]
        for cpus in (None, 2):
            script = training_script(replace(job, cpus_per_task=cpus))
            own |= set(re.findall(r"^#SBATCH --([a-z-]+)", script, re.MULTILINE))
    assert own >= {"output", "signal", "open-mode", "mincpus", "ntasks-per-node", "cpus-per-task", "requeue", "array"}
    for name in (*own, "error", "no-requeue", "tasks-per-node", "ntasks", "chdir", "time"):
        for text in (f"{name}=1", name, name[:-1]):
            with pytest.raises(
                SlurmError, match=f"^--sbatch {text}: .* cannot be set here: .*(use|remove this option|follows from)"
            ):
                parse_options([text], ["time"])


def test_options_of_sbatch_and_flags() -> None:
    given = ["gres=gpu:8", "exclusive", "comment=a=b", "gpus=8", "exclude=n1", "nice"]
    assert list(parse_options(given, ["time"]).items()) == [
        *{"gres": "gpu:8", "exclusive": None, "comment": "a=b", "gpus": "8", "exclude": "n1", "nice": None}.items()
    ]
    for text in ("", "=1", "-N=1", "--exclusive", "N=4", "J", "n=4", "two words", "a\n#SBATCH --uid=0"):
        with pytest.raises(SlurmError, match="expected NAME=VALUE"):
            parse_options([text], [])
    with pytest.raises(SlurmError, match=r"--sbatch test-only: .*nothing would be queued"):
        parse_options(["test-only"], [])
    with pytest.raises(SlurmError, match="gres is given twice"):
        parse_options(["gres=gpu:8", "gres=gpu:4"], [])


def test_placeholders_in_values_are_kept(tmp_path: Path) -> None:
    environment = JobEnvironment(tmp_path, "python")
    common = {"options": {"time": "10"}, "run": tmp_path, "environment": environment, "max_restarts": 1}
    job = ContinuedJob("A job", "job", ("m",), "%j.log", arguments=["<<FOLDER>>"], signal_seconds=9, **common)  # type: ignore[arg-type]
    assert "arguments=('<<FOLDER>>')" in continued_script(job)
    with pytest.raises(KeyError):
        render("continued.sbatch", {})


def test_scripts_pass_bash_and_shellcheck(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("shellcheck is not installed")
        pytest.skip("shellcheck is not installed")
    scripts = [path for folder in job_scripts(tmp_path).values() for path in folder]
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
    # SC2016: `$(…)` in a path must not be expanded.
    found = subprocess.run(["shellcheck", "--exclude=SC2016", *scripts], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def behave(
    tmp_path: Path,
    ranks: str,
    restarts: int = 0,
    seeds: tuple[int, ...] = (),
    resume: Path | None = None,
    **changes: str,
) -> tuple[int, str, str]:
    """Run a job script whose srun runs `ranks` in the run's folder; returns exit status, output, requeued job id."""
    commands, run = tmp_path / "bin", tmp_path / "run"
    commands.mkdir(exist_ok=True)
    environment = stubs(commands) | {"SLURM_RESTART_COUNT": str(restarts)} | changes
    where = run / f"seed-{seeds[1]}" if seeds else run
    (commands / "srun").write_text(f"#!/bin/bash\ncd '{where}' || exit 1\n{ranks}\n")
    (commands / "squeue").write_text(f"#!/bin/bash\necho \"$*\" >>'{tmp_path}/asked'\nprintf '%s' \"${{QUEUE:-}}\"\n")
    answers = f"""case "$1 $2" in
    requeue*) echo "$2" >>'{tmp_path}/requeued'; grep SigIgn /proc/$PPID/status >'{tmp_path}/ignored' ;;
    update*) echo "${{*:2}}" >>'{tmp_path}/updated'; exit "${{REFUSE:-0}}" ;;
    "show job") echo "   ReqNodeList=(null) ExcNodeList=${{EXCLUDED:-(null)}} " ;; *) echo n1 ;; esac"""
    (commands / "scontrol").write_text(f"#!/bin/bash\n{answers}\n")
    (tmp_path / "requeued").unlink(missing_ok=True)
    job = TrainingJob(
        options={"nodes": "1"},
        run=run,
        arguments=[],
        environment=JobEnvironment(folder=tmp_path, python=sys.executable),
        tasks_per_node=1,
        max_restarts=2,
        signal_seconds=60,
        seeds=seeds,
        resume=resume,
    )
    script = tmp_path / "job"
    script.write_text(training_script(job))
    # A separate process group, which a stub can signal as Slurm signals a job.
    result = subprocess.run(
        ["bash", script], env=environment, capture_output=True, text=True, check=False, timeout=60, process_group=0
    )
    requeued = tmp_path / "requeued"
    return result.returncode, result.stdout, requeued.read_text().strip() if requeued.is_file() else ""


# The last argument of the ranks is the token of this start.
OURS = """token=${@: -1}; echo '{"job": "7", "token": "'$token'"}' >owner.json; mkdir -p checkpoints;"""
STATUS = """echo '{"step": 1, "owner": "'$token'"}'"""
STOP = OURS + f" echo step-1 >checkpoints/latest; {STATUS} >stopped.json; exit 75"
# Like Slurm with --signal=B:USR1, then like the training.
ASKED = "trap '' USR1; kill -USR1 $PPID; sleep 0.2; " + STOP


@pytest.mark.parametrize(
    ("ranks", "restarts", "status", "requeued", "message"),
    [
        (OURS + f"{STATUS} >completed.json; exit 1", 0, 0, "", "completed"),
        (OURS + """echo '{"step": 1, "owner": "another"}' >completed.json; exit 1""", 0, 0, "7", "the ranks failed"),
        (OURS + """echo '{"step": 1, "owner": "another"}' >stopped.json; exit 1""", 0, 0, "7", "the ranks failed"),
        (OURS + "exit 0", 0, 0, "7", "the ranks failed"),
        (ASKED, 0, 0, "7", "requeuing, checkpoint: step-1"),
        (ASKED, 2, 1, "", "as often as --max-restarts allows"),
        (ASKED, 3, 1, "", "more than --max-restarts 2"),
        (STOP, 0, 0, "7", "requeuing, checkpoint: step-1"),
        (STOP.replace('"}', '", "requested": true}'), 0, 75, "", "stopped on request"),
        ("kill -TERM $PPID; sleep 0.2; " + STOP, 0, 1, "", "only Slurm may start it again"),
        ("exit 1", 0, 1, "", "ended before they took ownership of the run"),
        ('echo \'{"job": "8", "token": "its"}\' >owner.json; exit 1', 0, 1, "", "or another job owns it"),
        # As an earlier start of the same job has left it.
        ('echo \'{"job": "7", "token": "its"}\' >owner.json; exit 1', 0, 1, "", "took ownership of the run"),
        # Cancelled by the srun of an earlier start.
        ("exit 143", 0, 0, "7", "terminated before they took ownership of the run"),
        (OURS + "echo 7 1 >slurm/attempt; exit 1", 0, 1, "", "started this job again elsewhere"),
    ],
)
def test_end_of_a_start(tmp_path: Path, ranks: str, restarts: int, status: int, requeued: str, message: str) -> None:
    """Decided by files in the run's folder, not by exit codes."""
    returned, output, again = behave(tmp_path, ranks, restarts)
    assert (returned, again) == (status, requeued), output
    assert message in output


def test_a_start_that_is_refused_touches_no_status_file(tmp_path: Path) -> None:
    """Another job, which Slurm does not know, has the run: it is asked to stop, and completes meanwhile."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop_requested").touch()
    ranks = """echo '{"step": 5, "owner": "its"}' >completed.json; exit 1"""
    status, output, requeued = behave(tmp_path, ranks)
    assert (status, requeued) == (1, ""), output
    assert "before they took ownership" in output
    assert sorted(path.name for path in run.iterdir()) == ["completed.json", "slurm", "stop_requested"]


def test_two_failures_at_a_checkpoint_end_the_job(tmp_path: Path) -> None:
    fail = OURS + "echo step-%d >checkpoints/latest; exit 1"
    for restarts, step, again in ((0, 1, True), (1, 2, True), (2, 2, False)):
        status, output, requeued = behave(tmp_path, fail % step, restarts)
        assert (bool(requeued), status == 0) == (again, again), output
    assert "failed twice at checkpoint: step-2" in output
    # Submitted again: another job.
    assert behave(tmp_path, (fail % 2).replace('"7"', '"9"'), SLURM_JOB_ID="9")[2] == "9"


def test_a_run_has_one_job(tmp_path: Path) -> None:
    assert behave(tmp_path, ASKED)[2] == "7"
    status, output, requeued = behave(tmp_path, "touch started", SLURM_JOB_ID="8", QUEUE="7")
    assert (status, requeued) == (1, "")
    assert "job 7 is running the same run; end it first (scancel 7)" in output
    assert not (tmp_path / "run" / "started").exists()
    assert (tmp_path / "run" / "slurm" / "attempt").read_text() == "7 0\n"


@pytest.mark.parametrize(
    ("before", "resumed"),
    [
        ("", "it's there"),
        # The first start was killed before it had a checkpoint; it has one; it has deleted where it came from.
        ("echo '{}' >origin.json", "auto"),
        ("mkdir checkpoints; echo step-1 >checkpoints/latest", "auto"),
        ("echo '{}' >origin.json; mkdir checkpoints; echo step-1 >checkpoints/latest", "auto"),
    ],
)
def test_only_the_first_start_resumes_from_the_checkpoint_of_another_run(
    tmp_path: Path, before: str, resumed: str
) -> None:
    (tmp_path / "run").mkdir()
    subprocess.run(["bash", "-c", before], cwd=tmp_path / "run", check=True)
    _, output, _ = behave(tmp_path, 'printf "%s\\n" "$@" >started', resume=tmp_path / "it's there")
    words = (tmp_path / "run" / "started").read_text().splitlines()
    expected = "auto" if resumed == "auto" else str(tmp_path / resumed)
    assert words[words.index("--resume") + 1] == expected
    assert f"from checkpoint: {'none' if 'origin' in before and 'latest' not in before else ''}" in output
    assert (f"from checkpoint: {expected}" in output) == (expected != "auto")


def test_array_task_uses_its_own_id(tmp_path: Path) -> None:
    """The id of the array, which is SLURM_JOB_ID of one task, would requeue all tasks."""
    task = {"SLURM_JOB_ID": "6", "SLURM_ARRAY_JOB_ID": "6"}
    owned = OURS.replace('"7"', '"6_1"')
    status, output, requeued = behave(tmp_path, owned + "exit 1", seeds=(3, 4), **task)
    assert (status, requeued) == (0, "6_1"), output
    assert "failed" in output
    assert "--jobs=6_1 " in (tmp_path / "asked").read_text()
    assert "--jobs=6 " not in (tmp_path / "asked").read_text()
    # Preempted: waits while Slurm reports this task as running, regardless of the others.
    terminated = "kill -TERM $PPID; sleep 0.2; " + STOP.replace('"7"', '"6_1"')
    (tmp_path / "asked").unlink()
    assert behave(tmp_path, terminated, seeds=(3, 4), **task)[::2] == (1, "")
    assert (tmp_path / "asked").read_text() == "--noheader --jobs=6_1 --format=%T\n"
    # Task of another array on the same run.
    status, output, _ = behave(tmp_path, owned, seeds=(3, 4), QUEUE="6_1", SLURM_ARRAY_JOB_ID="8")
    assert status == 1
    assert "job 6_1 is running the same run; end it first (scancel 6_1)" in output


def test_cancelled_job_is_not_requeued(tmp_path: Path) -> None:
    """Even if the script received no signal."""
    status, output, requeued = behave(tmp_path, STOP, QUEUE="COMPLETING")
    assert (status, requeued) == (1, ""), output


@pytest.mark.parametrize("ranks", [OURS, ASKED, STOP])
def test_signal_to_all_processes_while_files_are_read(tmp_path: Path, ranks: str) -> None:
    """After losing a node, Slurm's SIGTERM comes late and kills commands that the script runs after the ranks ended."""
    commands = tmp_path / "bin"
    commands.mkdir()
    kill = f"printf '#!/bin/bash\\nkill -TERM 0\\n' >'{commands}/squeue'"
    for name in ("cat", "grep", "date"):
        kill += f"; cp '{commands}/squeue' '{commands}/{name}'; chmod +x '{commands}/{name}'"
    status, output, requeued = behave(tmp_path, f"{kill}\n{ranks}")
    assert (status, requeued) == (1, ""), output
    assert "error" not in output
    assert "only Slurm may start it again" in output


def test_status_files_of_an_earlier_start_are_ignored(tmp_path: Path) -> None:
    assert behave(tmp_path, OURS + f"{STATUS} >completed.json")[0] == 0
    assert behave(tmp_path, OURS + "exit 1")[2] == "7"
