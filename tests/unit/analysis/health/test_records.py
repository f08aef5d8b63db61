"""Findings over made-up records: each fault has its finding and no other, healthy runs have none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskvr_ds.analysis.health.checks import CHECKS
from maskvr_ds.analysis.health.picture import draw
from maskvr_ds.analysis.health.records import judge, read_records
from maskvr_ds.analysis.health.report import compare, content, finite, table
from maskvr_ds.run_folder.layout import METRICS, TRUST_RATIOS
from tests.support.documents import ROOT
from tests.unit.analysis.health.runs import Line, healthy, write_run

Change = Callable[[list[Line]], None]


def found(run: Path) -> dict[str, str]:
    """Check -> text of the findings."""
    return {f.check: f.text for f in judge(read_records(run)) if f.status == "finding"}


@pytest.mark.parametrize("seed", range(20))
def test_healthy_runs_have_no_findings(tmp_path: Path, seed: int) -> None:
    run = write_run(tmp_path / "run", healthy(600 + 100 * seed, seed, noise=[0.02, 0.3][seed % 2]))
    assert found(run) == {}


def test_every_check_of_records_is_judged(tmp_path: Path) -> None:
    names = [finding.check for finding in judge(read_records(write_run(tmp_path / "run", healthy())))]
    assert names == list(CHECKS)[: len(names)]
    assert len(names) == 12


def at(first: int, last: int, **changes: Callable[[float], Any]) -> Change:
    """Change values of the steps first … last."""

    def change(lines: list[Line]) -> None:
        for line in lines[first - 1 : last]:
            line.update({key: function(line[key]) for key, function in changes.items()})

    return change


FAULTS: dict[str, tuple[str, str, Change]] = {
    "nan": ("loss is finite", "step 300", at(300, 300, loss=lambda _: None)),
    "start": ("loss at the start", "12.5", at(1, 3, loss=lambda _: 12.5)),
    "spike": ("loss spikes", "step 401", at(401, 403, loss=lambda loss: loss + 2.0)),
    "one spike": ("loss spikes", "step 500", at(500, 500, loss=lambda loss: loss + 1.0)),
    "rise": ("loss level", "at the end", lambda lines: rise(lines, 0.6)),
    "plateau": ("context is used", "6.5", at(1, 600, loss=lambda loss: max(loss, 6.6))),
    "growth": ("gradient norm trend", "grows", lambda lines: growth(lines, 100)),
    "vanishing": ("gradient norm trend", "vanishes", at(100, 600, grad_norm=lambda _: 1e-6)),
    "norm spike": ("gradient norm spikes", "step 450", at(450, 450, grad_norm=lambda norm: 50 * norm)),
    "large rate": ("relative step size", "0.3", at(1, 600, lr=lambda lr: 30 * lr)),
    "dip": (
        "throughput dips",
        "steps 200–259",
        at(200, 259, tokens_per_second=lambda r: r / 3, step_seconds=lambda s: 3 * s),
    ),
}


def rise(lines: list[Line], by: float) -> None:
    """The loss rises slowly from step 300."""
    for number, line in enumerate(lines[300:]):
        line["loss"] += 3 * by * number / 300


def growth(lines: list[Line], factor: float) -> None:
    for number, line in enumerate(lines[300:]):
        line["grad_norm"] *= factor ** (number / 300)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(tmp_path: Path, name: str) -> None:
    check, text, change = FAULTS[name]
    lines = healthy()
    change(lines)
    for line in lines:
        if "held_out_loss" in line and line["loss"] is not None:
            line["held_out_loss"] = line["loss"]
    findings = found(write_run(tmp_path / "run", lines))
    assert list(findings) == [check]
    assert text in findings[check]


def test_context_is_judged_behind_mask_tokens(tmp_path: Path) -> None:
    """A loss below the entropy over all predictions may be copying of the tokens that are left as they are."""
    lines = healthy()
    for line in lines:
        if "held_out_loss" in line:
            line |= {"held_out_loss": 6.3, "held_out_loss_mask": 6.48}
    text = found(write_run(tmp_path / "run", lines))["context is used"]
    assert "held-out 6.480 nats behind [MASK]" in text
    assert "unigram entropy 6.500; should be at least 0.05 below it" in text


def test_a_spike_that_does_not_recover(tmp_path: Path) -> None:
    lines = healthy()
    at(400, 600, loss=lambda loss: loss + 2.0)(lines)
    findings = found(write_run(tmp_path / "run", lines))
    assert "not recovered" in findings["loss spikes"]
    assert "loss level" in findings


def test_a_phase_may_change_the_level(tmp_path: Path) -> None:
    lines = healthy()
    for line in lines:
        line["phase"] = "short" if line["step"] <= 300 else "long"
        if line["step"] > 300:
            line |= {"loss": line["loss"] + 3, "grad_norm": 30 * line["grad_norm"], "tokens_per_second": 100.0}
    assert found(write_run(tmp_path / "run", lines)) == {}


def test_updates_held_back(tmp_path: Path) -> None:
    lines = healthy()
    for step in (100, 250):  # 0.3%
        lines[step - 1]["update_left_out"] = "loss is 20, more than 2 times the median 5"
    assert found(write_run(tmp_path / "few", lines)) == {}
    for step in range(300, 310):
        lines[step - 1]["update_left_out"] = "loss is 20, more than 2 times the median 5"
    assert "12 of 600 updates skipped" in found(write_run(tmp_path / "many", lines))["updates held back"]


def test_rollbacks_and_the_end(tmp_path: Path) -> None:
    events: list[Line] = [
        {"event": "rollback", "step": 420, "to_step": 400, "reason": "loss is nan"},
        {"event": "diverged", "step": 430},
    ]
    text = found(write_run(tmp_path / "run", healthy(), events))["updates held back"]
    assert "1 rollback (from step 420)" in text
    assert "ended by divergence at step 430" in text


def fp16(lines: list[Line], overflows: list[int], scale: float = 65536.0) -> list[Line]:
    count = 0
    for line in lines:
        if line["step"] in overflows:
            count, scale = count + 1, max(1.0, scale / 2)
        line |= {"loss_scale": scale, "skipped_updates": count}
    return lines


@pytest.mark.parametrize(
    ("overflows", "finding"),
    [
        ([1, 2, 3, 4, 350], False),  # the scale is found, and tried again
        (list(range(300, 330)), True),
        (list(range(200, 600, 20)), True),
    ],
)
def test_fp16(tmp_path: Path, overflows: list[int], finding: bool) -> None:
    findings = found(write_run(tmp_path / "run", fp16(healthy(), overflows)))
    assert set(findings) == ({"fp16 loss scale"} if finding else set())


def test_recorded_overflows() -> None:
    """Of a run whose loss scale was doubled every ten steps: nothing else is wrong with it."""
    records = read_records(ROOT / "tests/data/fp16_overflows")
    assert records.config is not None
    findings = {f.check: f for f in judge(records) if f.status == "finding"}
    assert set(findings) == {"fp16 loss scale"}
    assert findings["fp16 loss scale"].steps[0] == 103
    assert findings["fp16 loss scale"].values["share"] == pytest.approx(10 / 120)


def write_ratios(run: Path, ratios: dict[str, float]) -> None:
    lines = [{"step": step, "samples": step, "trust_ratios": ratios} for step in (100, 200, 400, 600)]
    (run / TRUST_RATIOS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_trust_ratios_at_a_bound(tmp_path: Path) -> None:
    bounded = {"optimizer": {"variant": "deepspeed"}}
    run = write_run(tmp_path / "run", healthy(), **bounded)
    write_ratios(run, {"a": 0.01, "b": 0.3, "c": 10.0, "bias": 1.0})
    text = found(run)["trust ratios at a bound"]
    assert "67% of ratios at 0.01 or 10" in text
    assert "(a, c)" in text
    write_ratios(run, dict.fromkeys("abcdefghijklmnop", 0.3) | {"q": 0.01})
    assert found(run) == {}


def test_trust_ratios_at_a_bound_without_a_list_by_tensor(tmp_path: Path) -> None:
    lines = healthy()
    at(1, 600, trust_ratio_median=lambda _: 0.01)(lines)
    run = write_run(tmp_path / "run", lines, optimizer={"variant": "deepspeed"})
    assert "in 100% of the steps" in found(run)["trust ratios at a bound"]


def test_what_is_not_recorded_is_not_judged(tmp_path: Path) -> None:
    lines = [{"step": line["step"], "loss": line["loss"]} for line in healthy(5)]
    run = write_run(tmp_path / "run", lines, launched=False)
    (run / "config.yaml").write_text("[", encoding="utf-8")
    findings = judge(read_records(run))
    assert {f.check for f in findings if f.status == "ok"} == {"loss is finite", "updates held back"}
    assert all(f.text for f in findings)


def test_the_table_has_the_advice(tmp_path: Path) -> None:
    lines = healthy()
    FAULTS["growth"][2](lines)
    records = read_records(write_run(tmp_path / "run", lines))
    text = table(judge(records))
    assert "FINDING" in text
    assert "try: growth precedes divergence" in text
    assert text.endswith("1 finding in 11 checks: gradient norm trend")
    json.dumps(finite(content(records.folder, judge(records))), allow_nan=False)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    lines = fp16(healthy(), [3])
    FAULTS["spike"][2](lines)
    records = read_records(write_run(tmp_path / "run", lines))
    draw(records, judge(records), tmp_path / "health.png")
    assert (tmp_path / "health.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_differ_are_compared_in_what_compares(tmp_path: Path) -> None:
    a = read_records(write_run(tmp_path / "a", healthy()))
    b = read_records(write_run(tmp_path / "b", healthy(300), model={"hidden_size": 64, "num_attention_heads": 2}))
    c = read_records(write_run(tmp_path / "c", healthy(300), tokenizer="b" * 64))
    _, same = compare([a, a])
    assert same["not_compared"] == {}
    text, of_size = compare([a, b])
    assert "not compared: the model differs" in text
    assert of_size["not_compared"].keys() == {"median gradient norm", "median trust ratio", "tokens per second"}
    assert of_size["compared"]["steps"] == [600, 300]
    _, of_tokenizer = compare([a, c])
    assert "last held-out loss" in of_tokenizer["not_compared"]
    assert "tokens per second" in of_tokenizer["compared"]
    other = [{**x, "held_out_unigram_entropy": 6.4} if "held_out_loss" in x else x for x in healthy()]
    text, of_text = compare([a, read_records(write_run(tmp_path / "d", other))])
    assert set(of_text["not_compared"]) == {"last held-out loss", "lowest held-out loss"}
    assert "not compared: the held-out text differs" in text
    assert "e+0" not in text, "speeds are not powers of ten"


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        read_records(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"contains no metrics\.jsonl"):
        read_records(tmp_path)
    (tmp_path / METRICS).write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="has no step yet"):
        read_records(tmp_path)
