"""Job scripts under the real sbatch."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from cluster.slurm.script import SlurmError, directive, log_pattern
from tests.cluster.slurm_cluster import Cluster
from tests.support.corpora import make_corpus
from tests.support.scripts import VARIANTS, build_words, job_scripts


def test_every_variant_is_accepted(slurm: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scripts = job_scripts(tmp_path)
    assert set(scripts) == set(VARIANTS)
    for paths in scripts.values():
        for path in paths:
            said = slurm.run("sbatch", "--test-only", path).stderr
            assert " to start at " in said, said
    refused = slurm.run("sbatch", "--test-only", "--partition=none", scripts["cpu"][0], check=False)
    assert refused.returncode != 0, "the check can fail"


def test_directives_are_quoted(slurm: Cluster, tmp_path: Path) -> None:
    """Names and paths with every special character that is allowed reach the controller unchanged."""
    values = ['it\'s "a" $(id) `id` $HOME', "# no comment %j %% ü,;|&<>*?~!"]
    for number, value in enumerate(values):
        folder = tmp_path / f"{number} {value}"
        folder.mkdir()
        script = tmp_path / "script"
        lines = [directive("job-name", value), directive("output", log_pattern(folder, "%j"))]
        script.write_text("\n".join(["#!/bin/bash", *lines, 'printf "%s" "$SLURM_JOB_NAME"\n']))
        job = slurm.run("sbatch", "--parsable", "--wait", script).stdout.strip()
        assert (folder / job).read_text() == value
    with pytest.raises(SlurmError):
        directive("comment", "a\n#SBATCH --uid=0")


# Replaces Python: logs its arguments and marks the run as completed.
STAND_IN = """#!/bin/bash
printf '%s\\n' "$SLURM_PROCID: $*" >>"$(dirname "$0")/started"
if [[ $* =~ .*output_dir=\\"(.*)\\"\\ --resume ]]; then
    printf '{"owner": "%s"}' "${@: -1}" >"${BASH_REMATCH[1]}/completed.json"
fi
"""
# Runs until SIGTERM, then marks the run as stopped; completes at the second start.
PATIENT = """#!/bin/bash
[[ $* =~ --config\\ (.*)/slurm/config-.*\\ --resume ]] && cd "${BASH_REMATCH[1]}" || exit 1
token=${@: -1}
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || { printf '{"owner": "%s"}' "$token" >completed.json; exit 0; }
printf '{"job": "%s", "token": "%s"}' "$SLURM_JOB_ID" "$token" >owner.json
trap 'sleep 0.5; printf "{\\"owner\\": \\"%s\\"}" "$token" >stopped.json; exit 75' TERM
for ((i = 0; i < 600; i++)); do sleep 0.1; done
"""
# Two tasks of an array: the first stops once both have started; after its requeue both wait for all_may_end.
TOGETHER = """#!/bin/bash
[[ $* =~ .*output_dir=\\"(.*)\\"\\ --resume ]] && cd "${BASH_REMATCH[1]}" || exit 1
echo "${SLURM_RESTART_COUNT:-0}" >>starts
wait_for() { for ((i = 0; i < 900; i++)); do [ ! -e "$1" ] || return 0; sleep 0.1; done; exit 1; }
if [ "$SLURM_JOB_ID ${SLURM_RESTART_COUNT:-0}" = "$SLURM_ARRAY_JOB_ID 0" ]; then
    wait_for ../seed-3/starts
    wait_for ../seed-14/starts
    printf '{"step": 1, "owner": "%s"}' "${@: -1}" >stopped.json
    exit 75
fi
wait_for ../all_may_end
printf '{"owner": "%s"}' "${@: -1}" >completed.json
"""


def settings(folder: Path) -> list[str]:
    """Options of a run on an existing corpus."""
    corpus = make_corpus(folder / "corpus", rows=10, words=10)
    return ["--config", "demo_cpu", "--set", f"data.path={corpus}", "--set", "evaluation.every_steps=0"]


def environment(folder: Path, python: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").write_text(python)
    (folder / "bin" / "python").chmod(0o755)
    return folder


def test_data_first_then_one_run_per_seed(slurm: Cluster, tmp_path: Path) -> None:
    """The corpus job, the array that depends on it, and ranks under srun, with a stand-in for Python."""
    build = build_words(tmp_path, make_corpus(tmp_path / "other", rows=10, words=10))
    venv, run = environment(tmp_path / "a venv", STAND_IN), tmp_path / "runs of 'two' seeds"
    said = slurm.tool(
        *("slurm", *settings(tmp_path), "--set", f'output_dir="{run}"', "--venv", venv),
        *("--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--seeds", "3", "14", "--submit"),
        *("--set", f'data.path="{tmp_path}/built"', "--build-cpus", "1", "--build-data", shlex.join(build)),
    ).stdout
    data, job = (line.split(": job ")[1].split(";")[0] for line in said.splitlines())
    assert slurm.job(data)["Dependency"] == "(null)"
    slurm.wait_until(lambda: set(states(slurm, job)) <= {"COMPLETED", "FAILED"}, "done", 120)
    assert states(slurm, job) == ["COMPLETED"] * 2
    built, *trained = (venv / "bin" / "started").read_text().splitlines()
    assert built == f"0: -m data_pipeline build {' '.join(build)}"
    assert len(trained) == 2
    for seed in (3, 14):
        assert any(f'--set seed={seed} --set output_dir="{run}/seed-{seed}" --resume auto' in line for line in trained)
        assert (run / f"seed-{seed}" / "slurm" / "attempt").is_file()
    assert len(list((run / "slurm").glob(f"{job}_[01].log"))) == 2


def test_a_task_of_an_array_requeues_only_itself(slurm: Cluster, tmp_path: Path) -> None:
    """The task whose own job id is that of the array."""
    venv, run = environment(tmp_path / "venv", TOGETHER), tmp_path / "run"
    said = slurm.tool(
        *("slurm", *settings(tmp_path), "--set", f'output_dir="{run}"', "--venv", venv),
        *("--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--seeds", "3", "14", "--submit"),
    ).stdout
    job = said.split(": job ")[1].split(";")[0]

    def starts() -> list[list[str]]:
        return sorted(path.read_text().split() for path in run.glob("seed-*/starts"))

    slurm.wait_until(lambda: ["0", "1"] in starts(), "started again", 120)
    assert starts() == [["0"], ["0", "1"]]
    seen = json.loads(slurm.tool("status", run, "--json").stdout)
    assert sorted((status["job"], status["state"]) for status in seen) == [(f"{job}_{i}", "running") for i in (0, 1)]
    (run / "all_may_end").touch()
    slurm.wait_until(lambda: set(states(slurm, job)) <= {"COMPLETED", "FAILED"}, "done", 120)
    assert states(slurm, job) == ["COMPLETED"] * 2


def states(slurm: Cluster, array: str) -> list[str]:
    text = slurm.run("scontrol", "--oneliner", "show", "job", array).stdout
    return [field.partition("=")[2] for field in text.split() if field.startswith("JobState=")]


def test_a_preemption_with_grace(slurm: Cluster, tmp_path: Path) -> None:
    """Slurm signals only the ranks, and treats an exit within the grace time as the end: the job requeues itself."""
    venv, run = environment(tmp_path / "venv", PATIENT), tmp_path / "run"
    said = slurm.tool(
        *("slurm", *settings(tmp_path), "--set", f'output_dir="{run}"', "--venv", venv),
        *("--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "1", "--partition", "patient", "--submit"),
    ).stdout
    job = said.split(": job ")[1].split(";")[0]
    slurm.wait_until((run / "owner.json").is_file, "started", 120)
    urgent = slurm.sbatch("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    slurm.wait_until(lambda: slurm.state(job) == "COMPLETED", "completed", 120)
    assert (slurm.state(urgent), slurm.job(job)["Restarts"]) == ("COMPLETED", "1")
    assert (run / "completed.json").is_file()


# Replaces Python: records the variables that a rank needs, and marks the run as completed.
RECORDER = """#!/bin/bash
[[ $* =~ --config\\ (.*)/slurm/config-.*\\ --resume ]] && cd "${BASH_REMATCH[1]}" || exit 1
printf '%s\\n' "${DS_ACCELERATOR:-none}" "${MASTER_ADDR:-none}" "${VIRTUAL_ENV:-none}" >variables
printf '{"owner": "%s"}' "${@: -1}" >completed.json
"""


def test_ranks_get_the_environment_of_the_script(slurm: Cluster, tmp_path: Path) -> None:
    """Without the one of the login node: srun would withhold the script's own variables too (SLURM_EXPORT_ENV)."""
    venv, run = environment(tmp_path / "venv", RECORDER), tmp_path / "run"
    said = slurm.tool(
        *("slurm", *settings(tmp_path), "--set", f'output_dir="{run}"', "--venv", venv, "--sbatch", "export=NONE"),
        *("--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--submit"),
    ).stdout
    job = said.split(": job ")[1].split(";")[0]
    slurm.wait_until(lambda: set(states(slurm, job)) <= {"COMPLETED", "FAILED"}, "done", 60)
    accelerator, master, virtual = (run / "variables").read_text().splitlines()
    assert (accelerator, virtual) == ("cpu", str(venv))
    assert master != "none"


def test_variables_of_sbatch_do_not_override_the_script(slurm: Cluster, tmp_path: Path) -> None:
    """sbatch prefers them to directives: another partition, several tasks on one run, a log without its beginning."""
    venv, run = environment(tmp_path / "venv", RECORDER), tmp_path / "run"
    wrong = ["SBATCH_PARTITION=high", "SBATCH_ARRAY_INX=0-1", "SBATCH_OPEN_MODE=truncate", "SBATCH_ACCOUNT=mine"]
    said = slurm.run(
        *("env", *wrong, "SBATCH_TIMELIMIT=1", "SBATCH_NO_REQUEUE=1", sys.executable, "-m", "cluster"),
        *("slurm", *settings(tmp_path), "--set", f'output_dir="{run}"', "--venv", venv, "--partition", "low"),
        *("--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1", "--time", "1:00:00", "--submit"),
    ).stdout
    job = slurm.job(said.split(": job ")[1].split(";")[0])
    assert "ArrayTaskId" not in job
    assert (job["Partition"], job["TimeLimit"], job["Requeue"]) == ("low", "01:00:00", "1")
    assert job["Account"] == "mine"
