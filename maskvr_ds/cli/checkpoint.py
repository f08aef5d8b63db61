"""`maskvr checkpoint list | verify | inspect RUN`. Loads no torch."""

import argparse
import json
import sys
from pathlib import Path

from maskvr_ds.run_folder import checkpoints, layout

EXAMPLES = """examples:
  maskvr checkpoint list runs/mine
  maskvr checkpoint verify runs/mine        all of them; status 1 where one is damaged
  maskvr checkpoint verify runs/mine/checkpoints/step-00001000
  maskvr checkpoint inspect runs/mine       the newest one
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="list, verify or inspect the checkpoints of a run",
        description="List, verify or inspect the checkpoints of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["list", "verify", "inspect"])
    parser.add_argument("folder", metavar="RUN", help="a run's folder, or that of one checkpoint")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; a run's, or a checkpoint's, expected")
    commands = {"list": _list, "verify": _verify, "inspect": _inspect}
    return commands[arguments.what](folder)


def _checkpoints(folder: Path) -> list[Path]:
    """A checkpoint itself, or all of a run, also incomplete ones, oldest first."""
    if folder.name.startswith("step-"):
        return [folder]
    if not (found := checkpoints.checkpoints(folder)):
        raise checkpoints.CheckpointError(f"{folder}: no checkpoint there (nor in its {layout.CHECKPOINTS}/)")
    return found


def _list(folder: Path) -> int:
    print(f"{'checkpoint':<16}{'step':>10}{'samples':>16}{'bytes':>18}  ranks  ZeRO  precision")
    for path in _checkpoints(folder):
        try:
            state = checkpoints.read_state(path)
        except checkpoints.CheckpointError as error:
            print(f"{path.name:<16}  {error}")
            continue
        print(
            f"{path.name:<16}{state.step:>10,}{state.samples:>16,}{checkpoints.size(path):>18,}"
            f"{state.world_size:>7}{state.zero_stage:>6}  {state.dtype}"
        )
    return 0


def _verify(folder: Path) -> int:
    damaged = 0
    for path in _checkpoints(folder):
        found = checkpoints.faults(path)
        damaged += bool(found)
        print(f"{path.name}: {'damaged' if found else 'whole'}")
        for fault in found:
            print(f"  {fault}", file=sys.stderr)
    return 1 if damaged else 0


def _inspect(folder: Path) -> int:
    path = checkpoints.newest(folder)
    content = checkpoints.read_manifest(path)
    files = content.pop("files")
    content.pop("guard", None)
    print(path)
    print(json.dumps(content, indent=1))
    for name, entry in files.items():
        print(f"{entry['bytes']:>16,}  {entry['sha256'][:16]}  {name}")
    return 0


def add_export(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("export", help="write a checkpoint as a Hugging Face model")
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run (its newest one)")
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for model and tokenizer")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    from maskvr_ds.checkpoint.export import export

    difference = export(arguments.checkpoint, arguments.output)
    print(f"{arguments.output}: BertForMaskedLM and tokenizer; logits within {difference:.2g} of the engine's")
    return 0
