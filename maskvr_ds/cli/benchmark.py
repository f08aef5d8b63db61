"""`maskvr benchmark`, `maskvr demo`."""

import argparse
from pathlib import Path


def add_benchmark(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config.model import PRESETS

    parser = commands.add_parser("benchmark", help="measure loader, masks, optimizer or training steps on this machine")
    parser.add_argument("what", choices=["loader", "masking", "masks", "lamb", "train"])
    parser.add_argument("--output", metavar="FILE", help="also write the figures as JSON")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="bert-base",
        help="train, lamb, masks: model size (default: bert-base)",
    )
    parser.add_argument(
        "--deepspeed", default="zero1_bf16", help="train, lamb, masks: a DeepSpeed config (default: zero1_bf16)"
    )
    parser.add_argument(
        "--micro-size", type=int, default=128, help="train, masks: sequences a forward pass (default: 128)"
    )
    parser.add_argument("--steps", type=int, default=100, help="train: optimizer steps (default: 100)")
    parser.add_argument("--sequence-length", type=int, default=128, help="L (default: 128)")
    parser.add_argument("--strategy", default="uniform", help="masking: a masking.strategy (default: uniform)")
    parser.add_argument("--rounds", type=int, default=15, help="lamb, masks: timed steps of each (default: 15)")
    parser.add_argument("--threads", type=int, help="lamb, masks: CPU threads a rank (default: all there are)")
    parser.add_argument(
        "--against",
        nargs="+",
        choices=["adamw_foreach", "fused_adam", "fused_lamb"],
        help="lamb: what to compare with; the fused ones need a GPU (default: all that can run here)",
    )
    parser.set_defaults(run=_benchmark)


def _benchmark(arguments: argparse.Namespace) -> int:
    from maskvr_ds.benchmarks import training

    return training.run(arguments)


def add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="text to exported model in five minutes on two cores")
    parser.add_argument("--output", default="demo_run", metavar="DIR", help="made anew at each start")
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from maskvr_ds.demo import demo

    return demo(Path(arguments.output))
