"""The card of a run that `maskvr train` has trained names its data, hardware and command."""

from pathlib import Path

import yaml

from tests.distributed.training import configuration, run_command
from tests.support.corpora import make_corpus


def test_what_a_run_records_for_its_card(tmp_path: Path) -> None:
    folders = [make_corpus(tmp_path / name, rows=rows, seed=rows) for name, rows in (("laws", 60), ("courts", 90))]
    values = configuration(tmp_path / "run", folders[0], steps=2, evaluation={"every_steps": 0})
    values["schedule"] = {"warmup_steps": 0}
    values["data"] = {"mixture": [{"path": str(folders[0]), "weight": 2}, {"path": str(folders[1])}]}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    for steps in (2, 3):
        words = ("train", "--config", config, "--num-gpus", 2, "--set", f"training.steps={steps}", "--resume", "auto")
        trained = run_command(*words)
        assert trained.returncode == 0, trained.stderr
    exported = run_command("export", "--checkpoint", tmp_path / "run", "--output", tmp_path / "model", "--check")
    assert exported.returncode == 0, exported.stderr
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    assert "| laws | 2.0 | 60 | 1,920 | 60 | 32 |" in text
    assert "| courts | 1.0 | 90 | 2,880 | 90 | 32 |" in text
    assert "36 sequences were consumed, 1,152 tokens." in text
    for steps in (2, 3):
        assert f"\nmaskvr train --config {config} --set training.steps={steps} --resume auto\n" in text
    assert text.count("2 ranks on ") == 1
    assert "torch 2." in text
    assert "| steps | 3 |" in text
