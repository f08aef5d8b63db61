"""An export is complete: length limit of the tokenizer, permissions, model card, and the trial with fill-mask."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from maskvr_ds.checkpoint import export as module
from maskvr_ds.checkpoint.export import export
from maskvr_ds.checkpoint.export_check import CheckError
from maskvr_ds.cli import main
from maskvr_ds.run_folder import checkpoints
from maskvr_ds.run_folder.launches import command
from maskvr_ds.run_folder.layout import LAUNCHES, METRICS

OLD = Path(__file__).parents[2] / "data" / "acf4fb5" / "run_zero0"
POSITIONS = 16  # of its model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def exported(run: Path, **options: Any) -> Path:
    export(run, run.parent / "model", **options)
    return run.parent / "model"


@pytest.mark.parametrize(
    ("own", "expected"),
    [(None, POSITIONS), (512, POSITIONS), (int(1e30), POSITIONS), (1e30, POSITIONS), (POSITIONS, POSITIONS), (9, 9)],
)
def test_long_texts_are_truncated_to_what_the_model_reads(run: Path, own: float | None, expected: int) -> None:
    (folder,) = checkpoints.complete_checkpoints(run)
    path = folder / "bert" / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "model_max_length"}
    path.write_text(json.dumps(settings | ({} if own is None else {"model_max_length": own})), encoding="utf-8")
    state = checkpoints.read_state(folder)
    (folder / "checkpoint.json").unlink()
    checkpoints.write_manifest(folder, vars(state))

    model = exported(run)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.model_max_length == expected
    batch = tokenizer(["the file " * 100, "a"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, expected)
    with torch.no_grad():
        logits = AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)(**batch).logits
    assert logits.shape == (2, 3)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_the_umask(run: Path, mask: int) -> None:
    with umask(mask):
        model = exported(run)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in model.iterdir()}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~mask))
    assert "model.safetensors" in modes
    assert model.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_card_of_an_old_run(run: Path) -> None:
    """Read by huggingface_hub; what that version did not record is said, not invented."""
    card = ModelCard((exported(run, license="apache-2.0") / "README.md").read_text(encoding="utf-8"))
    data = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "fill-mask")
    assert set(data.tags) >= {"bert", "fill-mask"}
    losses = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    last = [line["held_out_loss"] for line in losses if "held_out_loss" in line and line["step"] <= 6][-1]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("loss", round(last, 6))
    assert f"| loss, nats per masked token | {last:.4f} |" in card.text
    for said in ("Corpora: not recorded. 144 sequences were consumed, 2,304 tokens", "Command: not recorded", "lamb"):
        assert said in card.text
    # What that version did not record was the only one there was.
    assert "attention over rows (`data.attention: rows`) of 16 tokens: a token attended to its complete" in card.text


def test_figures_after_the_checkpoint_are_not_its_own(run: Path) -> None:
    with (run / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 7, "held_out_loss": 0.5, "step_seconds": 1e6}) + "\n")
    text = (exported(run) / "README.md").read_text(encoding="utf-8")
    assert "0.5000" not in text
    assert "at step 6" in text
    assert "| hours in steps | 0.00 |" in text


def test_all_held_out_figures_are_in_the_card(run: Path) -> None:
    lines = [json.loads(line) for line in (run / METRICS).read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["step"] < 6]
    lines.append({"step": 6, "held_out_loss": 2.0, "held_out_masked_accuracy": 0.25, "held_out_note": "x"})
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    card = ModelCard((exported(run) / "README.md").read_text(encoding="utf-8"))
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {"loss": 2.0, "masked_accuracy": 0.25}
    assert "| perplexity | 7.39 |" in card.text
    assert "| masked accuracy | 0.2500 |" in card.text


def test_a_checkpoint_alone_and_a_run_without_metrics(run: Path) -> None:
    (folder,) = checkpoints.complete_checkpoints(run)
    alone = shutil.copytree(folder, run.parent / "step-00000006")
    (run / METRICS).unlink()
    for source, name in ((alone, "a"), (run, "b")):
        export(source, run.parent / name)
        text = (run.parent / name / "README.md").read_text(encoding="utf-8")
        assert "Held-out loss: not recorded" in text
        assert "Not stated" in text
        assert "license" not in text.partition("\n---\n")[0]


def test_damaged_launches_are_skipped(run: Path) -> None:
    (run / LAUNCHES).write_bytes(b'\xff\n[]\n{"time": 1}\n{"ranks": 2')
    assert "Corpora: not recorded" in (exported(run) / "README.md").read_text(encoding="utf-8")


def test_check_runs_fill_mask(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", "--checkpoint", str(run), "--output", str(run.parent / "model"), "--license", "mit", "--check"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "fill-mask: " in out
    assert "[MASK]" in out


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda settings: settings.update(mask_token=None, tokenizer_class="PreTrainedTokenizerFast"), "no mask token"),
        (lambda settings: settings.update(model_max_length=POSITIONS + 1), "fill-mask fails"),
    ],
)
def test_a_check_that_fails_writes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, message: str
) -> None:
    limit = module._limit_length

    def damage(folder: Path, positions: int) -> None:
        limit(folder, positions)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_bytes())
        fault(settings)
        (folder / "special_tokens_map.json").unlink()
        path.write_text(json.dumps(settings), encoding="utf-8")

    monkeypatch.setattr(module, "_limit_length", damage)
    with pytest.raises(CheckError, match=message):
        exported(run, check=True)
    assert [path.name for path in run.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("license", ["Apache 2.0", "", "-x", "a\nb: c", "mit\n"])
def test_what_is_no_licence_identifier(license: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--checkpoint", "x", "--output", "y", f"--license={license}"]) == 1
    assert "an identifier such as apache-2.0" in capsys.readouterr().err


def test_command_of_a_rank() -> None:
    expected = "maskvr train --config 'my run.yaml' --set a=1"
    options = ["--config", "my run.yaml", "--set", "a=1"]
    assert command(["/x/maskvr_ds/train.py", "--local_rank=0", *options]) == expected
    assert command(["/usr/bin/maskvr", "train", *options]) == expected
    assert command(["/x/maskvr_ds/cli/__main__.py", "train", *options]) == expected
    assert command(["/x/pytest", *options]) is None
