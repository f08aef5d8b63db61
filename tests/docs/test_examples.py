"""The documented path from text to an exported model runs, with little text and a tiny model."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs import pages
from tests.docs.pages import DOCS, README, ROOT
from tests.docs.test_commands import shell_lines
from tests.support.tasks import save_model, write_sst2

# A tiny model, three steps, no GPU; everything else is the recipe's.
TINY = {
    "deepspeed": "zero1_fp32",
    "model.preset": "bert-tiny",
    "model.max_position_embeddings": 128,
    "batch.global_size": 4,
    "batch.micro_size": 2,
    "schedule.warmup_steps": 1,
    "training.steps": 3,
    "evaluation.rows": 4,
    "checkpoint.every_steps": 2,
    "monitor.tensorboard": "false",
}
TEXT = "the default value of a list is returned if the file does not exist and an error is raised otherwise"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts/."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "texts").mkdir()
    words = TEXT.split()
    documents = (" ".join(words[(i * j + j) % len(words)] for j in range(40 + i % 30)) for i in range(300))
    (folder / "texts" / "a.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return folder


def run(folder: Path, command: str, *more: str) -> str:
    """A command of a page, with more arguments."""
    words = [*shlex.split(command), *more]
    if words[0] == "maskvr":
        words = [sys.executable, "-m", "maskvr_ds.cli", *words[1:]]
    elif words[0] == "python":
        words[0] = sys.executable
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tiny(**changes: object) -> list[str]:
    settings = {**TINY, **changes}
    return [word for key, value in settings.items() if value is not None for word in ("--set", f"{key}={value}")]


def smaller(command: str) -> str:
    """A vocabulary and a held-out share that so little text can fill."""
    command = command.replace("--vocab-size 30522", "--vocab-size 80").replace("--workers 16", "--workers 1")
    return re.sub(r"--held-out 0\.\d+", "--held-out 0.1", command)


def block_of(page: Path, heading: str, language: str) -> pages.Block:
    text = pages.section(page, heading)
    return next(block for block in pages.blocks(page, language) if block.text in text)


# The tests below run in this order, each on what the one before has made.


def test_text_to_model(folder: Path) -> None:
    tokenizer, build, train, export = shell_lines(block_of(README, "Train your own", "bash"))
    run(folder, smaller(tokenizer))
    run(folder, smaller(build))
    run(folder, train, "--num-gpus", "1", *tiny())
    run(folder, export)
    assert (folder / "my-bert" / "model.safetensors").is_file()


def test_looking_at_it(folder: Path) -> None:
    looking = [
        *shell_lines(block_of(DOCS / "how-to" / "build-a-corpus.md", "In two commands", "bash"))[2:],
        *shell_lines(block_of(DOCS / "how-to" / "resume-and-recover.md", "Checkpoints", "bash")),
        *shell_lines(block_of(DOCS / "how-to" / "train.md", "Watch it", "bash")),
    ]
    assert len(looking) == 8
    for command in looking:
        run(folder, command.replace("runs/mine", "runs/bert_base_4k"))


def test_the_reader_of_corpora(folder: Path) -> None:
    block = pages.blocks(DOCS / "reference" / "corpus-format.md", "python")[0]
    printed = run(folder, f"python -c {shlex.quote(block.text)}")
    assert "(2, 128)" in printed


def test_the_exported_model(folder: Path) -> None:
    block = pages.blocks(DOCS / "how-to" / "export.md", "python")[0]
    printed = run(folder, f"python -c {shlex.quote(block.text)}")
    assert "token_str" in printed


def test_continuing_from_it(folder: Path) -> None:
    page = DOCS / "how-to" / "continue-pretraining.md"
    values = yaml.safe_load(pages.blocks(page, "yaml")[0].text)
    values["model"]["initialize_from"] = "my-bert"
    (folder / "domain.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    command = shell_lines(pages.blocks(page, "bash")[0])[-1]
    sizes = {"model.preset": None, "model.max_position_embeddings": None, "schedule.warmup_steps": None}
    run(folder, command, "--num-gpus", "1", *tiny(**sizes))
    assert (folder / "runs" / "domain" / "completed.json").is_file()


def test_a_classifier_by_trainer(folder: Path) -> None:
    pytest.importorskip("accelerate")
    block = pages.blocks(DOCS / "how-to" / "export.md", "python")[1]
    printed = run(folder, f"python -c {shlex.quote(block.text.replace('report_to=[]', 'report_to=[], use_cpu=True'))}")
    assert 0 <= float(printed.splitlines()[-1]) <= 1, "the accuracy"


def test_masks_in_trainer(folder: Path) -> None:
    pytest.importorskip("accelerate")
    (block,) = pages.blocks(DOCS / "how-to" / "use-masks-in-trainer.md", "python")
    printed = run(folder, f"python -c {shlex.quote(block.text.replace('report_to=[]', 'report_to=[], use_cpu=True'))}")
    assert "train_loss" in printed


def test_finetune(folder: Path) -> None:
    """The command of the page on a toy task, and its script."""
    save_model(folder / "runs" / "base")
    write_sst2(folder / "glue", train=40, dev=20)
    page = DOCS / "how-to" / "evaluate.md"
    (command,) = shell_lines(block_of(page, "Keep a fine-tuned model", "bash"))
    assert "| runs/base " in run(folder, command, "--learning-rates", "1e-3", "--epochs", "1", "--max-length", "16")
    script = block_of(page, "Keep a fine-tuned model", "python")
    assert "score" in run(folder, shlex.join(["python", "-c", script.text]))


def test_python_blocks_are_all_tested() -> None:
    """Here, or by tests/distributed/test_readme.py (use-lamb-alone.md)."""
    tested = {"docs/reference/corpus-format.md", "docs/how-to/export.md", "docs/how-to/use-lamb-alone.md", "README.md"}
    tested.add("docs/how-to/use-masks-in-trainer.md")
    tested |= {"docs/how-to/evaluate.md"}
    assert {pages.name(block.page) for block in pages.all_blocks("python")} == tested


def test_the_excerpt_of_the_readme_is_from_the_full_script() -> None:
    (excerpt,) = pages.blocks(README, "python")
    (script,) = pages.blocks(DOCS / "how-to" / "use-lamb-alone.md", "python")
    lines = set(script.text.splitlines())
    assert [line for line in excerpt.text.splitlines() if line and line not in lines] == []


def test_the_quickstart_shows_what_the_demo_prints() -> None:
    """The names of the figures that `maskvr demo` prints last."""
    shown = block_of(README, "Quickstart", "console").text.splitlines()[-5:]
    code = (ROOT / "maskvr_ds" / "demo.py").read_text(encoding="utf-8")
    for line in shown:
        if line.startswith((" ", "…")):
            continue  # the rest of a figure, or of them
        label = re.match(r"[a-z-]+( [a-z]+)?", line)
        assert label is not None
        assert label[0].strip() in code
