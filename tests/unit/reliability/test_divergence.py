"""Divergence guard and rollbacks: skipped batches, skipped updates, state in checkpoints."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards import Corpus
from maskvr_ds.config.reliability import DivergenceConfig
from maskvr_ds.data.loader import Loader
from maskvr_ds.engine.deepspeed_patches import gate_optimizer_step
from maskvr_ds.reliability.divergence import DivergedError, Guard
from maskvr_ds.run_folder.checkpoints import intact, write_manifest
from maskvr_ds.run_folder.layout import METRICS, ROLLBACKS
from maskvr_ds.telemetry.metrics import MetricsLog
from maskvr_ds.telemetry.metrics_file import append_event, read_events, read_lines
from maskvr_ds.training.rollback import (
    _restore_newest,
    batches,
    may_return,
    merge,
    position,
    read_rollbacks,
    windows_of,
    write_rollbacks,
)
from tests.support.corpora import make_corpus
from tests.unit.checkpoint.test_checkpoint import STATE, write

WINDOWS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)).map(lambda w: (w[0], w[0] + w[1])), max_size=6)


@given(WINDOWS, st.integers(0, 40))
def test_position_counts_batches_outside_windows(windows: list[tuple[int, int]], trained: int) -> None:
    kept = (n for n in itertools.count() if not any(first <= n < end for first, end in windows))
    assert position(trained, windows) == next(itertools.islice(kept, trained, None))


@given(WINDOWS)
def test_merged_windows_are_equivalent_and_disjoint(windows: list[tuple[int, int]]) -> None:
    merged = merge(windows)
    assert {n for w in merged for n in range(*w)} == {n for w in windows for n in range(*w)}
    assert all(end < first for (_, end), (first, _) in itertools.pairwise(merged))


def test_batches_skip_the_windows(tmp_path: Path) -> None:
    corpus = Corpus(make_corpus(tmp_path / "corpus", rows=40, length=8))
    loader = Loader(corpus, seed=3, global_size=4)
    plain = [batch.sample_ids.tolist() for batch in itertools.islice(loader.batches(), 20)]
    windows = [(2, 4), (9, 10), (4, 5), (13, 14)]
    kept = [0, 1, 5, 6, 7, 8, 10, 11, 12, 14, 15, 16]
    for trained in range(8):
        reader = batches(loader, trained, windows)
        found = list(itertools.islice(reader, 5))
        reader.close()
        assert [number for number, _ in found] == kept[trained : trained + 5]
        assert [batch.sample_ids.tolist() for _, batch in found] == [plain[n] for n in kept[trained : trained + 5]]


class Optimizer:
    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


def make_guard(restored: dict[str, Any] | None = None, **settings: Any) -> tuple[Guard, Any]:
    """A guard and an engine whose optimizer counts its steps, as at ZeRO 1."""
    optimizer = Optimizer()
    engine = SimpleNamespace(basic_optimizer=optimizer, optimizer=SimpleNamespace(_global_grad_norm=0.0))
    guard = Guard(DivergenceConfig(**settings), restored or {})
    gate_optimizer_step(engine, guard.allow_update)
    return guard, engine


def one_step(
    made: tuple[Guard, Any], step: int, loss: float, norm: float, scale: float | None = None
) -> dict[str, str]:
    guard, engine = made
    guard.before_update(torch.tensor(loss, dtype=torch.float64), None)
    engine.optimizer._global_grad_norm = norm
    for _ in range(2):  # one call per parameter group
        engine.basic_optimizer.step()
    line = guard.after_update(step, step + 100, norm, loss_scale=scale)
    guard.check(step, is_last=False)
    return line


def test_loss_is_judged_if_deepspeed_skips_the_update() -> None:
    guard, _ = make_guard()
    for loss, line in ((2.0, {}), (math.nan, {"update_left_out": "loss is nan"}), (2.0, {})):
        guard.before_update(torch.tensor(loss, dtype=torch.float64), None)
        assert guard.after_update(1, 1, math.inf, loss_scale=2.0) == line


def test_bad_steps_skip_the_update() -> None:
    made = make_guard(history=10, max_skipped=9, loss_factor=2, norm_factor=5)
    for step in range(4):
        assert one_step(made, step, 3.0 + step / 10, 1.0) == {}
    assert made[1].basic_optimizer.steps == 8
    for loss, norm, reason in (
        (math.nan, 1.0, "loss is nan"),
        (3.0, math.inf, "grad_norm is inf"),
        (7.0, 1.0, "loss is 7, more than 2 times the median 3.15"),
        (3.0, 5.1, "grad_norm is 5.1, more than 5 times the median 1"),
    ):
        assert one_step(made, 5, loss, norm) == {"update_left_out": reason}
        assert made[0].update_skipped
    assert made[1].basic_optimizer.steps == 8
    assert one_step(made, 6, 6.2, 4.9) == {}
    assert made[1].basic_optimizer.steps == 10


def test_median_needs_a_fifth_of_the_history() -> None:
    made = make_guard(history=10)
    assert one_step(made, 0, 3.0, 1.0) == {}
    assert one_step(made, 1, 30.0, 1000.0) == {}, "too few steps to judge"


def test_an_outlier_that_was_accepted_does_not_hide_the_next() -> None:
    """It would raise the mean: here to 27.2, of the norms to 25."""
    made = make_guard(history=25, loss_factor=2, norm_factor=5)
    for step, (loss, norm) in enumerate([(100.0, 97.0), (3.0, 1.0), (3.0, 1.0), (3.0, 1.0), (3.0, 1.0)]):
        assert one_step(made, step, loss, norm) == {}
    assert one_step(made, 5, 7.0, 1.0) == {"update_left_out": "loss is 7, more than 2 times the median 3"}
    assert one_step(made, 6, 3.0, 6.0) == {"update_left_out": "grad_norm is 6, more than 5 times the median 1"}


@pytest.mark.parametrize(("second", "rolls_back"), [(12, True), (13, False)])
def test_skipped_updates_count_for_history_steps(second: int, rolls_back: bool) -> None:
    """With history 10, steps 3 to 12 are the last ten at step 12, 4 to 13 at step 13."""
    made = make_guard(history=10, max_skipped=1)
    for step in range(second):
        assert bool(one_step(made, step, math.nan if step == 3 else 3.0, 1.0)) == (step == 3)
    if rolls_back:
        with pytest.raises(DivergedError):
            one_step(made, second, math.nan, 1.0)
    else:
        assert one_step(made, second, math.nan, 1.0)


def test_fp16_overflow_is_not_judged() -> None:
    made = make_guard(max_skipped=0)
    assert one_step(made, 0, 3.0, math.inf, scale=65536.0) == {}
    with pytest.raises(DivergedError, match="step 1: loss is nan"):
        one_step(made, 1, math.nan, math.inf, scale=65536.0)


def test_too_many_skipped_updates_roll_back() -> None:
    made = make_guard(history=10, max_skipped=2, margin=1)
    for step in range(3):
        one_step(made, step, 3.0, 1.0)
    for step in (3, 20, 22):
        assert one_step(made, step, math.nan, 1.0)
    # The state survives a checkpoint in between.
    carried = json.loads(json.dumps(made[0].state()))
    again = make_guard(carried, history=10, max_skipped=2, margin=1)
    for guard in (made, again):
        with pytest.raises(DivergedError) as caught:
            one_step(guard, 24, math.nan, 1.0)
        assert caught.value.windows == [(119, 122), (121, 124), (123, 126)], "step 3 is no longer in the history"
    again[0].clear_skipped()
    assert one_step(again, 25, math.nan, 1.0)


def test_disabled_guard_does_nothing() -> None:
    made = make_guard(enabled=False, max_skipped=0)
    assert one_step(made, 0, math.nan, math.nan) == {}
    assert made[1].basic_optimizer.steps == 2


def test_rollbacks_are_read_from_the_run_or_the_checkpoint(tmp_path: Path) -> None:
    entry = {"phase": 1, "step": 9, "to_step": 4, "passed_over": [[5, 7]], "event": "rollback"}
    assert read_rollbacks(tmp_path, {}) == []
    assert read_rollbacks(tmp_path, {"rollbacks": [entry]}) == [entry]
    write_rollbacks(tmp_path, [entry, {**entry, "phase": 0}])
    assert len(read_rollbacks(tmp_path, {"rollbacks": [entry]})) == 2
    assert windows_of(read_rollbacks(tmp_path, {}), 1) == [(5, 7)]


def test_events_in_metrics_are_not_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from maskvr_ds.config import MonitorConfig

    # DeepSpeed's MonitorMaster asks for the rank.
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda *_: 0)

    path = tmp_path / METRICS
    lines = [{"step": n, "loss": 1.0} for n in (1, 2, 3, 4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    append_event(path, {"event": "checkpoint", "step": 4})
    rollback = {"event": "rollback", "step": 9, "to_step": 2, "passed_over": []}
    for resume in (4, 4, 2):
        log = MetricsLog(
            tmp_path,
            rank=0,
            resume_step=resume,
            resume_tokens=0,
            total_steps=9,
            monitor=MonitorConfig(tensorboard=False),
            rollbacks=[rollback],
        )
        log.close()
        assert [line["step"] for line in read_lines(path)] == list(range(1, resume + 1))
        assert [event["event"] for event in read_events(path)] == ["rollback", "checkpoint"][: 2 if resume == 4 else 1]
        assert json.loads(path.read_text().splitlines()[2]) == rollback, "behind step 2"


@pytest.mark.parametrize("damage", ["", "[", "{}", "[1]", '[{"phase": 1}]', "[" * 100_000])
def test_damaged_rollbacks_are_recovered(tmp_path: Path, damage: str) -> None:
    """From the events in metrics.jsonl, or from the checkpoint if that knows more; what was there is kept."""
    entries = [
        {"event": "rollback", "phase": 0, "step": 9, "to_step": step, "reason": "r", "passed_over": [[step, step + 2]]}
        for step in (4, 6, 8)
    ]
    path = tmp_path / ROLLBACKS
    for logged, known, expected in ((3, 0, 3), (1, 2, 2), (0, 0, 0)):
        path.write_text(damage)
        (tmp_path / METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in entries[:logged]))
        assert read_rollbacks(tmp_path, {"rollbacks": entries[:known]}) == entries[:expected]
        assert json.loads(path.read_text()) == entries[:expected]
        (kept,) = tmp_path.glob("damaged-rollbacks.json.*")
        assert kept.read_text() == damage
        kept.unlink()


def test_rollbacks_go_further_back_once_those_to_the_newest_did_not_help() -> None:
    tried: list[int] = []
    while (step := next((s for s in (12, 8, 4) if may_return(s, tried, 3)), None)) is not None:
        tried.append(step)
    assert tried == [12, 12, 12, 8, 4]
    assert may_return(500, tried, 3), "a later checkpoint is another matter"
    assert not may_return(12, [], 0)


def test_what_is_not_finite_after_a_good_update_rolls_back_or_ends_the_run() -> None:
    guard, _ = make_guard(margin=1)
    with pytest.raises(DivergedError) as caught:
        guard.not_finite(8, 20, "not finite: weights")
    assert (caught.value.step, caught.value.reason, caught.value.windows) == (8, "not finite: weights", [(19, 22)])
    guard, _ = make_guard(enabled=False)
    with pytest.raises(FloatingPointError, match=r"step 8: not finite: weights; not saved\. Resume from the last"):
        guard.not_finite(8, 20, "not finite: weights")


def test_rollbacks_that_did_not_help_cost_no_checkpoint(tmp_path: Path) -> None:
    """With a lower learning rate the run resumes from the newest one again."""
    rollbacks = [{"to_step": step} for step in (2, 12, 12, 12, 8, 4)]
    for step in (4, 8, 12):
        folder = write(tmp_path, step, complete=False)
        write_manifest(folder, vars(replace(STATE, step=step, guard={"rollbacks": rollbacks[:1]})))
    (tmp_path / ROLLBACKS).write_text(json.dumps(rollbacks))
    assert [c.state.step for c in intact(tmp_path)] == [4]
    assert _restore_newest(tmp_path, rollbacks, 4, ()) == 12
    assert json.loads((tmp_path / ROLLBACKS).read_text()) == rollbacks[:4]
    assert [c.state.step for c in intact(tmp_path)] == [12, 8, 4]
    (folder / "optimizer.pt").write_bytes(b"")
    assert _restore_newest(tmp_path, rollbacks, 4, ()) == 8, "the newest that is intact"
    assert json.loads((tmp_path / ROLLBACKS).read_text()) == rollbacks[:5]
    assert _restore_newest(tmp_path, rollbacks, 8, ()) == 8
