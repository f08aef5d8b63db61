"""Findings as a table, and two runs side by side. Loads no torch."""

import math
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskvr_ds.analysis.health.checks import CHECKS, Finding
from maskvr_ds.analysis.health.records import Records, column

_MARK = {"ok": "ok", "finding": "FINDING", "not judged": "–"}
_NARROW, _WIDE = 80, 160


def table(findings: Sequence[Finding]) -> str:
    """One line per check; below a finding what to try."""
    width = max(_NARROW, min(_WIDE, shutil.get_terminal_size().columns))
    label = max(len(finding.check) for finding in findings) + 2
    lines = []
    for finding in findings:
        head = f"{finding.check:{label}}{_MARK[finding.status]:9}"
        lines += _wrapped(head, finding.text, label + 9, width)
        if finding.status == "finding":
            lines += _wrapped(" " * (label + 9), f"try: {CHECKS[finding.check].advice}", label + 14, width)
    return "\n".join([*lines, "", verdict(findings)])


def _wrapped(head: str, text: str, indent: int, width: int) -> list[str]:
    return textwrap.wrap(
        head + text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence."""
    found = [finding.check for finding in findings if finding.status == "finding"]
    judged = sum(finding.status != "not judged" for finding in findings)
    if not found:
        return f"ok: no findings in {judged} checks"
    return f"{len(found)} finding{'s' * (len(found) > 1)} in {judged} checks: {', '.join(found)}"


def content(folder: Path, findings: Sequence[Finding], **more: Any) -> dict[str, Any]:
    """For JSON."""
    return {"run": str(folder), **more, "findings": [finding.dump() for finding in findings]}


def compare(runs: Sequence[Records]) -> tuple[str, dict[str, Any]]:
    """Figures of two runs side by side, as text and for JSON; what does not compare, with the reason."""
    figures = [_figures(records) for records in runs]
    reasons = {name: reason for name, needs in _NEEDS.items() if (reason := _reason(runs, needs))}
    widths = [max(len(name) for name in _NEEDS) + 2, *(max(14, len(str(r.folder)) + 2) for r in runs)]
    lines = [
        "".join(f"{cell:<{w}}" for cell, w in zip(("", *(str(r.folder) for r in runs)), widths, strict=True)).rstrip()
    ]
    compared: dict[str, Any] = {}
    for name in _NEEDS:
        if name in reasons:
            lines.append(f"{name:<{widths[0]}}not compared: {reasons[name]}")
            continue
        values = [found.get(name) for found in figures]
        compared[name] = values
        cells = [_shown(value) for value in values]
        lines.append("".join(f"{cell:<{w}}" for cell, w in zip((name, *cells), widths, strict=True)).rstrip())
    return "\n".join(lines), {"compared": compared, "not_compared": reasons}


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    whole = value == 0 or abs(value) >= 10_000 or (abs(value) >= 10 and float(value).is_integer())
    return f"{value:,.0f}" if whole else f"{value:,.4g}"


_HELD_OUT = "held-out text"
# Figure -> what must be equal for it to compare.
_NEEDS: dict[str, tuple[str, ...]] = {
    "steps": (),
    "tokens": (),
    "updates skipped (share)": (),
    "last training loss": ("tokenizer", "masking"),
    "last held-out loss": ("tokenizer", _HELD_OUT),
    "lowest held-out loss": ("tokenizer", _HELD_OUT),
    "median gradient norm": ("tokenizer", "model"),
    "median trust ratio": ("model", "optimizer"),
    "tokens per second": ("model", "device", "sequence length"),
}


def _figures(records: Records) -> dict[str, float | None]:
    lines = records.lines
    tail = lines[-max(1, min(100, len(lines) // 10)) :]
    held_out = column([line for line in lines if line.get("held_out_loss") is not None], "held_out_loss")
    skipped = sum(bool(line.get("update_left_out")) for line in lines)
    return {
        "steps": lines[-1]["step"],
        "tokens": lines[-1].get("tokens"),
        "updates skipped (share)": skipped / len(lines),
        "last training loss": _median(column(tail, "loss")),
        "last held-out loss": float(held_out[-1]) if len(held_out) else None,
        "lowest held-out loss": float(held_out.min()) if len(held_out) else None,
        "median gradient norm": _median(column(lines, "grad_norm")),
        "median trust ratio": _median(column(lines, "trust_ratio_median")),
        "tokens per second": _median(column(lines[1:], "tokens_per_second")),
    }


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _reason(runs: Sequence[Records], needs: tuple[str, ...]) -> str | None:
    """Why a figure does not compare: something that must be equal differs, or is not recorded."""
    for need in needs:
        values = [_condition(records, need) for records in runs]
        if need == _HELD_OUT and None in values:
            continue  # of an earlier version, or without a held-out loss
        if None in values:
            return f"the {need} of {runs[values.index(None)].folder} is not recorded"
        if values[0] != values[1]:
            return f"the {need} differs"
    return None


def _condition(records: Records, need: str) -> Any:
    config, launch = records.config, records.launches[-1] if records.launches else None
    if need == _HELD_OUT:
        entropies = [x for line in records.lines if (x := line.get("held_out_unigram_entropy")) is not None]
        return round(entropies[-1], 6) if entropies else None
    corpus = launch["corpora"][0] if launch and launch["corpora"] else None
    if need == "tokenizer":
        return None if corpus is None else corpus["tokenizer_sha256"]
    if need == "sequence length":
        return None if corpus is None else corpus["sequence_length"]
    if need == "device":
        return None if launch is None else (launch["device"], launch["ranks"])
    if config is None:
        return None
    if need == "model":
        return config.model.identity()
    return config.masking.identity() if need == "masking" else config.optimizer.model_dump(exclude={"lr", "fused"})


def finite(value: Any) -> Any:
    """JSON has no NaN: non-finite numbers become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
