"""`maskvr health`."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.runtime.numbers import integer

if TYPE_CHECKING:
    from maskvr_ds.analysis.health.checks import Finding
    from maskvr_ds.analysis.health.records import Records

_DESCRIPTION = """\
Judge the health of a training. Every check says `ok`, what was found and what to try, or why it was
not judged. Thresholds and their sources: docs/how-to/judge-a-run.md.

  maskvr health RUN             from its records: loss spikes, trend of the gradient norm, trust
                                ratios at their bounds, updates held back, fp16 scale, throughput
  maskvr health A B             two runs, compared where they are comparable
  maskvr health RUN --at STEP   also at a checkpoint, on a few rows of its corpus: activations,
                                gradients and updates by layer, singular values, attention,
                                embeddings, sharpness, gradient noise scale
  maskvr health --at-init CONFIG
                                signal propagation at random weights, without training

The exit status is 0 whether or not there are findings."""
_EXAMPLES = """\
maskvr health runs/base
maskvr health runs/base --plot health.png --json > health.json
maskvr health runs/base --at newest --rows 16
maskvr health runs/base runs/lower_rate
maskvr health --at-init run.yaml --set model.initializer_range=0.05"""
_ROWS = 8


def add_health(commands: Commands) -> None:
    """Add `maskvr health`."""
    parser = add_command(
        commands, "health", "judge the health of a training", examples=_EXAMPLES, description=_DESCRIPTION
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder; two of them are compared")
    parser.add_argument(
        "--at", metavar="CHECKPOINT", help="also judge this checkpoint: its step, its folder, or `newest`"
    )
    parser.add_argument("--at-init", metavar="CONFIG", help="judge the random weights of a configuration or recipe")
    parser.add_argument(
        "--set", dest="assignments", action="append", default=[], metavar="KEY=VALUE", help="with --at-init: a setting"
    )
    parser.add_argument(
        "--data", metavar="DIR", help="with --at and --at-init: corpus for the rows (default: the configuration's)"
    )
    parser.add_argument(
        "--rows", type=integer(1, 4096), metavar="N", help=f"with --at and --at-init: rows (default: {_ROWS})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with figures, thresholds and their sources")
    parser.add_argument("--plot", metavar="FILE", help="also draw the records of one run as a PNG, findings marked")
    parser.set_defaults(run=_health)


def _health(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.at_init is not None:
        return _at_init(arguments)
    from maskvr_ds.analysis.health.records import judge, read_records
    from maskvr_ds.analysis.health.report import compare, content

    found = [(records := read_records(Path(run)), judge(records)) for run in arguments.runs]
    if arguments.at is not None:
        return _at(arguments, *found[0])
    result: dict[str, Any] = {"runs": [content(records.folder, findings) for records, findings in found]}
    comparison = ""
    if len(found) == 2:
        comparison, result["comparison"] = compare([records for records, _ in found])
    _print(arguments, found, result, comparison)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options that contradict each other or would be ignored."""
    runs, of_model = arguments.runs, arguments.at is not None or arguments.at_init is not None
    if arguments.at_init is not None and (runs or arguments.at is not None or arguments.plot):
        raise ValueError("--at-init judges a configuration, not a run: give no RUN, --at or --plot with it")
    if arguments.at_init is None and not runs:
        raise ValueError("no RUN given: name a run folder, or a configuration by --at-init")
    if len(runs) > 2:
        raise ValueError(f"{len(runs)} runs given: expected one, or two to compare")
    if len(runs) == 2 and (arguments.plot or arguments.at is not None):
        raise ValueError(f"{'--plot draws' if arguments.plot else '--at judges'} one run; give one RUN")
    for name in ("data", "rows"):
        if getattr(arguments, name) is not None and not of_model:
            raise ValueError(f"--{name} is an option of --at and --at-init, and records need no rows")
    if arguments.assignments and arguments.at_init is None:
        raise ValueError("--set is an option of --at-init; a run has its settings")


def _print(
    arguments: argparse.Namespace,
    found: "list[tuple[Records, list[Finding]]]",
    result: dict[str, Any],
    more: str,
) -> None:
    from maskvr_ds.analysis.health.report import finite, table

    if arguments.json:
        json.dump(finite(result), sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        for records, findings in found:
            print(f"{records.folder}: {len(records.lines):,} steps, to step {records.lines[-1]['step']:,}\n")
            print(table(findings) + "\n")
        if more:
            print(more)
    if arguments.plot:
        from maskvr_ds.analysis.health.picture import draw

        draw(*found[0], Path(arguments.plot))


def _at(arguments: argparse.Namespace, records: "Records", findings: "list[Finding]") -> int:
    from maskvr_ds.run_folder import checkpoints
    from maskvr_ds.runtime import distributed

    def run() -> None:
        from maskvr_ds.analysis.health.checkpoint import find_checkpoint, judge_checkpoint, measure_checkpoint
        from maskvr_ds.analysis.health.report import content, table

        folder = find_checkpoint(records.folder, arguments.at)
        step = checkpoints.read_state(folder).step
        rates = [line.get("lr") for line in records.lines if line["step"] == step]
        data = arguments.data
        if data is None and records.config is not None:
            data = records.config.phase(0).data.corpora[0].path
        if data is None:
            raise ValueError(f"{records.folder}: its configuration cannot be read; name a corpus by --data")
        measured = measure_checkpoint(folder, Path(data), rows=arguments.rows or _ROWS, lr=rates[0] if rates else None)
        judged = judge_checkpoint(measured)
        text = f"{folder}: step {step:,}, on {arguments.rows or _ROWS} rows of {data}\n\n{table(judged)}"
        result = {
            "runs": [content(records.folder, findings)],
            "checkpoint": content(folder, judged, step=step, measurements=measured.dump()),
        }
        _print(arguments, [(records, findings)], result, text)

    return distributed.run_as_rank(run)


def _at_init(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import load_config
    from maskvr_ds.runtime import distributed

    config = load_config(arguments.at_init, arguments.assignments).phase(0)

    def run() -> None:
        import numpy as np

        from data_pipeline.shards import Corpus
        from maskvr_ds.analysis.health.initialisation import measure_initialisations, table
        from maskvr_ds.analysis.health.report import finite
        from maskvr_ds.data.loader import read_rows, to_device
        from maskvr_ds.masking.masker import Masker
        from maskvr_ds.training.setup import encoder_config

        corpus = Corpus(Path(arguments.data or config.data.corpora[0].path))
        encoder = encoder_config(config.model, corpus, None)
        rows = np.arange(min(arguments.rows or _ROWS, corpus.rows))
        device = distributed.device()
        masker = Masker.for_corpus(corpus.manifest, seed=config.seed, device=device)
        masked = masker(to_device(read_rows(corpus, rows, np.zeros_like(rows)), device))
        found = measure_initialisations(encoder, masked, seed=config.seed, normalization=config.model.normalization)
        vocabulary = corpus.manifest.vocab_size
        if arguments.json:
            content = [{"name": r.name, **r.figures(), "findings": r.findings(vocabulary)} for r in found]
            json.dump(finite({"config": arguments.at_init, "rows": len(rows), "variants": content}), sys.stdout)
            print()
        else:
            print(f"{arguments.at_init}: {encoder.model_type}, random weights, {len(rows)} rows of {corpus.folder}\n")
            print(table(found, vocabulary))

    return distributed.run_as_rank(run)
