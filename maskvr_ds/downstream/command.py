"""`maskvr evaluate` on downstream tasks, and `maskvr finetune`: everything is read and checked before the first run."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from maskvr_ds.downstream import along_run, layers, report
from maskvr_ds.downstream.baselines import BAG_OF_WORDS, MAJORITY, needs_held_out
from maskvr_ds.downstream.evaluation import Evaluator, Row
from maskvr_ds.downstream.examples import TaskData, hold_out, limited
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.intermediate import Intermediate
from maskvr_ds.downstream.jobs import Failures, Progress, compute_all
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.protocol import Protocol
from maskvr_ds.downstream.store import Content, RunStore, opened
from maskvr_ds.downstream.tasks import WEIGHTED_ROWS, Kind, Task, TaskError
from maskvr_ds.downstream.weighted_words import check_weightable
from maskvr_ds.runtime.files import discard

MODEL = "model"

logger = logging.getLogger(__name__)


class IncompleteError(TaskError):
    """Some runs failed or diverged. Everything else is done, and written."""


@dataclass(frozen=True)
class First:
    """Intermediate task of two-stage fine-tuning, and where it is. Others as in Request and Protocol."""

    task: Task
    data: Path
    learning_rate: float | None = None
    epochs: float | None = None
    max_train: int | None = None


@dataclass(frozen=True)
class Request:
    """Tasks of a command and where they are. max_train: maximum number of training examples per task; None for all.
    jobs: processes that compute runs. checkpoints: of runs, by `along_run.select`; None for models as they are. first:
    intermediate task."""

    tasks: Sequence[Task]
    data: Path
    output: Path
    protocol: Protocol
    max_train: int | None = None
    jobs: int = 1
    checkpoints: str | None = None
    first: First | None = None

    def settings(self) -> Content:
        first = self.first and {**asdict(self.first), "task": self.first.task.name, "data": str(self.first.data)}
        return {
            "data": str(self.data),
            "max_train": self.max_train,
            "checkpoints": self.checkpoints,
            **asdict(self.protocol),
            "intermediate": first,
        }


def evaluate(models: Sequence[str], request: Request) -> str:
    """Fine-tune and evaluate models on tasks; returns the tables, which are also in the output folder.

    Raises TaskError, CheckpointError, ExportError or OSError; runs that are done by then are stored. Diverged runs, and
    runs that failed in another process, raise IncompleteError after everything else is done and written.
    """
    leave_launcher()
    _check_names(models)
    data, first = read(request)
    points = [] if request.checkpoints is None else along_run.select(models, request.checkpoints)
    names = [point.model for point in points] or models
    with opened(request.output) as store, _encoders(names, request) as encoders:
        evaluators = [Evaluator(store, task, request.protocol, intermediate=first) for task in data]
        progress = Progress(evaluators, len(encoders))
        try:
            for evaluator in evaluators:
                evaluator.report = progress
            failures = compute_all(evaluators, encoders, request.jobs, progress) if request.jobs > 1 else {}
            reports, text, refused = _report(store, request, evaluators, encoders, failures)
        finally:
            progress.close()
        if points:
            text = along_run.write(store, points, reports, text)
    _raise_failures(reports, failures, refused)
    return text


def _report(
    store: RunStore,
    request: Request,
    evaluators: Sequence[Evaluator],
    encoders: Sequence[Encoder],
    failures: Failures,
) -> tuple[dict[str, Content], str, list[str]]:
    """Reports and tables of the tasks; what is wrong with models that have no row although no run failed."""
    reports: dict[str, Content] = {}
    refused: list[str] = []
    text = ""
    for evaluator in evaluators:
        task = evaluator.data.task.name
        rows = evaluator.baselines()
        failed = {}
        for encoder in encoders:
            if errors := failures.get((task, encoder.name)):
                failed[encoder.name] = "; ".join(errors)
                continue
            try:
                rows.append(evaluator.encoder(encoder))
            except TaskError as error:
                logger.warning("%s", error)
                failed[encoder.name] = str(error)
                refused.append(str(error))
        reports[task] = report.task_report(evaluator.data, rows, evaluator.heading() if encoders else "", failed)
        # After every task: an evaluation may take days.
        text = report.write(store, request.settings(), reports)
        logger.info("%s: %d runs, and %d stored before", task, evaluator.done, evaluator.reused)
    return reports, text, refused


def finetune(model: str, request: Request, seed: int) -> str:
    """Fine-tune a model on a task and save it as OUTPUT/model; returns the table of the task."""
    folder = request.output / MODEL
    leave_launcher()
    _check_names([model])
    (task,), first = read(request)
    with opened(request.output) as store, _encoders([model], request) as (encoder,):
        if folder.exists():
            raise TaskError(f"--output {request.output}: has a fine-tuned model already; choose another")
        # The model gets its name after its scores are written, so that none is without them.
        unscored = folder.with_name(f".{MODEL}")
        discard(unscored)  # of a killed process
        evaluator = Evaluator(store, task, replace(request.protocol, seeds=1), intermediate=first)
        rows: list[Row] = [evaluator.majority(), evaluator.bag_of_words(), evaluator.kept(encoder, seed, unscored)]
        reports = {task.task.name: report.task_report(task, rows, evaluator.heading())}
        text = report.write(store, request.settings() | {"seed": seed}, reports)
        if unscored.is_dir():  # absent if the run diverged
            unscored.rename(folder)
    _raise_failures(reports, {}, [])
    return text


def check_models(models: Sequence[str], request: Request) -> None:
    """Raise TaskError, CheckpointError, ExportError or OSError for models that cannot be evaluated."""
    _check_names(models)
    with _encoders(models, request):
        pass


@contextmanager
def _encoders(models: Sequence[str], request: Request) -> Iterator[list[Encoder]]:
    """The models, checked for the tasks and settings of a command (`models.prepared`)."""
    protocol = request.protocol
    with prepared(models, _lengths(request)) as encoders:
        for encoder in encoders:
            layers.check(encoder, request.tasks[0].kind, protocol.freeze, protocol.layer_decay)
        yield encoders


def _check_names(models: Sequence[str]) -> None:
    """Raise TaskError for a model whose row would have the name of one without a model."""
    for name in models:
        if name in (MAJORITY, BAG_OF_WORDS, *WEIGHTED_ROWS.values()):
            raise TaskError(f"MODEL {name}: is the name of a row without a model; write ./{name}")


def leave_launcher() -> None:
    """Remove a launcher's variables of a single process, for which accelerate would open a process group.

    Raises TaskError for several processes: each would do the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TaskError("fine-tuning runs in one process: start the command without a launcher")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def read(request: Request) -> tuple[list[TaskData], Intermediate | None]:
    """The files of a command's tasks. Raises TaskError for damaged ones and for settings that are impossible."""
    for task in request.tasks:
        request.protocol.settings(task)  # raises for what is impossible
    settings = _first_protocol(request).settings(request.first.task) if request.first else None
    found = [limited(read_task(task, request.data), request.max_train) for task in request.tasks]
    first = None
    if request.first is not None and settings is not None:
        given = read_task(request.first.task, request.first.data)
        data = limited(given, request.first.max_train, "--intermediate-max-train")
        rate = request.first.learning_rate or min(request.first.task.learning_rates)
        first = Intermediate(data, settings, rate)
    for data in found:
        check_weightable(data.task, request.protocol.baselines)
        if request.protocol.holds_out(data.task) or needs_held_out(data.task):
            hold_out(data.train, data.task)  # raises if the training set is too small
    for data in [*found, *([first.data] if first else [])]:
        if data.skipped:
            logger.warning("%s: %d damaged rows of its files are skipped", data.task.name, data.skipped)
    return found, first


def _first_protocol(request: Request) -> Protocol:
    """The intermediate task is trained as the tasks are, except for what is named in docs/how-to/evaluate.md."""
    assert request.first is not None
    return replace(
        request.protocol, epochs=request.first.epochs, stride=None, windows=False, freeze=None, class_weights=None,
        patience=None,
    )  # fmt: skip


def _lengths(request: Request) -> dict[Kind, int]:
    """Kind -> maximum number of tokens of an example."""
    settings = [(task.kind, request.protocol.settings(task)) for task in request.tasks]
    if request.first is not None:
        settings.append((request.first.task.kind, _first_protocol(request).settings(request.first.task)))
    found: dict[Kind, int] = {}
    for kind, each in settings:
        found[kind] = max(found.get(kind, 0), each.max_length)
    return found


def _raise_failures(reports: dict[str, Content], failures: Failures, refused: Sequence[str]) -> None:
    """Raise IncompleteError for everything that has left a table without a row, or a row without a mean."""
    found = []
    # An intermediate model is missing in all tasks.
    if errors := list(dict.fromkeys(text for texts in failures.values() for text in texts)):
        found.append(f"{len(errors)} run{'s' * (len(errors) > 1)} failed; all others are stored: {'; '.join(errors)}")
    if refused:
        found.append(f"{len(refused)} row{'s' * (len(refused) > 1)} missing: {'; '.join(dict.fromkeys(refused))}")
    diverged = [
        f"{task}: {name} (learning rate {row['learning_rate']:g}, seed {', '.join(map(str, row['diverged_seeds']))})"
        for task, content in reports.items()
        for name, row in content["rows"].items()
        if row["diverged_seeds"]
    ]
    if diverged:
        found.append(
            f"final runs diverged: {'; '.join(diverged)}; all others are stored. Choose lower --learning-rates"
        )
    if found:
        raise IncompleteError(". ".join(found))
