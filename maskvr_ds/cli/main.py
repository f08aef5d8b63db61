"""The command `maskvr`. Heavy imports wait for the command that needs them, so that --help is quick."""

import argparse
import sys
from collections.abc import Callable, Sequence

from maskvr_ds.cli import checkpoint
from maskvr_ds.cli.analysis import add_compare, add_plot, add_variance
from maskvr_ds.cli.benchmark import add_benchmark, add_demo
from maskvr_ds.cli.checkpoint import add_export
from maskvr_ds.cli.configuration import add_config, add_recipes
from maskvr_ds.cli.train import add_train

EXAMPLES = """examples:
  maskvr config --config run.yaml --set batch.micro_size=32
  maskvr train --config run.yaml
  maskvr train --config demo_cpu --num-gpus 2 --set data.path=corpus --set output_dir=runs/first
  maskvr train --config run.yaml --hostfile hosts --resume auto
  maskvr checkpoint verify runs/first
  maskvr export --checkpoint runs/first --output bert-mine
  maskvr variance --checkpoint runs/first --corpus corpus --strategies whole_word span --output variance
  maskvr compare --config run.yaml --strategies uniform span --seeds 0 1 2 --output comparison
  maskvr benchmark masking
  maskvr demo --output demo_run
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="maskvr",
        description="Variance-reduced BERT pretraining on DeepSpeed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_train, checkpoint.add_parser, add_export, add_plot, add_recipes, add_config):
        add(commands)
    for add in (add_variance, add_compare, add_benchmark, add_demo):
        add(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "deepspeed", "transformers", "safetensors", "matplotlib", "psutil"):
            raise
        print(f"error: {error.name} is not installed; pip install 'maskvr_ds[train]'", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
