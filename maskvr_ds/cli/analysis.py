"""`maskvr plot`, `maskvr variance` and `maskvr compare`."""

import argparse
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command, add_task_data_options, check_ranks_here, visible_gpus
from maskvr_ds.runtime import logs
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_SEED, MAX_SLOTS, integer, number

_PLOT_EXAMPLES = """\
maskvr plot runs/base
maskvr plot runs/base --output base.png"""


def add_plot(commands: Commands) -> None:
    """Add `maskvr plot`."""
    parser = add_command(commands, "plot", "plot the loss curves of a run", examples=_PLOT_EXAMPLES)
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("--output", metavar="FILE", help="PNG file (default: RUN/loss.png)")
    parser.set_defaults(run=_plot)


def _plot(arguments: argparse.Namespace) -> int:
    from maskvr_ds.run_folder.layout import LOSS_PLOT, METRICS
    from maskvr_ds.telemetry.plots import plot_loss

    run = Path(arguments.run_folder)
    if not run.is_dir():
        raise ValueError(f"{run}: no such folder; expected a run folder")
    if not (run / METRICS).is_file():
        raise ValueError(f"{run}: contains no {METRICS}; expected a run folder")
    output = Path(arguments.output or run / LOSS_PLOT)
    plot_loss(run / METRICS, output)
    print(output)
    return 0


_VARIANCE_DESCRIPTION = """\
Measure the variance of a checkpoint's gradient for each masking strategy, split into the part due
to the data and the part due to the masks."""
_VARIANCE_EXAMPLES = """\
maskvr variance --checkpoint runs/base --corpus corpus --output variance \\
    --strategies frequency fully_explored:placement=same_batch,segments_per_sequence=3 whole_word
maskvr variance --checkpoint runs/mapnet/checkpoints/step-00004000 --corpus corpus --output variance --num-gpus 8 \\
    --strategies mapnet mapnet:floor=0.1 oracle_gradient:floor=0.1 oracle_head oracle_mask --hamming-rounds 8"""


def add_variance(commands: Commands) -> None:
    """Add `maskvr variance`."""
    from maskvr_ds.analysis.gradient_variance.options import add_variance_options

    parser = add_command(
        commands,
        "variance",
        "measure data and mask variance of the gradient by masking strategy",
        examples=_VARIANCE_EXAMPLES,
        description=_VARIANCE_DESCRIPTION,
    )
    add_variance_options(parser)
    parser.add_argument(
        "--num-gpus",
        type=integer(1, MAX_SLOTS),
        metavar="N",
        help="ranks on this machine (default: its number of GPUs, or 1 without GPU)",
    )
    parser.set_defaults(run=_variance)


def _variance(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config.strategy_spec import parse_strategies

    parse_strategies(arguments.strategies)
    options = []
    for name, value in vars(arguments).items():
        if name not in ("run", "num_gpus") and value != []:
            options += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    ranks = arguments.num_gpus or max(1, visible_gpus())
    check_ranks_here(ranks)
    if ranks <= 1:
        from maskvr_ds.analysis.gradient_variance import measure

        return measure.main(options)
    from maskvr_ds.reliability import launch

    return launch.run_here("maskvr_ds.analysis.gradient_variance.measure", options, ranks)


_COMPARE_DESCRIPTION = """\
Train every strategy with every seed and compare held-out losses, and the optimizer steps and
seconds needed to reach the final held-out loss of the first strategy, the baseline."""
_COMPARE_EXAMPLES = """\
maskvr compare --config run.yaml --set data.path=corpus --seeds 0 1 2 --output comparison \\
    --strategies uniform mapnet:gate=auto fully_explored fully_explored:placement=same_batch
maskvr compare --config run.yaml --strategies uniform uniform:optimizer.lr=0.02 --target 2.5 --output rates
maskvr compare --config run.yaml --strategies uniform span --output comparison --downstream sst2 mrpc \\
    --downstream-data glue
maskvr compare --config run.yaml --strategies uniform uniform:masking.rate=0.3 --output comparison \\
    --downstream classification --downstream-data tickets"""


def add_compare(commands: Commands) -> None:
    """Add `maskvr compare`."""
    parser = add_command(
        commands,
        "compare",
        "train several strategies and seeds, and compare steps and seconds to a target loss",
        examples=_COMPARE_EXAMPLES,
        description=_COMPARE_DESCRIPTION,
    )
    _compare_options(parser)
    parser.set_defaults(run=_compare)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    from maskvr_ds.config import add_config_options

    add_config_options(parser, of=" in all runs")
    parser.add_argument(
        "--strategies",
        nargs="+",
        required=True,
        metavar="STRATEGY",
        help="name, or name:setting=value,setting=value with settings of the section masking, of the strategy's own "
        "section, or section.field; the first one is the baseline",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=integer(0, MAX_SEED), default=[0, 1, 2], metavar="S", help="default: 0 1 2"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="output folder; runs completed there are not repeated"
    )
    parser.add_argument(
        "--target",
        type=number(0, 1e6, above=True),
        metavar="LOSS",
        help="held-out loss to reach (default: for each seed, the baseline's last held-out loss)",
    )
    parser.add_argument(
        "--num-gpus",
        type=integer(1, MAX_SLOTS),
        metavar="N",
        help="ranks of each run (default: as for `maskvr train`)",
    )
    _downstream_options(parser)


def _downstream_options(parser: argparse.ArgumentParser) -> None:
    from maskvr_ds.downstream import tasks

    group = parser.add_argument_group("scores after fine-tuning (needs the extra `evaluate`)")
    group.add_argument(
        "--downstream",
        nargs="+",
        choices=list(tasks.NAMES),
        metavar="TASK",
        help="fine-tune every run's last checkpoint on these tasks, as `maskvr evaluate`: " + ", ".join(tasks.NAMES),
    )
    group.add_argument(
        "--downstream-data", metavar="DIR", help="folder with the tasks' folders, or with your own files, required"
    )
    group.add_argument(
        "--downstream-seeds", type=integer(1, 1000), metavar="N", help="final runs per checkpoint (default: 5)"
    )
    group.add_argument(
        "--downstream-learning-rates",
        nargs="+",
        type=number(0, 1, above=True),
        metavar="RATE",
        help="grid to choose from, for each checkpoint (default: of the task's publication)",
    )
    group.add_argument(
        "--downstream-epochs", type=number(0, 10_000, above=True), metavar="N", help="default: the task's, 3"
    )
    group.add_argument(
        "--downstream-batch-size", type=integer(1, MAX_MICRO_SIZE), metavar="N", help="default: the task's, 32"
    )
    group.add_argument(
        "--downstream-max-length",
        type=integer(8, 2**20),
        metavar="N",
        help="tokens per example (default: 128; of questions, per window: 384)",
    )
    add_task_data_options(group, "downstream-")
    group.add_argument(
        "--downstream-jobs", type=integer(1, 1024), metavar="N", help="processes that fine-tune (default: 1)"
    )


def _compare(arguments: argparse.Namespace) -> int:
    from maskvr_ds.benchmarks import compare

    if arguments.num_gpus:
        check_ranks_here(arguments.num_gpus)
    if arguments.downstream:
        logs.configure()  # lines of fine-tuning; the runs are other processes
    return compare.run(arguments)
