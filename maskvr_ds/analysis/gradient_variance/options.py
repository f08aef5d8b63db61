"""Command-line options of `maskvr variance`. Loads no torch."""

import argparse


def add_variance_options(parser: argparse.ArgumentParser) -> None:
    """Of `maskvr variance` and of each of its ranks."""
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint, or a run (its newest one)")
    parser.add_argument("--corpus", required=True, metavar="DIR", help="whose rows to measure on")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for variance.json and variance.png")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["uniform"],
        metavar="STRATEGY",
        help="name, or name:setting=value,setting=value; beside those of masking.strategy: oracle_gradient, "
        "oracle_head, oracle_mask; uniform is always measured (default: uniform)",
    )
    parser.add_argument("--sequences", type=int, default=64, metavar="N", help="rows (default: 64)")
    parser.add_argument("--masks", type=int, default=16, metavar="R", help="draws a row and strategy (default: 16)")
    parser.add_argument(
        "--oracle-rounds", type=int, default=8, metavar="A", help="how often an oracle sees every token (default: 8)"
    )
    parser.add_argument(
        "--hamming-rounds",
        type=int,
        default=0,
        metavar="H",
        help="also measure the covariance of masks against their distance, with so many rounds a row (default: 0, no)",
    )
    parser.add_argument("--sketch-size", type=int, default=4096, metavar="S", help="numbers a layer (default: 4096)")
    parser.add_argument("--micro-size", type=int, default=32, help="masked rows a pass (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="of rows, masks, projection and bootstrap (default: 0)")
    parser.add_argument("--confidence", type=float, default=0.95, help="of the intervals (default: 0.95)")
