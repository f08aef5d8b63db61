"""The protocol, with a fine-tuning that is computed from its arguments: choices, storage, resumption, divergence."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskvr_ds.downstream import command, evaluation, jobs, report
from maskvr_ds.downstream.evaluation import Evaluator, Row
from maskvr_ds.downstream.examples import Split, TaskData, hold_out
from maskvr_ds.downstream.files import read_task
from maskvr_ds.downstream.fine_tuning import Outcome
from maskvr_ds.downstream.losses import DivergenceError
from maskvr_ds.downstream.models import Encoder
from maskvr_ds.downstream.protocol import Protocol
from maskvr_ds.downstream.report import tables, task_report
from maskvr_ds.downstream.store import RunStore
from maskvr_ds.downstream.tasks import GLUE, TaskError
from tests.support.tasks import results, write_sst2

RATES = (1e-5, 2e-5, 3e-5)
# Share of examples that the stand-in predicts correctly.
SKILL = {1e-5: 0.6, 2e-5: 0.95, 3e-5: 0.8}
PROTOCOL = Protocol(seeds=3, selection_seeds=2, learning_rates=RATES)


class StandIn:
    """In place of `fine_tune`: knows the true labels by the texts, and errs at random. calls: purpose-free records."""

    def __init__(self, data: TaskData, skill: dict[float, float] | None = None) -> None:
        self.truth = {
            texts: int(label)
            for split in (data.train, *data.dev.values())
            for texts, label in zip(split.texts, split.labels, strict=True)
        }
        self.skill = skill or SKILL
        self.calls: list[tuple[float, int, tuple[str, ...], int]] = []
        self.kill_at: int | None = None
        self.held_out: list[Split | None] = []

    def __call__(
        self, encoder: Encoder, task: Any, labels: Any, train: Split, evaluate: dict[str, Split], *_: Any, **given: Any
    ) -> Outcome:
        rate, seed = given["learning_rate"], given["seed"]
        if len(self.calls) == self.kill_at:
            raise KeyboardInterrupt
        self.calls.append((rate, seed, tuple(evaluate), len(train)))
        self.held_out.append(given.get("held_out"))
        if self.skill[rate] < 0:
            raise DivergenceError("the loss is not finite at step 7")
        digest = hashlib.sha256(f"{encoder.digest} {rate} {seed}".encode()).digest()
        random = np.random.default_rng(list(digest))
        found = {
            name: [
                self.truth[texts] if random.random() < self.skill[rate] else 1 - self.truth[texts]
                for texts in split.texts
            ]
            for name, split in evaluate.items()
        }
        return Outcome(found, steps=1, train_seconds=0.0, predict_seconds=0.0, truncated={"train": 0})


Evaluated = Callable[..., tuple[Evaluator, list[Row]]]


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    return read_task(GLUE["sst2"], write_sst2(tmp_path / "data", train=300))


def encoder(name: str = "model") -> Encoder:
    return Encoder(name, Path(name), f"digest of {name}", None)


@pytest.fixture
def run(tmp_path: Path, data: TaskData, monkeypatch: pytest.MonkeyPatch) -> Evaluated:
    def evaluate(
        stand_in: StandIn, folder: str = "scores", given: TaskData = data, models: tuple[str, ...] = ("model",)
    ) -> tuple[Evaluator, list[Row]]:
        monkeypatch.setattr(evaluation, "fine_tune", stand_in)
        evaluator = Evaluator(RunStore(tmp_path / folder), given, PROTOCOL)
        return evaluator, evaluator.rows([encoder(name) for name in models])

    return evaluate


def flipped(data: TaskData) -> TaskData:
    dev = {k: replace(s, labels=tuple(str(1 - int(label)) for label in s.labels)) for k, s in data.dev.items()}
    return replace(data, dev=dev)


def test_which_runs_are_made(data: TaskData, run: Evaluated) -> None:
    stand_in = StandIn(data)
    _, rows = run(stand_in)
    selection, final = stand_in.calls[:6], stand_in.calls[6:]
    assert selection == [(rate, seed, ("held_out",), 270) for rate in RATES for seed in range(2)]
    # With the best learning rate, on the complete training set.
    assert final == [(2e-5, seed, ("dev",), 300) for seed in range(3)]
    assert [row.name for row in rows] == ["majority", "bag of words", "model"]


def test_early_stopping_never_sees_the_evaluation_set(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Final runs train without the held-out part as well, and stop by it."""
    stand_in = StandIn(data)
    monkeypatch.setattr(evaluation, "fine_tune", stand_in)
    evaluator = Evaluator(RunStore(tmp_path / "o"), data, replace(PROTOCOL, patience=1))
    evaluator.encoder(encoder())
    fit, held_out = hold_out(data.train, data.task)
    assert {call[3] for call in stand_in.calls} == {len(fit)}
    assert all(found is not None and found.digest == held_out.digest for found in stand_in.held_out)
    assert not set(held_out.texts) & {*fit.texts, *data.dev["dev"].texts}


def test_dev_labels_choose_nothing(data: TaskData, run: Evaluated) -> None:
    """With all labels of the evaluation set swapped, the same learning rate is chosen by the same runs, and the models
    predict the same; only the scores are reversed."""
    stand_in = StandIn(data)
    _, rows = run(stand_in, "a")
    swapped = StandIn(data)
    _, reversed_ = run(swapped, "b", flipped(data))
    assert stand_in.calls == swapped.calls
    assert rows[2].choice == reversed_[2].choice
    assert [r["predictions"] for r in rows[2].runs] == [r["predictions"] for r in reversed_[2].runs]
    found, other = (
        task_report(d, r)["rows"]["model"]["scores"]["accuracy"]["runs"]
        for d, r in ((data, rows), (flipped(data), reversed_))
    )
    assert found == pytest.approx([1 - score for score in other])


def test_finished_runs_are_not_repeated(data: TaskData, run: Evaluated) -> None:
    _, first = run(StandIn(data))
    again = StandIn(data)
    evaluator, second = run(again)
    assert again.calls == []
    assert (evaluator.done, evaluator.reused) == (0, 10)
    assert task_report(data, first) == task_report(data, second)
    # Another model: only its own.
    run(again, models=("model", "other"))
    assert len(again.calls) == 9


@pytest.mark.parametrize("kill_at", range(9))
def test_a_killed_evaluation_continues(data: TaskData, run: Evaluated, kill_at: int) -> None:
    undisturbed = StandIn(data)
    _, expected = run(undisturbed, "undisturbed")
    killed = StandIn(data)
    killed.kill_at = kill_at
    with pytest.raises(KeyboardInterrupt):
        run(killed)
    killed.kill_at = None
    _, found = run(killed)
    assert killed.calls == undisturbed.calls  # each once, also over both processes
    assert task_report(data, found) == task_report(data, expected)


def test_a_damaged_run_is_repeated(
    data: TaskData, run: Evaluated, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(StandIn(data))
    path, other = sorted((tmp_path / "scores" / "runs" / "sst2").glob("model-final*"))[:2]
    content = path.read_bytes()
    for damaged, message in ((content[:50], "is damaged"), (b"[]", "is damaged"), (other.read_bytes(), "of another")):
        path.write_bytes(damaged)
        stand_in = StandIn(data)
        run(stand_in)
        assert len(stand_in.calls) == 1
        assert message in caplog.text
        assert path.read_bytes() == content
        # The copy is not taken for a run.
        assert list(path.parent.glob(f"{path.name}.damaged-*"))


def test_a_full_disk_leaves_no_half_run(data: TaskData, run: Evaluated, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskvr_ds.downstream import store

    written = []

    def full(path: Path, text: str) -> None:
        if len(written) == 4:
            raise OSError(28, "No space left on device", str(path))
        written.append(path)
        write(path, text)

    write = store.atomic_write
    monkeypatch.setattr(store, "atomic_write", full)
    stand_in = StandIn(data)
    with pytest.raises(OSError, match="No space left"):
        run(stand_in)
    monkeypatch.setattr(store, "atomic_write", write)
    run(stand_in)
    assert len(stand_in.calls) == 10  # the run that could not be stored twice


def test_changes_that_need_new_runs(data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that affects a run's result is part of its identity."""
    stand_in = StandIn(data)
    monkeypatch.setattr(evaluation, "fine_tune", stand_in)
    one = Protocol(seeds=1, learning_rates=(2e-5,))
    train = data.train
    for changed, protocol, model in (
        (data, one, encoder()),
        (data, one, replace(encoder(), digest="of other weights")),
        (data, replace(one, epochs=1), encoder()),
        (data, replace(one, batch_size=8), encoder()),
        (data, replace(one, max_length=16), encoder()),
        (data, replace(one, precision="bf16"), encoder()),
        (data, replace(one, accumulation=2), encoder()),
        (data, replace(one, layer_decay=0.9), encoder()),
        (data, replace(one, freeze=0), encoder()),
        (data, replace(one, freeze=1), encoder()),
        (data, replace(one, class_weights="balanced"), encoder()),
        (data, replace(one, windows=True), encoder()),
        (data, replace(one, windows=True, stride=5), encoder()),
        (data, replace(one, patience=1), encoder()),
        (data, replace(one, patience=2), encoder()),
        (data, replace(one, learning_rates=(3e-5,)), encoder()),
        (replace(data, train=train.subset(range(299))), one, encoder()),
        (replace(data, train=replace(train, labels=train.labels[1:] + train.labels[:1])), one, encoder()),
        (replace(data, dev={"dev": data.dev["dev"].subset(range(50))}), one, encoder()),
    ):
        before = len(stand_in.calls)
        Evaluator(RunStore(tmp_path / "scores"), changed, protocol).encoder(model)
        assert len(stand_in.calls) == before + 1
    # The name, and the labels of the evaluation set, affect none.
    before = len(stand_in.calls)
    Evaluator(RunStore(tmp_path / "scores"), flipped(data), one).encoder(replace(encoder(), name="renamed"))
    assert len(stand_in.calls) == before


def test_divergence(data: TaskData, run: Evaluated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learning rate that diverges is not chosen; a final run that diverges leaves its row without a mean."""
    _, rows = run(StandIn(data, SKILL | {2e-5: -1}), "a")
    assert rows[2].choice is not None
    assert rows[2].choice.learning_rate == 3e-5
    assert [t["held_out_score"] for t in rows[2].choice.tried if t["learning_rate"] == 2e-5] == [None, None]
    with pytest.raises(TaskError, match="sst2: model diverges at every learning rate"):
        run(StandIn(data, dict.fromkeys(RATES, -1.0)), "b")
    monkeypatch.setattr(evaluation, "fine_tune", StandIn(data, dict.fromkeys(RATES, -1.0)))
    one = Evaluator(RunStore(tmp_path / "c"), data, Protocol(seeds=2, learning_rates=(2e-5,)))
    report = task_report(data, one.rows([encoder()]))
    assert report["rows"]["model"]["scores"]["accuracy"] == {"mean": None, "std": None, "runs": []}
    assert [d["first"] for d in report["differences"]["accuracy"]] == ["majority"]
    assert "diverged (seed 0, 1)" in tables("sst2", report)


def request(data: TaskData, output: Path, **given: Any) -> command.Request:
    """Of two tasks on the same files."""
    tasks = [data.task, replace(data.task, name="cola")]
    return command.Request(tasks, output, output, Protocol(seeds=2, learning_rates=RATES), **given)


def test_a_model_that_always_diverges_leaves_the_others_their_rows(
    data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both tasks; it is named in the table, in the JSON and in the error, which comes at the end."""

    class Diverging(StandIn):
        def __call__(self, encoder: Encoder, *given: Any, **more: Any) -> Outcome:
            if encoder.name == "broken":
                raise DivergenceError("the loss is not finite at step 7")
            return super().__call__(encoder, *given, **more)

    @contextmanager
    def models(names: Sequence[str], *_: object) -> Iterator[list[Encoder]]:
        yield [encoder(name) for name in names]

    monkeypatch.setattr(evaluation, "fine_tune", Diverging(data))
    monkeypatch.setattr(command, "prepared", models)
    monkeypatch.setattr(command, "read_task", lambda task, _: replace(data, task=task))
    output = tmp_path / "o"
    with pytest.raises(TaskError) as raised:
        command.evaluate(["first", "broken", "last"], request(data, output))
    reason = "broken diverges at every learning rate (1e-05, 2e-05, 3e-05); try lower ones with --learning-rates"
    assert str(raised.value) == f"2 rows missing: sst2: {reason}; cola: {reason}"
    for task in ("sst2", "cola"):
        found = results(output, task)
        assert list(found["rows"]) == ["majority", "bag of words", "first", "last"]
        assert list(found["failed"]) == ["broken"]
        assert len(found["differences"]["accuracy"]) == 6
    text = (output / "results.md").read_text(encoding="utf-8")
    assert text.count("broken: no row: ") == 2


def test_a_stored_run_that_vanishes(data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the other processes work: a failure that names it, instead of an endless repetition or a KeyError."""
    stand_in = StandIn(data)
    monkeypatch.setattr(evaluation, "fine_tune", stand_in)
    evaluator = Evaluator(RunStore(tmp_path / "o"), data, PROTOCOL)
    model = encoder()

    class Pool:
        """Computes at once; the first run of the selection is deleted after each."""

        def __init__(self) -> None:
            self.idle = deque([0])

        def submit(self, job: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(evaluator.run(model, job.run))
            for path in (tmp_path / "o" / "runs" / "sst2").glob("model-selection-1e-05-seed0*"):
                path.unlink()
            return future

        def release(self, future: Future[Any]) -> None:
            pass

    schedule = jobs._Schedule([evaluator], [model], jobs.Progress([evaluator], 1))
    failures = schedule.work(Pool())  # type: ignore[arg-type]
    assert failures == {
        ("sst2", "model"): [f"sst2: model-selection-1e-05-seed0: its file is gone from {tmp_path / 'o'}"]
    }
    assert len(stand_in.calls) == 6
    # Between two looks at it.
    evaluator.encoder(model)
    stored, looks = evaluator._stored, []

    def vanishing(of: Encoder, run: Any) -> Any:
        looks.append(run)
        return stored(of, run) if looks.count(run) == 1 else None

    monkeypatch.setattr(evaluator, "_stored", vanishing)
    assert all(run.purpose == "final" for run in evaluator.missing(model))


def test_report(data: TaskData, run: Evaluated) -> None:
    _, rows = run(StandIn(data), models=("model", "other"))
    report = task_report(data, rows)
    truth = np.array([int(label) for label in data.dev["dev"].labels])
    scores = [np.mean(truth == r["predictions"]["dev"]) for r in rows[2].runs]
    entry = report["rows"]["model"]["scores"]["accuracy"]
    assert entry["runs"] == pytest.approx(scores)
    assert (entry["mean"], entry["std"]) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    assert report["rows"]["majority"]["scores"]["accuracy"]["mean"] == pytest.approx(0.6)
    assert report["data"] == {
        **{"train": 300, "dev": 60, "skipped_rows": 0, "empty_texts": 0},
        "train_by_label": {"0": 120, "1": 180},
    }
    text = tables("sst2", report)
    # Equal models apart from their errors: the difference is printed as noise, that from the majority is not.
    assert next(line for line in text.splitlines() if "model − other" in line).endswith("within noise")
    assert next(line for line in text.splitlines() if "majority − model" in line).endswith("beyond noise")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({len(line) for line in table}) == 1


@pytest.mark.parametrize("name", ["majority", "bag of words", "words, χ²"])
def test_a_model_with_the_name_of_another_row(data: TaskData, name: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=f"MODEL {name}: is the name of a row without a model; write ./{name}"):
        command.evaluate([name], request(data, tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_names_of_models_do_not_break_the_table() -> None:
    header, rule, row = report.aligned([["row", "accuracy"], ["runs/a|b", "70.0"]])
    assert row == r"| runs/a\|b |     70.0 |"
    assert len(header) == len(rule) == len(row)
