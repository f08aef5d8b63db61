"""Tables of an evaluation on episodes: means with 95% intervals, and differences paired by episode."""

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from maskvr_ds.downstream.report import aligned
from maskvr_ds.downstream.store import RESULTS, TABLES, Content, RunStore
from maskvr_ds.runtime.files import atomic_write

# Half of a 95% interval of a mean, in standard errors.
_STANDARD_ERRORS = 1.96


def mean_and_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Mean over episodes and half of its 95% interval: float64 [E]."""
    return float(values.mean()), float(_STANDARD_ERRORS * values.std(ddof=1) / np.sqrt(len(values)))


def report(rows: Mapping[str, Sequence[Content]]) -> Content:
    """Accuracy of each row, and first − second of all pairs. Of a row with several seeds, an episode counts with its
    mean over them."""
    accuracies = {name: np.array([run["accuracies"] for run in runs]) for name, runs in rows.items()}  # [seeds, E]
    found: Content = {"rows": {}, "differences": []}
    for name, values in accuracies.items():
        mean, half = mean_and_interval(values.mean(0))
        of_seeds = values.mean(1).tolist()
        found["rows"][name] = {
            "accuracy": mean,
            "interval": half,
            "seeds": of_seeds,
            "std_over_seeds": statistics.stdev(of_seeds) if len(of_seeds) > 1 else None,
            "validation": [run["validation"] for run in rows[name] if "validation" in run],
        }
    for first, second in combinations(accuracies, 2):
        mean, half = mean_and_interval(accuracies[first].mean(0) - accuracies[second].mean(0))
        found["differences"].append(
            {
                "first": first,
                "second": second,
                "difference": mean,
                "low": mean - half,
                "high": mean + half,
                "within_noise": abs(mean) <= half,
            }
        )
    return found


def tables(settings: Content, data: Content, reports: Mapping[int, Content]) -> str:
    """Markdown: a table and the differences for each number of shots."""
    sizes = ", ".join(f"{len(names)} {part}" for part, names in data["classes"].items())
    lines = [
        f"Classes: {sizes}. {settings['episodes']:,} episodes, the same for all rows, with {settings['queries']} "
        "queries per class. Accuracy × 100, 95% interval over episodes.",
        "",
    ]
    for shots, found in reports.items():
        lines += [f"### {settings['ways']}-way, {shots} shot{'s' * (shots > 1)}", ""]
        body = [["row", "seeds", "accuracy", "std over seeds", "episodes trained on"]]
        for name, row in found["rows"].items():
            spread = "–" if row["std_over_seeds"] is None else f"{100 * row['std_over_seeds']:.1f}"
            body.append(
                [
                    name,
                    str(len(row["seeds"])),
                    f"{100 * row['accuracy']:.1f} ± {100 * row['interval']:.1f}",
                    spread,
                    ", ".join(str(_chosen(run)) for run in row["validation"]) or "–",
                ]
            )
        lines += [*aligned(body), "", "Differences, paired by episode, 95% interval:", ""]
        for entry in found["differences"]:
            if not _comparable(entry["first"], entry["second"]):
                continue
            verdict = "within noise" if entry["within_noise"] else "beyond noise"
            lines.append(
                f"- {entry['first']} − {entry['second']} = {100 * entry['difference']:+.1f} "
                f"[{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}], {verdict}"
            )
        lines.append("")
    return "\n".join(lines)


def _comparable(first: str, second: str) -> bool:
    """Whether two rows differ in the model or in the method alone; results.json has all differences."""
    (model, _, method), (other_model, _, other_method) = first.rpartition(": "), second.rpartition(": ")
    return not model or not other_model or model == other_model or method == other_method


def _chosen(validation: Sequence[Content]) -> int:
    """Number of training episodes of the weights that were used: the first with the highest validation accuracy."""
    best: Content = max(validation, key=lambda point: point["accuracy"])
    return int(best["episodes"])


def write(
    store: RunStore, settings: Content, data: Content, rows: Mapping[int, Mapping[str, Sequence[Content]]]
) -> str:
    """Write results.json and results.md; returns the tables."""
    reports = {shots: report(found) for shots, found in rows.items()}
    text = tables(settings, data, reports)
    content = {"settings": settings, "data": data, "shots": {str(shots): found for shots, found in reports.items()}}
    atomic_write(store.folder / RESULTS, json.dumps(content, indent=1, allow_nan=False) + "\n")
    atomic_write(store.folder / TABLES, text)
    return text
