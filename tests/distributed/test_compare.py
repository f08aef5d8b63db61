"""`maskvr compare` trains, continues an earlier comparison, and does not repeat finished runs."""

import json
from pathlib import Path

import yaml

from tests.distributed.training import SMALL, column, metrics, run_command
from tests.support.corpora import make_corpus

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

    # A run of another length is not reused.
    other = run_command(*words, "--set", "training.steps=20")
    assert other.returncode == 1
    assert "has a run with different settings (training.steps 12 -> 20); use another --output" in other.stderr
