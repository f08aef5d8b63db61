"""`maskvr checkpoint list | verify | inspect`, which loads no torch, and `maskvr export`."""

import argparse
import json
import re
import sys
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.run_folder import checkpoints, layout
from maskvr_ds.telemetry.metrics_file import read_lines

_DESCRIPTION = """\
List, verify or inspect the checkpoints of a run.

  list     step, samples, size, ranks, ZeRO stage and precision of each checkpoint, and the
           held-out loss where its step was evaluated
  verify   compare all files with their SHA-256; exit status 1 if a checkpoint is damaged
  inspect  manifest and files of the newest checkpoint"""
_EXAMPLES = """\
maskvr checkpoint list runs/base
maskvr checkpoint verify runs/base/checkpoints/step-00001000"""


def add_checkpoint(commands: Commands) -> None:
    """Add `maskvr checkpoint`."""
    parser = add_command(
        commands,
        "checkpoint",
        "list, verify or inspect the checkpoints of a run",
        examples=_EXAMPLES,
        description=_DESCRIPTION,
    )
    parser.add_argument("what", choices=["list", "verify", "inspect"], help="see above")
    parser.add_argument("folder", metavar="RUN", help="run folder, or the folder of a single checkpoint")
    parser.set_defaults(run=_checkpoint)


def _checkpoint(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a run folder or a checkpoint folder")
    commands = {"list": _list, "verify": _verify, "inspect": _inspect}
    return commands[arguments.what](folder)


def _checkpoints(folder: Path) -> list[Path]:
    """`folder` if it is a checkpoint, else all checkpoints of the run, incomplete ones included, oldest first."""
    if folder.name.startswith("step-"):
        return [folder]
    if not (paths := checkpoints.checkpoints(folder)):
        raise checkpoints.CheckpointError(f"{folder}: contains no checkpoint (nor does its {layout.CHECKPOINTS}/)")
    return paths


def _list(folder: Path) -> int:
    print(f"{'checkpoint':<16}{'step':>10}{'samples':>16}{'bytes':>18}  ranks  ZeRO  precision  held-out loss")
    paths = _checkpoints(folder)
    evaluated = _held_out_losses(paths[0].resolve().parent)
    for path in paths:
        try:
            state = checkpoints.read_state(path)
        except checkpoints.CheckpointError as error:
            print(f"{path.name:<16}  {error}")
            continue
        # A checkpoint of checkpoint.keep_best has it also where metrics.jsonl is not beside it.
        loss = state.held_out.get("held_out_loss", evaluated.get(state.step))
        print(
            f"{path.name:<16}{state.step:>10,}{state.samples:>16,}{checkpoints.size(path):>18,}"
            f"{state.world_size:>7}{state.zero_stage:>6}  {state.dtype:<9}{'–' if loss is None else f'{loss:.4f}':>15}"
        )
    return 0


def _held_out_losses(folder: Path) -> dict[int, float]:
    """By step, as far as the run evaluated; nothing of checkpoints that were copied out of their run."""
    metrics = folder.parent / layout.METRICS
    if folder.name != layout.CHECKPOINTS or not metrics.is_file():
        return {}
    lines = read_lines(metrics)
    return {line["step"]: line["held_out_loss"] for line in lines if line.get("held_out_loss") is not None}


def _verify(folder: Path) -> int:
    damaged = 0
    for path in _checkpoints(folder):
        faults = checkpoints.faults(path)
        damaged += bool(faults)
        print(f"{path.name}: {'damaged' if faults else 'intact'}")
        for fault in faults:
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


_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_EXPORT_EXAMPLES = """\
maskvr export --checkpoint runs/base --output bert-base-mine
maskvr export --checkpoint runs/base/checkpoints/step-00001000 --output bert-1000 --license apache-2.0 --check
maskvr export --checkpoint runs/base --output bert-base-mine --scores scores
maskvr export --checkpoint runs/base --output bert-base-mine --license mit --push my-lab/bert-base-mine --private"""


def add_export(commands: Commands) -> None:
    """Add `maskvr export`."""
    parser = add_command(commands, "export", "export a checkpoint as a Hugging Face model", examples=_EXPORT_EXAMPLES)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="checkpoint folder, or run folder (its newest checkpoint)"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder for the model and the tokenizer")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="licence of the model, for its card: an identifier as hubs use them, such as apache-2.0, or other",
    )
    parser.add_argument(
        "--scores",
        metavar="DIR",
        help="output folder of `maskvr evaluate`, whose scores of this checkpoint are for the model's card",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="also run transformers' fill-mask on the export, and a text longer than the model",
    )
    parser.add_argument(
        "--push",
        metavar="NAME",
        help="also upload the export to a hub, as OWNER/NAME or under your own name; needs `hf auth login` or HF_TOKEN",
    )
    parser.add_argument(
        "--private", action="store_true", help="with --push: only you and your organization see a new model"
    )
    parser.set_defaults(run=_export)


def _check_license(text: str | None) -> None:
    if text is not None and not _LICENSE.fullmatch(text):
        raise ValueError(f"--license {text!r}: an identifier such as apache-2.0, mit or other expected")


def _export(arguments: argparse.Namespace) -> int:
    _check_license(arguments.license)
    if arguments.private and arguments.push is None:
        raise ValueError("--private is an option of --push NAME")
    from maskvr_ds.checkpoint.export import export

    name = None
    if arguments.push is not None:
        from maskvr_ds.checkpoint.push import check_push, push

        # Before the export: what is wrong with the name or the token shows at once.
        name = check_push(arguments.push, private=arguments.private)
    output = arguments.output
    given = {key: getattr(arguments, key) for key in ("license", "scores", "check")}
    exported = export(arguments.checkpoint, output, name=name, **given)
    for remark in exported.remarks:
        print(f"warning: {output}: {remark}", file=sys.stderr)
    logits = f"logits {f'within {exported.difference:.2g} of' if exported.difference else 'equal to'} the engine's"
    print(f"{output}: {exported.architecture} and tokenizer; {logits}")
    if exported.predictions is not None:
        print(f"fill-mask: {exported.predictions}")
    if name is not None:
        url, is_private = push(Path(output), name, private=arguments.private)
        print(f"uploaded as {name} ({'private' if is_private else 'public'}): {url}")
    return 0
