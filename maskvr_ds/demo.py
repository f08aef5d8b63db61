"""`maskvr demo`: from text to an exported model, with a training run that is killed and resumed.

The text is the docstrings of the standard library and of the installed packages, which every machine has. Every step
prints and runs the command that a user would type.
"""

import ast
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import METRICS
from maskvr_ds.telemetry.held_out import held_out_sentence
from maskvr_ds.telemetry.metrics_file import read_lines
from maskvr_ds.telemetry.plots import plot_loss

_TEXT_BYTES = 8_000_000
_SHORTEST = 80  # characters; shorter docstrings are labels rather than English
# Test suites contain little English and take long to parse.
_SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
_RANKS = 2
_SENTENCES = (
    "return a new list of the [MASK] in the given order .",
    "raises an [MASK] if the file does not exist .",
    "the default value is [MASK] .",
)


def demo(output: Path) -> int:
    """Recreate `output` and run all steps in it. Returns the exit status.

    Raises ValueError if `output` is not empty and not from an earlier demo, or if a step fails.
    """
    started = time.monotonic()
    marker = output / ".maskvr_demo"
    if output.exists() and any(output.iterdir()):
        if not marker.is_file():
            raise ValueError(f"{output} is not empty and not from an earlier demo; use another --output")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()
    text, tokenizer, corpus, run = (output / n for n in ("docstrings.jsonl", "tokenizer", "corpus", "run"))

    _title("1. Text: the docstrings of the installed Python packages")
    documents = write_docstrings(text)
    print(f"{text}: {documents:,} docstrings, {text.stat().st_size / 1e6:.1f} MB")

    _title("2. Tokenizer and corpus")
    python = [sys.executable, "-m"]
    pipeline = [*python, "data_pipeline"]
    _run([*pipeline, "tokenizer", "--input", text, "--vocab-size", "4096", "--output", tokenizer])
    build: list[str | Path] = [*pipeline, "build", "--input", text, "--tokenizer", tokenizer, "--output", corpus]
    _run([*build, "--sequence-length", "64", "--held-out", "0.05", "--workers", str(_RANKS)])

    _title(f"3. Training with {_RANKS} ranks, ZeRO-2 and LAMB; killed and resumed")
    settings = ["--set", f"data.path={corpus}", "--set", f"output_dir={run}"]
    train = [*python, "maskvr_ds.cli", "train", "--config", "demo_cpu", "--num-gpus", str(_RANKS), *settings]
    kill_when_saved(train, run)
    print(f"\nkilled with SIGKILL; resuming from {complete_checkpoints(run)[-1].name}")
    _run([*train, "--resume", "auto"])

    _title("4. Export to Hugging Face")
    model = output / "model"
    _run([*python, "maskvr_ds.cli", "export", "--checkpoint", run, "--output", model])
    fill_masks(model)

    lines = read_lines(run / METRICS)
    held_out = next(line for line in reversed(lines) if "held_out_loss" in line)
    plot_loss(run / METRICS, output / "loss.png")
    _title("Results")
    print(f"corpus            {corpus}")
    print(f"run               {run} (metrics.jsonl, checkpoints, TensorBoard)")
    print(f"model             {model} (BertForMaskedLM)")
    print(f"loss curves       {output / 'loss.png'}")
    print(f"training          {lines[-1]['step']:,} steps, {lines[-1]['tokens']:,} tokens")
    print("held out         ", held_out_sentence(held_out).replace("; ", ";\n" + 18 * " "))
    print(f"time              {time.monotonic() - started:.0f} s")
    return 0


def _title(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def _environment() -> dict[str, str]:
    # The demo uses two CPU cores, also on a machine with a GPU.
    return {**os.environ, "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}


def _show(command: list[str]) -> None:
    shown = ["python" if word == sys.executable else word for word in command]
    print("$", shlex.join(shown).replace("python -m maskvr_ds.cli", "maskvr"), flush=True)


def _run(command: Sequence[str | Path]) -> None:
    words = [str(word) for word in command]
    _show(words)
    if status := subprocess.run(words, env=_environment(), check=False).returncode:
        raise ValueError(f"the command above failed with exit status {status}")


def docstrings() -> Iterator[str]:
    """Distinct docstrings of the standard library, then of the installed packages, in order of path."""
    seen = set()
    paths = sysconfig.get_paths()
    for root in (paths["stdlib"], paths["purelib"]):
        for path in sorted(Path(root).rglob("*.py")):
            inside = path.relative_to(root).parts
            if _SKIPPED.intersection(inside):
                continue
            try:
                with warnings.catch_warnings(action="ignore"):
                    tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError, OSError):
                continue  # not valid Python, e.g. templates
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    text = inspect.cleandoc(ast.get_docstring(node) or "")
                    if len(text) >= _SHORTEST and text not in seen:
                        seen.add(text)
                        yield text


def write_docstrings(path: Path) -> int:
    """Write docstrings as JSON Lines, one document per line, until _TEXT_BYTES is reached; → number of documents."""
    written = count = 0
    with path.open("w", encoding="utf-8") as file:
        for text in docstrings():
            # Drop surrogates, which occur in tests of Unicode and cannot be encoded.
            line = json.dumps({"text": text.encode("utf-8", "ignore").decode()}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())
            count += 1
            if written >= _TEXT_BYTES:
                break
    return count


def kill_when_saved(command: Sequence[str | Path], run: Path) -> None:
    """Start a job and kill all its processes with SIGKILL shortly after its first checkpoint."""
    words = [str(word) for word in command]
    _show(words)
    process = subprocess.Popen(words, env=_environment(), start_new_session=True)
    while process.poll() is None and not complete_checkpoints(run):
        time.sleep(0.2)
    if process.poll() is not None:
        raise ValueError(f"training ended with exit status {process.returncode} before its first checkpoint")
    time.sleep(3)
    # Each rank has its own process group.
    for pid in [*_descendants(process.pid), process.pid]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def fill_masks(model: Path) -> None:
    """Print predictions for [MASK] of the exported model, loaded by transformers alone."""
    from transformers import pipeline
    from transformers.utils import logging

    logging.disable_progress_bar()
    fill = pipeline("fill-mask", model=str(model))
    for sentence in _SENTENCES:
        guesses = ", ".join(f"{g['token_str']} {g['score']:.2f}" for g in fill(sentence)[:4])
        print(f"{sentence:55} {guesses}")
