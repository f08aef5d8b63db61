"""Runs of an evaluation in several processes, each on a GPU of its own if there are any.

The processes compute and store single runs; afterwards the command goes through the same protocol as without them and
finds every run stored. Scores therefore do not depend on the number of processes, nor on which of them was killed when.
A process that dies, or a run that fails, ends neither the others nor the runs that are still to come.
"""

import logging
import multiprocessing
import os
import signal
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from maskvr_ds.downstream.evaluation import Evaluator, Run
from maskvr_ds.downstream.examples import TaskData
from maskvr_ds.downstream.intermediate import Intermediate
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.protocol import Protocol
from maskvr_ds.downstream.store import Content, RunStore
from maskvr_ds.downstream.tasks import TaskError
from maskvr_ds.runtime.logs import is_quiet
from maskvr_ds.runtime.processes import die_with_parent

logger = logging.getLogger(__name__)


class Progress:
    """A bar over the runs of a command, on a terminal only, and a line for each run that ends."""

    def __init__(self, evaluators: Sequence[Evaluator], models: int) -> None:
        # And the bags of words of each task.
        total = sum(e.bags_of_words + models * (len(e.selection()) + e.protocol.seeds) for e in evaluators)
        first = evaluators[0]
        total += models * max(first.protocol.seeds, first.protocol.selection_seeds) * (first.intermediate is not None)
        logger.info("at most %d runs, less those that are stored", total)
        self._bar = tqdm(total=total, desc="runs", unit="run", leave=False, disable=True if is_quiet() else None)

    def __call__(self, line: str) -> None:
        self._bar.clear()
        logger.info("%s", line)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


# (Task, model) -> the errors of its runs, each naming the run.
Failures = dict[tuple[str, str], list[str]]


@dataclass(frozen=True)
class _Job:
    """A run: of which task and model, by their places."""

    task: int
    model: int
    run: Run


# Of a worker process.
_evaluators: list[Evaluator] = []
_encoders: list[Encoder] = []


def _start(
    parent: int, scratch: str, device: str | None, threads: int | None, store: RunStore, tasks: list[TaskData],
    protocol: Protocol, intermediate: Intermediate | None, encoders: list[Encoder],
) -> None:  # fmt: skip
    """Prepare a worker process. scratch: folder for temporary files, which the parent deletes; device: the GPU that it
    sees; threads: of PyTorch on CPUs."""
    die_with_parent(parent)
    tempfile.tempdir = scratch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends the workers
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch
    from transformers.utils import logging as transformers_logging

    if threads is not None:
        torch.set_num_threads(threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _evaluators[:] = [Evaluator(store, data, protocol, lambda line: None, intermediate) for data in tasks]
    _encoders[:] = encoders


def _compute(job: _Job) -> Content:
    """Compute and store a run; → how it ended."""
    evaluator, encoder = _evaluators[job.task], _encoders[job.model]
    content: Content | None
    if job.run.purpose == "intermediate":
        assert evaluator.intermediate is not None
        evaluator.start(encoder, job.run.seed)
        content = evaluator.intermediate.stored(evaluator.store, encoder, job.run.seed)
    else:
        content = evaluator.run(encoder, job.run)
    assert content is not None
    return {key: content.get(key) for key in ("diverged", "train_seconds")}


def visible_devices() -> list[str]:
    """Names of the GPUs for CUDA_VISIBLE_DEVICES; none if fine-tuning is on CPUs."""
    import torch

    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return []
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]


def compute_all(
    evaluators: Sequence[Evaluator], encoders: Sequence[Encoder], processes: int, progress: Progress
) -> Failures:
    """Compute every run that is not stored, by several processes; → what failed.

    Of a model and task without an error all runs are stored then, except if it diverges at every learning rate.
    """
    devices = visible_devices()
    cores = len(os.sched_getaffinity(0))
    own = None if devices or "OMP_NUM_THREADS" in os.environ else max(1, cores // processes)
    first = evaluators[0]
    data = [evaluator.data for evaluator in evaluators]
    common = (first.store, data, first.protocol, first.intermediate, list(encoders))
    children = set(multiprocessing.active_children())
    with tempfile.TemporaryDirectory(prefix="maskvr-") as scratch:
        pool = _Pool(
            [
                (os.getpid(), scratch, devices[i % len(devices)] if devices else None, own, *common)
                for i in range(processes)
            ]
        )
        try:
            return _Schedule(evaluators, encoders, progress).work(pool)
        finally:
            pool.stop()
            for child in set(multiprocessing.active_children()) - children:
                child.kill()
                child.join()


class _Pool:
    """Worker processes with one job each. A dead one is replaced."""

    def __init__(self, arguments: Sequence[tuple[Any, ...]]) -> None:
        self._arguments = arguments
        self._workers: dict[int, ProcessPoolExecutor] = {}
        self._busy: dict[Future[Content], int] = {}
        self.idle = deque(range(len(arguments)))

    def submit(self, job: _Job) -> Future[Content]:
        place = self.idle.popleft()
        if place not in self._workers:
            self._workers[place] = self._worker(place)
        try:
            future = self._workers[place].submit(_compute, job)
        except BrokenProcessPool:  # killed while it was idle
            self._workers[place] = self._worker(place)
            future = self._workers[place].submit(_compute, job)
        self._busy[future] = place
        return future

    def _worker(self, place: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), initializer=_start, initargs=self._arguments[place]
        )

    def release(self, future: Future[Content]) -> None:
        """Have the worker of a job that has ended ready for the next one."""
        place = self._busy.pop(future)
        if isinstance(future.exception(), BrokenProcessPool):
            self._workers.pop(place).shutdown()
        self.idle.append(place)

    def stop(self) -> None:
        for worker in self._workers.values():
            worker.shutdown(wait=not self._busy, cancel_futures=True)


class _Schedule:
    """Which runs are next: intermediate models of all seeds first, those of the selection next, and final ones once a
    learning rate can be chosen."""

    def __init__(self, evaluators: Sequence[Evaluator], encoders: Sequence[Encoder], progress: Progress) -> None:
        self._evaluators, self._encoders, self._progress = evaluators, encoders, progress
        self._queue: deque[_Job] = deque()
        self._open: dict[tuple[int, int], set[Run]] = {}
        self._failures: Failures = {}

    def work(self, pool: _Pool) -> Failures:
        # Of the first task: they are the same ones for all.
        for model, encoder in enumerate(self._encoders):
            self._add(0, model, self._evaluators[0].missing_intermediate(encoder))
        self._drain(pool)
        for task in range(len(self._evaluators)):
            for model in range(len(self._encoders)):
                if not self._failed(task, model):
                    self._extend(task, model)
        self._drain(pool)
        return self._failures

    def _drain(self, pool: _Pool) -> None:
        running: dict[Future[Content], _Job] = {}
        while self._queue or running:
            while self._queue and pool.idle:
                job = self._queue.popleft()
                running[pool.submit(job)] = job
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                pool.release(future)
                self._end(running.pop(future), future)

    def _add(self, task: int, model: int, runs: Sequence[Run]) -> None:
        self._open[task, model] = set(runs)
        self._queue.extend(_Job(task, model, run) for run in runs)

    def _extend(self, task: int, model: int) -> None:
        """Queue the runs of a task and model that can be computed now."""
        try:
            runs = self._evaluators[task].missing(self._encoders[model])
        except TaskError:
            return  # raised again by the protocol, which then names the model
        self._add(task, model, runs)

    def _failed(self, task: int, model: int) -> list[str]:
        key = self._evaluators[task].data.task.name, self._encoders[model].name
        return self._failures.get(key, [])

    def _fail(self, job: _Job, text: str) -> None:
        """Of an intermediate model, for every task."""
        tasks = range(len(self._evaluators)) if job.run.purpose == "intermediate" else [job.task]
        for task in tasks:
            key = self._evaluators[task].data.task.name, self._encoders[job.model].name
            self._failures.setdefault(key, []).append(text)

    def _end(self, job: _Job, future: Future[Content]) -> None:
        evaluator, encoder = self._evaluators[job.task], self._encoders[job.model]
        pair = job.task, job.model
        label = job.run.label(encoder)
        name = evaluator.task_of(job.run)
        if error := future.exception():
            logger.debug("%s", label, exc_info=error)
            text = f"{name}: {label}: {_describe(error)}"
            self._fail(job, text)
            self._progress(f"{name}: {label} failed: {_describe(error)}")
        else:
            evaluator.computed.add((encoder, job.run))
            self._progress(evaluator.line(label, future.result(), stored=False, task=name))
        self._open[pair].discard(job.run)
        # With an error the choice would not be complete.
        if not self._open[pair] and job.run.purpose == "selection" and not self._failed(*pair):
            self._extend(*pair)
            if vanished := [run for run in self._open[pair] if run.purpose == "selection"]:
                # Not again: what deletes or damages files would do the same to the next ones.
                self._queue = deque(queued for queued in self._queue if (queued.task, queued.model) != pair)
                self._fail(job, f"{name}: {vanished[0].label(encoder)}: its file is gone from {evaluator.store.folder}")


def _describe(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process was killed, perhaps for lack of memory; lower --jobs, or repeat the command"
    first = next(iter(str(error).splitlines()), "")
    return first if isinstance(error, (TaskError, OSError)) else f"{type(error).__name__}: {first}"
