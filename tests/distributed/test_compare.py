"""`maskvr compare` trains, continues an earlier comparison, and does not repeat finished runs."""

import json
from pathlib import Path

import yaml

from tests.distributed.training import SMALL, column, metrics, run_command
from tests.support.corpora import make_corpus
from tests.support.tasks import write_sst2

AGAIN = "uniform:checkpoint.keep_last=2"
DIVERGES = "uniform:optimizer.lr=1.0e+6"


def test_runs_differ_only_in_strategy_and_are_not_repeated(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", length=16)
    make_corpus(tmp_path / "corpus" / "held_out", rows=30, length=16, seed=1)
    config, output = tmp_path / "run.yaml", tmp_path / "out"
    values = {**SMALL, "data": {"path": str(corpus)}, "output_dir": "unused", "training": {"steps": 12}}
    config.write_text(yaml.safe_dump(values | {"evaluation": {"every_steps": 4, "rows": 30}}))
    words = ["compare", "--config", config, "--output", output, "--seeds", 3, "--strategies", "uniform"]

    first = run_command(*words, timeout=900)
    assert first.returncode == 0, first.stderr
    uniform = output / "runs" / "uniform" / "seed-3"
    written = (uniform / "metrics.jsonl").read_text()

    second = run_command(*words, "span", AGAIN, DIVERGES, timeout=900)
    assert second.returncode == 1
    assert f"{DIVERGES}, seed 3: failed; see {output}" in second.stderr
    assert "1 of 4 runs failed" in second.stderr
    assert "[1/4] uniform, seed 3: already completed" in second.stdout
    assert (uniform / "metrics.jsonl").read_text() == written
    span, again = (output / "runs" / name / "seed-3" for name in ("span", AGAIN.replace(":", "_")))
    # The same run under another name: equal losses, rows and masks. Another strategy: equal rows.
    assert column(again, "loss", "mask_digest", "data_digest") == column(uniform, "loss", "mask_digest", "data_digest")
    assert column(span, "data_digest") == column(uniform, "data_digest")
    assert column(span, "mask_digest") != column(uniform, "mask_digest")

    result = json.loads((output / "compare.json").read_text())
    found = {name: each["seeds"] for name, each in result["strategies"].items()}
    assert found == {"uniform": 1, "span": 1, AGAIN: 1, DIVERGES: 0}
    run = result["strategies"]["span"]["runs"][0]
    losses = [line["held_out_loss"] for line in metrics(span) if "held_out_loss" in line]
    assert [point[2] for point in run["curve"]] == losses
    assert run["target"] == result["strategies"]["uniform"]["runs"][0]["final"]
    assert result["strategies"][AGAIN]["difference"]["mean"] == 0
    assert (output / "compare.png").stat().st_size > 10_000

    # Fine-tuned scores of the same runs: none is trained again; equal weights have equal scores.
    glue = write_sst2(tmp_path / "glue")
    words += ["span", AGAIN, "--downstream", "sst2", "--downstream-data", glue, "--downstream-max-length", 16]
    words += ["--downstream-seeds", 2, "--downstream-learning-rates", "1e-3", "--downstream-epochs", 1]
    for _ in range(2):
        third = run_command(*words, timeout=900)
        assert third.returncode == 0, third.stderr
        assert third.stdout.count("already completed") == 3
        files = {path: path.stat().st_mtime_ns for path in (output / "downstream" / "runs").rglob("*.json")}
    assert len(files) == 1 + 2 * 2
    assert all(time < (output / "compare.json").stat().st_mtime_ns for time in files.values())
    assert third.stdout.count("(stored)") == 1 + 2 * 3
    found = json.loads((output / "compare.json").read_text())["downstream"]["sst2 accuracy"]["strategies"]
    assert found[AGAIN]["difference"] == {"mean": 0, "min": 0, "max": 0}
    assert found["span"]["runs"][0]["seed"] == 3
    assert "sst2 accuracy" in third.stdout
    words = words[: words.index("span")]

    # A run of another length is not reused.
    other = run_command(*words, "--set", "training.steps=20")
    assert other.returncode == 1
    assert "has a run with different settings (training.steps 12 -> 20); use another --output" in other.stderr
