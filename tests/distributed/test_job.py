"""Jobs through `maskvr train`: signals to the command and to a rank, a rank that hangs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from maskvr_ds.checkpoint.load import read_weights
from maskvr_ds.run_folder.checkpoints import complete_checkpoints
from maskvr_ds.run_folder.layout import STOP_REQUEST
from maskvr_ds.run_folder.status import EXIT_STOPPED
from tests.distributed.ranks import run_ranks
from tests.distributed.training import column, command, configuration, environment, metrics, run_command, train_all
from tests.support.corpora import make_corpus

STEPS, EVERY = 150, 50
FIGURES = ("step", "samples", "loss", "grad_norm", "data_digest", "mask_digest")


class Job:
    """A `maskvr train` on two ranks in the background; killed when the context ends."""

    def __init__(self, config: Path, *words: object) -> None:
        self.output = config.with_suffix(f".{time.monotonic_ns()}.log")
        words = ("train", "--config", config, "--num-gpus", 2, "--resume", "auto", *words)
        with self.output.open("w") as log:
            self.process = subprocess.Popen(
                command(*words), env=environment(), stdout=log, stderr=log, start_new_session=True
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def wait_until(self, condition: Callable[[], Any], timeout: float = 300) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"ended or hung before its time:\n{self.output.read_text()[-3000:]}")
            time.sleep(0.02)

    def family(self) -> list[psutil.Process]:
        return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank, found by RANK in its environment."""
        for process in self.family():
            try:
                if process.environ().get("RANK") == str(number):
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"no rank {number}")

    def status(self, timeout: float = 300) -> int:
        return self.process.wait(timeout)

    def end(self) -> None:
        """SIGKILL the command and all its descendants."""
        if self.process.poll() is None:
            family = self.family()
            for member in family:
                try:
                    member.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(family, timeout=30)
        self.process.wait()


def write_config(folder: Path, corpus: Path, name: str, **sections: Any) -> Path:
    more = {
        "evaluation": {"every_steps": 0},
        "checkpoint": {"every_steps": EVERY},
        "deepspeed": "zero2_fp32",
        **sections,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(configuration(folder / name, corpus, steps=STEPS, **more)))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a run that is never stopped, "uninterrupted"."""
    folder = tmp_path_factory.mktemp("job")
    corpus = make_corpus(folder / "corpus", rows=200, words=20)
    values = yaml.safe_load(write_config(folder, corpus, "uninterrupted").read_text())
    assert run_ranks(train_all, 2, [(values, None)]) == [[None], [None]]
    return folder


def same_as_whole(folder: Path, name: str) -> None:
    assert column(folder / name, *FIGURES) == column(folder / "uninterrupted", *FIGURES)
    ours, theirs = (read_weights(complete_checkpoints(folder / run)[-1]) for run in (name, "uninterrupted"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_signals_stop_the_job_with_a_checkpoint_and_its_own_exit_status(folder: Path) -> None:
    """SIGTERM to the command, SIGUSR1 to a rank, Ctrl-C; the job saves each time and, resumed, ends with the same
    bits."""
    config = write_config(folder, folder / "corpus", "signals")
    run = folder / "signals"
    for number, to_rank, after in ((signal.SIGTERM, None, 5), (signal.SIGUSR1, 1, 5), (signal.SIGINT, None, 5)):
        before = len(metrics(run))
        with Job(config) as job:
            job.wait_until(lambda n=before + after: len(metrics(run)) >= n)
            if number == signal.SIGINT:  # as a terminal: to its foreground process group
                os.killpg(job.process.pid, number)
            else:
                (job.process if to_rank is None else job.rank(to_rank)).send_signal(number)
            assert job.status() == EXIT_STOPPED == 75, job.output.read_text()[-3000:]
        steps = len(metrics(run))
        assert before + after <= steps < STEPS
        assert complete_checkpoints(run)[-1].name == f"step-{steps:08d}", "nothing is lost"
    values = yaml.safe_load(config.read_text())
    assert run_ranks(train_all, 2, [(values, "auto")]) == [[None], [None]]
    same_as_whole(folder, "signals")


def test_a_hung_rank_ends_the_job_and_is_named(folder: Path) -> None:
    config = write_config(folder, folder / "corpus", "hang", hangs={"timeout": 6}, training={"steps": 100_000})
    with Job(config) as job:
        job.wait_until(lambda: len(metrics(folder / "hang")) >= 5)
        job.rank(1).send_signal(signal.SIGSTOP)
        assert job.status() == 1
    text = job.output.read_text()
    last = len(metrics(folder / "hang"))
    assert text.count("has not answered for 6 s") == 1
    words = text[text.index("error: rank 1 on ") :]
    step = int(words.split("(last step ")[1].split(",")[0])
    assert abs(step - last) <= 1000, "the step of its last heartbeat"


def test_a_stale_stop_request_is_ignored(tmp_path: Path) -> None:
    """On one rank, which needs no launcher."""
    corpus = make_corpus(tmp_path / "corpus", rows=200, words=20)
    config = write_config(tmp_path, corpus, "alone", training={"steps": 6})
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / STOP_REQUEST).touch()
    time.sleep(1)
    words = ("train", "--config", config, "--num-gpus", 1, "--resume", "auto")
    assert run_command(*words).returncode == 0
    assert len(metrics(tmp_path / "alone")) == 6
    assert not (tmp_path / "alone" / STOP_REQUEST).exists()
