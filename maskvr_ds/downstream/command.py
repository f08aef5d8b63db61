"""`maskvr evaluate` on downstream tasks, and `maskvr finetune`: everything is read and checked before the first run."""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from maskvr_ds.downstream import along_run, report
from maskvr_ds.downstream.evaluation import Evaluator, Protocol, Row
from maskvr_ds.downstream.examples import TaskData, hold_out, limited
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.jobs import Progress, compute_all
from maskvr_ds.downstream.models import Encoder, prepared
from maskvr_ds.downstream.store import Content, RunStore
from maskvr_ds.downstream.tasks import Kind, Task, TaskError
from maskvr_ds.downstream.weighted_words import check_weightable

MODEL = "model"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """Tasks of a command and where they are. max_train: maximum number of training examples per task; None for all.
    jobs: processes that compute runs. checkpoints: of runs, by `along_run.select`; None for models as they are."""

    tasks: Sequence[Task]
    data: Path
    output: Path
    protocol: Protocol
    max_train: int | None = None
    jobs: int = 1
    checkpoints: str | None = None

    def settings(self) -> Content:
        return {
            "data": str(self.data),
            "max_train": self.max_train,
            "checkpoints": self.checkpoints,
            **asdict(self.protocol),
        }


def evaluate(models: Sequence[str], request: Request) -> str:
    """Fine-tune and evaluate models on tasks; returns the tables, which are also in the output folder.

    Raises TaskError, CheckpointError, ExportError or OSError; runs that are done by then are stored. Diverged final
    runs, and runs that failed in another process, raise TaskError after everything else is done and written.
    """
    leave_launcher()
    data = _read(request)
    points = [] if request.checkpoints is None else along_run.select(models, request.checkpoints)
    store = RunStore(request.output)
    with prepared([point.model for point in points] or models, _lengths(request)) as encoders:
        evaluators = [Evaluator(store, task, request.protocol) for task in data]
        progress = Progress(evaluators, len(encoders))
        try:
            for evaluator in evaluators:
                evaluator.report = progress
            errors = compute_all(evaluators, encoders, request.jobs, progress) if request.jobs > 1 else []
            reports, text = _report(store, request, evaluators, encoders, errors)
        finally:
            progress.close()
        if points and reports:
            text = along_run.write(store, points, reports, text)
    if errors:
        raise TaskError(
            f"{len(errors)} run{'s' * (len(errors) > 1)} failed; all others are stored: {'; '.join(errors)}"
        )
    _refuse_diverged(reports)
    return text


def _report(
    store: RunStore,
    request: Request,
    evaluators: Sequence[Evaluator],
    encoders: Sequence[Encoder],
    errors: Sequence[str],
) -> tuple[dict[str, Content], str]:
    """Reports and tables of the tasks without errors."""
    reports: dict[str, Content] = {}
    text = ""
    for evaluator in evaluators:
        name = evaluator.data.task.name
        if any(error.startswith(f"{name}: ") for error in errors):
            logger.warning("%s: no table, as runs failed", name)
            continue
        reports[name] = report.task_report(evaluator.data, evaluator.rows(encoders))
        # After every task: an evaluation may take days.
        text = report.write(store, request.settings(), reports)
        logger.info("%s: %d runs, and %d stored before", name, evaluator.done, evaluator.reused)
    return reports, text


def finetune(model: str, request: Request, seed: int) -> str:
    """Fine-tune a model on a task and save it as OUTPUT/model; returns the table of the task."""
    folder = request.output / MODEL
    if folder.exists():
        raise TaskError(f"--output {request.output}: has a fine-tuned model already; choose another")
    leave_launcher()
    (task,) = _read(request)
    store = RunStore(request.output)
    with prepared([model], _lengths(request)) as (encoder,):
        evaluator = Evaluator(store, task, replace(request.protocol, seeds=1))
        rows: list[Row] = [evaluator.majority(), evaluator.bag_of_words(), evaluator.kept(encoder, seed, folder)]
    reports = {task.task.name: report.task_report(task, rows)}
    text = report.write(store, request.settings() | {"seed": seed}, reports)
    _refuse_diverged(reports)
    return text


def leave_launcher() -> None:
    """Remove a launcher's variables of a single process, for which accelerate would open a process group.

    Raises TaskError for several processes: each would do the same.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TaskError("fine-tuning runs in one process: start the command without a launcher")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def _read(request: Request) -> list[TaskData]:
    found = [limited(read_task(task, request.data), request.max_train) for task in request.tasks]
    for data in found:
        request.protocol.settings(data.task)  # raises if windows are impossible
        check_weightable(data.task, request.protocol.baselines)
        if request.protocol.chooses(data.task):
            hold_out(data.train, data.task)  # raises if the training set is too small
        if data.skipped:
            logger.warning("%s: %d damaged rows of its files are skipped", data.task.name, data.skipped)
    return found


def _lengths(request: Request) -> dict[Kind, int]:
    """Kind -> maximum number of tokens of an example."""
    found: dict[Kind, int] = {}
    for task in request.tasks:
        found[task.kind] = max(found.get(task.kind, 0), request.protocol.settings(task).max_length)
    return found


def _refuse_diverged(reports: dict[str, Content]) -> None:
    diverged = [
        f"{task}: {name} (learning rate {row['learning_rate']:g}, seed {', '.join(map(str, row['diverged_seeds']))})"
        for task, content in reports.items()
        for name, row in content["rows"].items()
        if row["diverged_seeds"]
    ]
    if diverged:
        raise TaskError(
            f"final runs diverged: {'; '.join(diverged)}; all others are stored. Choose lower --learning-rates"
        )
