"""Jobs of one submission: what would be rejected halfway is refused before, and what is queued is named."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from cluster.__main__ import main
from tests.support.corpora import make_corpus
from tests.support.scripts import build_words

# Queues jobs 31, 32, …; rejects the script that REJECT names.
SBATCH = """#!/bin/bash
for file; do :; done
case $file in *"$REJECT") echo 'sbatch: error: invalid partition' >&2; exit 1;; esac
echo "$file" >>"$QUEUED"
mapfile -t jobs <"$QUEUED"
echo $((30 + ${#jobs[@]}))
"""


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A training and the build of its corpus."""
    monkeypatch.chdir(tmp_path)
    build = shlex.join(build_words(tmp_path, make_corpus(tmp_path / "corpus", rows=10, words=10)))
    sets = ["evaluation.every_steps=0", "data.path=built", "output_dir=run"]
    options = [word for value in sets for word in ("--set", value)]
    where = ["--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "1"]
    return ["slurm", "--config", "demo_cpu", *options, *where, "--build-data", build]


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which sbatch lists what it has queued."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(SBATCH)
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("QUEUED", str(tmp_path / "queued"))
    monkeypatch.setenv("REJECT", "none")
    return tmp_path / "queued"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dependency", "afterok:1?afterok:2"], "--dependency afterok:1?afterok:2: '?' (any of them) cannot be"),
        (["--build-time", "soon"], "--build-time soon: expected minutes"),
        (["--build-time", "1"], "--build-time 1: expected more than 60 s"),
    ],
)
def test_what_sbatch_would_reject_halfway(
    words: list[str], sbatch: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, *options, "--submit"]) == 1
    assert message in capsys.readouterr().err
    assert not sbatch.exists()


def test_jobs_that_are_queued_already_are_named(
    words: list[str], sbatch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REJECT", "job.sbatch")
    assert main([*words, "--submit"]) == 1
    error = capsys.readouterr().err
    assert "invalid partition" in error
    assert "queued before: 31 (data.sbatch); before submitting again: scancel 31" in error
    assert not Path("run/slurm/submitted").exists()


def test_the_job_of_the_training_is_recorded(words: list[str], sbatch: Path) -> None:
    assert main([*words, "--submit"]) == 0
    assert Path("run/slurm/submitted").read_text(encoding="utf-8") == "32\n"


def test_a_build_is_requeued_before_its_time_limit(words: list[str], tmp_path: Path) -> None:
    """Otherwise the training, which depends on it, would be cancelled. The stand-in for Python is the command."""
    assert main(words) == 0
    text = Path("run/slurm/data.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --signal=B:USR1@60\n#SBATCH --requeue\n" in text
    (tmp_path / "bin").mkdir()
    python, scontrol = tmp_path / "python", tmp_path / "bin" / "scontrol"
    wait = 'kill -USR1 "$PPID"; for ((i = 0; i < 300; i++)); do sleep 0.1; done'
    python.write_text(f'#!/bin/bash\nprintf "%s " "$@" >"{tmp_path}/given"\n{wait}\n', encoding="utf-8")
    scontrol.write_text('#!/bin/bash\necho "requeued $2"\n', encoding="utf-8")
    for program in (python, scontrol):
        program.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(re.sub(r"^python=.*$", f"python=('{python}')", text, flags=re.M), encoding="utf-8")
    environment = {"PATH": f"{scontrol.parent}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    ended = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, timeout=50, check=False)
    assert (ended.returncode, "requeued 7" in ended.stdout) == (0, True), ended
    assert (tmp_path / "given").read_text(encoding="utf-8").startswith("-m data_pipeline build --input ")
