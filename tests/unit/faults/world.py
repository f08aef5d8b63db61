"""The folder in which faults are made, and a command run in it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from data_pipeline.__main__ import main as data_pipeline
from tests.support.documents import ROOT, make_documents, write_text, write_tokenizer
from tests.unit.faults.case import Fault

RUN = {
    "output_dir": "run",
    "deepspeed": "zero1_fp32",
    "data": {"path": "corpus"},
    "model": {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "max_position_embeddings": 16,
    },
    "batch": {"global_size": 8, "micro_size": 4},
    "optimizer": {"lr": 1e-3},
    "schedule": {"warmup_steps": 1},
    "training": {"steps": 4},
    "evaluation": {"every_steps": 0},
    "checkpoint": {"every_steps": 2},
    "monitor": {"tensorboard": False},
}


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


def spawn(command: str) -> Outcome:
    """Run a command in a process of its own: a process can join the ranks of one run only."""
    program, *words = shlex.split(command)
    module = {"data_pipeline": "data_pipeline", "maskvr": "maskvr_ds.cli", "cluster": "cluster"}[program]
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def call(command: str) -> Outcome:
    """Run a command in this process, as from a shell."""
    from cluster.__main__ import main as cluster
    from maskvr_ds.cli.main import main as maskvr

    program, *words = shlex.split(command)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = {"data_pipeline": data_pipeline, "maskvr": maskvr, "cluster": cluster}[program](words)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
    return Outcome(status or 0, out.getvalue(), err.getvalue())


def make_world(folder: Path) -> None:
    """Texts, a tokenizer, two corpora, a configuration and its finished run of four steps with two checkpoints."""
    write_text(folder / "texts/a.txt", make_documents(100))
    write_tokenizer(folder / "tok")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    with inside(folder):
        words = "--tokenizer tok --sequence-length 16 --max-unknown 1"
        for output, options in (("corpus", "--held-out 0.2"), ("other", "--seed 1 --held-out 0.4")):
            made = call(f"data_pipeline build --input texts --output {output} {words} {options}")
            assert made.status == 0, made.err


def train(folder: Path) -> None:
    with inside(folder):
        made = spawn("maskvr train --config run.yaml --num-gpus 1 --quiet")
        assert made.status == 0, made.err


def tree(folder: Path) -> dict[str, str]:
    """Content hash (or target, for links) of everything below a folder that has an end."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def copy_world(world: Path, folder: Path) -> None:
    shutil.copytree(world, folder, symlinks=True)


def meet(fault: Fault, folder: Path) -> tuple[Outcome, dict[str, str], dict[str, str]]:
    """Make the fault in `folder`, run its command there; returns the outcome and the folder before and after."""
    with inside(folder):
        fault.prepare(folder)
        before = tree(folder)
        outcome = (spawn if fault.own_process else call)(fault.command)
        return outcome, before, tree(folder)
