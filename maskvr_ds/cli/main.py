"""Parser and dispatch of the command `maskvr`.

Subcommands import torch and DeepSpeed only when they run, so that --help is fast.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial

from data_pipeline.console import CommandParser, run_into_pipe
from maskvr_ds.cli.analysis import add_compare, add_plot, add_variance
from maskvr_ds.cli.attention import add_attention
from maskvr_ds.cli.benchmark import add_benchmark, add_demo
from maskvr_ds.cli.checkpoint import add_checkpoint, add_export
from maskvr_ds.cli.configuration import add_config, add_recipes
from maskvr_ds.cli.downstream import add_evaluate, add_finetune
from maskvr_ds.cli.health import add_health
from maskvr_ds.cli.plan import add_plan
from maskvr_ds.cli.token_scores import add_token_scores
from maskvr_ds.cli.train import add_train

_COMMANDS = (
    *(add_demo, add_recipes, add_config, add_plan, add_train, add_checkpoint, add_export, add_finetune, add_evaluate),
    *(add_plot, add_health, add_attention, add_variance, add_compare, add_benchmark, add_token_scores),
)
# Optional package -> extra that installs it.
_EXTRAS = {
    **dict.fromkeys(("torch", "deepspeed", "transformers", "safetensors", "matplotlib", "psutil"), "train"),
    **dict.fromkeys(("accelerate", "sklearn", "scipy"), "evaluate"),
}
_EXAMPLES = """examples:
  maskvr demo --output demo_run
  maskvr train --config demo_cpu --num-gpus 2 --set data.path=corpus --set output_dir=runs/first
  maskvr export --checkpoint runs/first --output bert-first

`maskvr COMMAND --help` shows the options and examples of a command.
"""


def command_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands; the parsed arguments have `run`, the function that executes the subcommand."""
    parser = argparse.ArgumentParser(
        prog="maskvr",
        description="Variance-reduced pretraining of BERT-like encoders on DeepSpeed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandParser)
    for add in _COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Returns its exit status; 1 if it raised ValueError or OSError, 130 after Ctrl-C."""
    arguments = command_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run_into_pipe(partial(run, arguments))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        print(f"error: {error.name} is not installed; pip install 'maskvr_ds[{_EXTRAS[error.name]}]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        # Before training has started, or in a command that has nothing to save.
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
