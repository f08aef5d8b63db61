"""`maskvr variance`, `maskvr compare`, `maskvr plot`."""

import argparse
from pathlib import Path

from maskvr_ds.cli.options import positive_integer, visible_gpus


def add_plot(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("plot", help="draw the loss curves of a run")
    parser.add_argument("run_folder", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", metavar="FILE", help="default: RUN/loss.png")
    parser.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> int:
    from maskvr_ds.run_folder.layout import LOSS_PLOT, METRICS
    from maskvr_ds.telemetry.plots import plot_loss

    run = Path(arguments.run_folder)
    if not (run / METRICS).is_file():
        raise ValueError(f"{run}: no {METRICS} there; a run's folder expected")
    output = Path(arguments.output or run / LOSS_PLOT)
    plot_loss(run / METRICS, output)
    print(output)
    return 0


_VARIANCE_EXAMPLES = """examples:
  maskvr variance --checkpoint runs/first --corpus corpus --output variance \\
      --strategies frequency fully_explored:placement=same_batch,segments_per_sequence=3 whole_word
  maskvr variance --checkpoint runs/mapnet/checkpoints/step-00004000 --corpus corpus --output variance --num-gpus 8 \\
      --strategies mapnet mapnet:floor=0.1 oracle_gradient:floor=0.1 oracle_head oracle_mask --hamming-rounds 8
"""


def add_variance(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.analysis.gradient_variance.options import add_variance_options

    parser = commands.add_parser(
        "variance",
        help="measure the gradient's variance from data and from masks, strategy by strategy",
        epilog=_VARIANCE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_variance_options(parser)
    parser.add_argument(
        "--num-gpus", type=positive_integer, metavar="N", help="ranks on this machine; default: its GPUs, or 1"
    )
    parser.set_defaults(run=_variance)


def _variance(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config.strategy_spec import parse_strategies

    parse_strategies(arguments.strategies)
    options = []
    for name, value in vars(arguments).items():
        if name not in ("run", "num_gpus"):
            options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    ranks = arguments.num_gpus or visible_gpus()
    if ranks <= 1:
        from maskvr_ds.analysis.gradient_variance import measure

        return measure.main(options)
    from maskvr_ds.reliability import launch

    return launch.run_here("maskvr_ds.analysis.gradient_variance.measure", options, ranks)


_COMPARE_EXAMPLES = """examples:
  maskvr compare --config run.yaml --set data.path=corpus --seeds 0 1 2 --output comparison \\
      --strategies uniform mapnet:gate=auto fully_explored fully_explored:placement=same_batch
  maskvr compare --config run.yaml --strategies uniform uniform:optimizer.lr=0.02 --target 2.5 --output rates
"""


def add_compare(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config import add_config_options

    parser = commands.add_parser(
        "compare",
        help="train strategies × seeds; steps and seconds to the first one's held-out loss",
        epilog=_COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_options(parser, of=" in all runs")
    parser.add_argument(
        "--strategies",
        nargs="+",
        required=True,
        metavar="STRATEGY",
        help="name, or name:setting=value,setting=value (of masking, of mapnet for it, or section.field); the first "
        "is the baseline",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="S", help="default: 0 1 2")
    parser.add_argument("--output", required=True, metavar="DIR", help="runs there that are done are not repeated")
    parser.add_argument("--target", type=float, metavar="LOSS", help="default: the baseline's last one, seed by seed")
    parser.add_argument(
        "--num-gpus", type=positive_integer, metavar="N", help="ranks of each run; default: as `maskvr train`"
    )
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from maskvr_ds.benchmarks import compare

    return compare.run(arguments)
