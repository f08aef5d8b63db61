"""`maskvr health`."""

import argparse
import json
import sys
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command

_DESCRIPTION = """\
Judge the health of a training from its records: loss spikes, trend of the gradient norm, trust
ratios at their bounds, updates held back, fp16 loss scale, throughput. Every check says `ok`, what
was found with the step and what to try, or why it was not judged. Thresholds and their sources:
docs/how-to/judge-a-run.md. Two runs are also compared, in what compares.

The exit status is 0 whether or not there are findings."""
_EXAMPLES = """\
maskvr health runs/base
maskvr health runs/base --plot health.png --json > health.json
maskvr health runs/base runs/lower_rate"""


def add_health(commands: Commands) -> None:
    """Add `maskvr health`."""
    parser = add_command(
        commands, "health", "judge the health of a training", examples=_EXAMPLES, description=_DESCRIPTION
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder; two of them are compared")
    parser.add_argument("--json", action="store_true", help="print JSON, with figures, thresholds and their sources")
    parser.add_argument("--plot", metavar="FILE", help="also draw the records of one run as a PNG, findings marked")
    parser.set_defaults(run=_health)


def _health(arguments: argparse.Namespace) -> int:
    from maskvr_ds.analysis.health.records import judge, read_records
    from maskvr_ds.analysis.health.report import compare, content, finite, table

    folders = [Path(run) for run in arguments.runs]
    if len(folders) > 2:
        raise ValueError(f"{len(folders)} runs given: expected one, or two to compare")
    if len(folders) == 2 and arguments.plot:
        raise ValueError("--plot draws one run; give one RUN")
    found = [(records := read_records(folder), judge(records)) for folder in folders]
    result: dict[str, object] = {"runs": [content(records.folder, findings) for records, findings in found]}
    if len(found) == 2:
        text, result["comparison"] = compare([records for records, _ in found])
    if arguments.json:
        json.dump(finite(result), sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        for records, findings in found:
            print(f"{records.folder}: {len(records.lines):,} steps, to step {records.lines[-1]['step']:,}\n")
            print(table(findings) + "\n")
        if len(found) == 2:
            print(text)
    if arguments.plot:
        from maskvr_ds.analysis.health.picture import draw

        draw(*found[0], Path(arguments.plot))
    return 0
