"""Helpers shared by the subcommands: construction of parsers, argument types, defaults."""

import argparse

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


def visible_gpus() -> int:
    """Number of GPUs visible to this process; imports torch."""
    import torch

    return torch.cuda.device_count()
