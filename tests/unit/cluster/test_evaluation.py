"""`python -m cluster slurm --evaluate`: the job of an evaluation after the training."""

import re
import subprocess
from pathlib import Path

import pytest

from cluster.__main__ import main
from cluster.slurm.evaluation import parse_evaluation
from tests.support.corpora import make_corpus
from tests.unit.cluster.test_command import ON_CPUS, directives, on


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data") / "corpus", rows=10, words=10)


def evaluated(corpus: Path, arguments: str, *more: str) -> list[str]:
    return [*on(corpus), "--set", "output_dir=my run", "--nodes", "1", *ON_CPUS, "--evaluate", arguments, *more]


def test_an_evaluation_follows_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue").mkdir()
    words = "'my run' --checkpoints all --tasks sst2 --data glue --jobs 2 --output scores"
    more = ["--evaluate-time", "2:00:00", "--evaluate-cpus", "3", "--max-restarts", "2", "--sbatch", "comment=mine"]
    assert main(evaluated(corpus, words, *more)) == 0
    folder = tmp_path / "my run" / "slurm"
    assert capsys.readouterr().out.splitlines() == [
        f"sbatch '{folder}/job.sbatch'",
        f"sbatch --dependency=afterok:JOB_ID --kill-on-invalid-dep=yes '{folder}/evaluate.sbatch'",
    ]
    text = (folder / "evaluate.sbatch").read_text(encoding="utf-8")
    (options,) = directives(text)
    assert set(options) >= {"time=2:00:00", "cpus-per-task=3", "signal=B:USR1@300", "requeue", "comment=mine"}
    assert f"arguments=({words})" in text


@pytest.mark.parametrize(
    ("ending", "restarts", "status", "said"),
    [
        ("exit 0", 0, 0, "completed"),
        ("exit 1", 0, 1, "the evaluation ended with status 1"),
        ("signal", 1, 0, "requeued 7"),
        ("signal", 2, 1, "as often as --max-restarts allows"),
    ],
)
def test_how_an_evaluation_ends(
    ending: str, restarts: int, status: int, said: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: Path,
) -> None:  # fmt: skip
    """Requeued only before the time limit, and at most --max-restarts times. The stand-in for Python is the command."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "glue").mkdir()
    words = "'my run' --tasks sst2 --data glue --output scores"
    assert main(evaluated(corpus, words, "--max-restarts", "2")) == 0
    text = (tmp_path / "my run" / "slurm" / "evaluate.sbatch").read_text(encoding="utf-8")
    python = tmp_path / "python"
    body = 'kill -USR1 "$PPID"; for ((i = 0; i < 300; i++)); do sleep 0.1; done' if ending == "signal" else ending
    python.write_text(f'#!/bin/bash\nprintf "%s|" "$@" >"{tmp_path}/given"\n{body}\n', encoding="utf-8")
    python.chmod(0o755)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text('#!/bin/bash\necho "requeued $2"\n', encoding="utf-8")
    scontrol.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(re.sub(r"^python=.*$", f"python=('{python}')", text, flags=re.M), encoding="utf-8")
    environment = {
        "PATH": f"{scontrol.parent}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    result = subprocess.run(
        ["bash", str(script)], capture_output=True, text=True, env=environment, timeout=50, check=False
    )
    assert (result.returncode, said in result.stdout) == (status, True), result
    expected = ["-m", "maskvr_ds.cli", "evaluate", "my run", "--tasks", "sst2", "--data", "glue", "--output", "scores"]
    assert (tmp_path / "given").read_text(encoding="utf-8").split("|")[:-1] == expected


def test_held_out_text_is_the_default_task_of_an_evaluation(tmp_path: Path) -> None:
    """It needs no --output: its figures are in the job's log."""
    assert parse_evaluation(f"{tmp_path}/run --data {tmp_path}", tmp_path / "run").output is None


def test_models_of_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that exist and the run, which need not; a name on a hub is fetched before the job is queued."""
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / "cache" / "models--lab--bert" / "snapshots" / "0" / "x"
    for folder in (tmp_path / "earlier", snapshot):
        folder.mkdir(parents=True)
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(snapshot)
    )
    words = "runs/a runs/a/seed-1 earlier lab/bert --tasks sst2 --data earlier --output scores"
    assert parse_evaluation(words, Path("runs/a")).reads == (tmp_path / "earlier", snapshot, tmp_path / "earlier")
    assert [name for name, _ in asked] == ["lab/bert"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("'run", "No closing quotation"),
        ("run", "the following arguments are required: --data"),
        ("run --tasks sst3 --data glue", "invalid choice: 'sst3'"),
        ("'my run' --tasks sst2 --data glue", "--output is required"),
        ("'my run' --tasks sst2 --data absent --output o", "absent: no such file or folder"),
        ("'my run' --tasks sst2 mlm --data glue --output o", "evaluate them by two commands"),
        ("'my run' --tasks sst2 --rows 3 --data glue --output o", "--rows is an option of the task mlm"),
        ("'my run' --shots 1 --jobs 2 --data glue --output o", "--jobs has no meaning with --shots"),
        ("--tasks sst2 --data glue --output o", "name a MODEL"),
        ("'my run' bases/bert/x --tasks sst2 --data glue --output o", "MODEL bases/bert/x: no such folder"),
        ("'my rum' --tasks sst2 --data glue --output o", "MODEL my rum: no such folder"),
        ("runs/typo --tasks sst2 --data glue --output o", "MODEL runs/typo: no such folder"),
    ],
)
def test_refused_evaluations(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], corpus: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "glue").mkdir()
    assert main(evaluated(corpus, words, "--print")) == 1
    assert message in capsys.readouterr().err
