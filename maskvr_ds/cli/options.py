"""Helpers shared by the subcommands: construction of parsers, argument types, defaults."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from maskvr_ds.runtime.numbers import MAX_STEPS, integer

if TYPE_CHECKING:
    from maskvr_ds.config import RunConfig

# More would only wait for each other, and take about half a GB each.
_RANKS_PER_CORE = 8
# The object that `add_subparsers` returns.
Commands = argparse._SubParsersAction


def add_command(
    commands: Commands, name: str, summary: str, *, examples: str, description: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand, with `examples` (one command per line) as the epilog of its help.

    summary: its line in `maskvr --help`. description: preformatted text of its own help, by default the summary.
    """
    indented = "".join(f"  {line}\n" for line in examples.splitlines())
    return commands.add_parser(
        name,
        help=summary,
        description=description or f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"examples:\n{indented}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_task_data_options(group: argparse._ArgumentGroup, prefix: str = "") -> None:
    """Options of labelled files and of the precision, which `maskvr compare` has under a prefix."""
    group.add_argument(
        f"--{prefix}max-train",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="train on a fixed random subset of N examples",
    )
    group.add_argument(f"--{prefix}precision", choices=["fp32", "bf16"], help="bf16: mixed precision (default: fp32)")
    group.add_argument(
        f"--{prefix}text-columns",
        nargs="+",
        metavar="NAME",
        help="columns of the text, or of two texts, in your own files (default: sentence, or text)",
    )
    group.add_argument(
        f"--{prefix}label-column", metavar="NAME", help="column of the label in your own files (default: label)"
    )


def visible_gpus() -> int:
    """Number of GPUs visible to this process; imports torch."""
    import torch

    return torch.cuda.device_count()


def check_ranks_here(ranks: int) -> None:
    """Raise ValueError if this machine cannot run this many ranks: one per GPU, or a few per CPU core without GPUs.

    Does not import torch. The GPUs are the device files of the NVIDIA driver; other GPUs are not counted.
    """
    gpus = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else len(list(Path("/dev").glob("nvidia[0-9]*")))
    if gpus and ranks > gpus:
        raise ValueError(
            f"--num-gpus {ranks}: this machine has {gpus} GPUs, and a rank needs one of its own; lower it, or use "
            "--hostfile for several machines"
        )
    cores = len(os.sched_getaffinity(0))
    if not gpus and ranks > _RANKS_PER_CORE * cores:
        raise ValueError(
            f"--num-gpus {ranks}: this process may use {cores} CPU cores and no GPU; at most {_RANKS_PER_CORE} "
            f"ranks per core, {_RANKS_PER_CORE * cores}"
        )


def check_start(config: "RunConfig", ranks: int, *, files: bool) -> None:
    """Raise ConfigError, one line per fault, for everything that would end the run later and is known now.

    files: also check corpora, tokenizers and the initial model, which a run that resumes may not need.
    """
    from maskvr_ds.config import ConfigError
    from maskvr_ds.training.references import file_faults, settings_faults

    faults = settings_faults(config, ranks)
    if files:
        faults += file_faults(config)[0]
    if faults:
        raise ConfigError("\n  ".join(faults))
