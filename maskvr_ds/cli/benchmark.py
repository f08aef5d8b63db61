"""`maskvr benchmark` and `maskvr demo`."""

import argparse
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, integer, number

_BENCHMARK_DESCRIPTION = """\
Measure the speed of a component on this machine, with synthetic rows.

  loading-speed        rows per CPU-second that one thread reads from a corpus
  masking-speed        rows per CPU-second that one thread masks with --strategy
  strategy-cost        time that each masking strategy adds to a training step; with --config, the
                       seconds of a step of this run per candidate of masking.strategy auto
  optimizer-step-time  time and memory of an optimizer step of LAMB and of others
  training-speed       tokens per second and model FLOPs of training steps, kernels, waits and
                       collectives per step, memory, and the time of a step by part"""
_BENCHMARK_EXAMPLES = """\
maskvr benchmark masking-speed --strategy span
maskvr benchmark strategy-cost --config run.yaml --output mask_costs.json
maskvr benchmark optimizer-step-time --set optimizer.fused=true --output lamb.json
maskvr benchmark training-speed --preset bert-base --deepspeed zero1_bf16 --micro-size 128 --output train.json
maskvr benchmark training-speed --preset bert-large --micro-size 64 128 256 --accumulation 4 --compile layers
maskvr benchmark training-speed --deepspeed my_zero2.json --set masking.strategy=mapnet --set optimizer.fused=true"""
_COUNT = integer(1, 10**6)
# Names of earlier versions, which are still accepted, and those of today.
_FORMER_NAMES = {
    "loader": "loading-speed",
    "masking": "masking-speed",
    "masks": "strategy-cost",
    "lamb": "optimizer-step-time",
    "train": "training-speed",
}


def _current_name(name: str) -> str:
    return _FORMER_NAMES.get(name, name)


def add_benchmark(commands: Commands) -> None:
    """Add `maskvr benchmark`."""
    parser = add_command(
        commands,
        "benchmark",
        "measure the speed of loader, masking, optimizer or training on this machine",
        examples=_BENCHMARK_EXAMPLES,
        description=_BENCHMARK_DESCRIPTION,
    )
    _benchmark_options(parser)
    parser.set_defaults(run=_benchmark)


def _benchmark_options(parser: argparse.ArgumentParser) -> None:
    from maskvr_ds.config.architectures import BERT_PRESETS

    parser.add_argument("what", type=_current_name, choices=list(_FORMER_NAMES.values()), help="see above")
    parser.add_argument("--output", metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--config",
        metavar="FILE|RECIPE",
        help="strategy-cost: measure the candidates of this run, whose masking.strategy is auto; the JSON is what "
        "masking.auto.costs reads",
    )
    parser.add_argument(
        "--preset",
        choices=list(BERT_PRESETS),
        default="bert-base",
        help="training-speed, optimizer-step-time, strategy-cost: model size (default: bert-base)",
    )
    parser.add_argument(
        "--deepspeed",
        default="zero1_bf16",
        metavar="NAME",
        help="the same: DeepSpeed config, a name or a JSON file (default: zero1_bf16)",
    )
    parser.add_argument(
        "--micro-size",
        type=integer(1, MAX_MICRO_SIZE),
        nargs="+",
        default=[128],
        metavar="B",
        help="training-speed, strategy-cost: sequences per forward pass (default: 128); training-speed measures "
        "several in turn",
    )
    parser.add_argument(
        "--steps", type=_COUNT, default=100, metavar="N", help="training-speed: optimizer steps (default: 100)"
    )
    _training_options(parser)
    parser.add_argument(
        "--sequence-length", type=integer(8, 2**20), default=128, metavar="L", help="tokens per sequence (default: 128)"
    )
    parser.add_argument("--strategy", default="uniform", help="masking-speed: masking.strategy (default: uniform)")
    parser.add_argument(
        "--rounds",
        type=_COUNT,
        default=15,
        metavar="N",
        help="optimizer-step-time, strategy-cost: timed steps of each optimizer or strategy (default: 15)",
    )
    parser.add_argument(
        "--threads",
        type=integer(1, 4096),
        metavar="N",
        help="optimizer-step-time, strategy-cost: CPU threads per rank (default: PyTorch's, all cores)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        choices=["adamw_foreach", "fused_adam", "fused_lamb"],
        help="optimizer-step-time: what to compare with; the fused ones need a GPU (default: all that can run here)",
    )


def _training_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--accumulation", type=_COUNT, metavar="A", help="training-speed: micro-batches per rank and step (default: 1)"
    )
    parser.add_argument(
        "--compile", choices=["none", "layers", "model"], help="training-speed: training.compile (default: none)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=number(0, 1e6, above=True),
        metavar="T",
        help="training-speed: peak rate of a rank's device, for the MFU (default: of the data sheet of known GPUs)",
    )
    parser.add_argument(
        "--set",
        dest="assignments",
        action="append",
        metavar="SECTION.FIELD=VALUE",
        help="training-speed, strategy-cost with --config: a further setting of the run; optimizer-step-time: of LAMB",
    )


def _benchmark(arguments: argparse.Namespace) -> int:
    from maskvr_ds.benchmarks import training

    return training.run(arguments)


_DEMO_DESCRIPTION = """\
Build a corpus, train with two ranks, kill and resume the run, and export the model: about five
minutes on two CPU cores."""
_DEMO_EXAMPLES = """\
maskvr demo
maskvr demo --output /tmp/demo"""


def add_demo(commands: Commands) -> None:
    """Add `maskvr demo`."""
    parser = add_command(
        commands,
        "demo",
        "from text to an exported model in five minutes on two CPU cores",
        examples=_DEMO_EXAMPLES,
        description=_DEMO_DESCRIPTION,
    )
    parser.add_argument(
        "--output", default="demo_run", metavar="DIR", help="output folder, recreated by each demo (default: demo_run)"
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from maskvr_ds.demo import demo

    return demo(Path(arguments.output))
