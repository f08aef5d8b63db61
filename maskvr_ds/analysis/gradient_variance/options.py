"""Command-line options of `maskvr variance`, and the strategies that they name. Loads no torch."""

import argparse
from collections.abc import Sequence

from maskvr_ds.config.base import ConfigError
from maskvr_ds.config.strategy_spec import MASK_ORACLE
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_SEED, MAX_STEPS, integer, number

_ROUNDS = 10**6


def add_variance_options(parser: argparse.ArgumentParser) -> None:
    """Options shared by `maskvr variance` and its rank processes."""
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="checkpoint folder, or run folder (its newest checkpoint)"
    )
    parser.add_argument(
        *("--corpus", "--data"), dest="corpus", required=True, metavar="DIR", help="corpus from which rows are sampled"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for variance.json and variance.png")
    parser.add_argument(
        "--strategies",
        nargs="+",
        default=["uniform"],
        metavar="STRATEGY",
        help="name, or name:setting=value,setting=value; besides the values of masking.strategy: oracle_gradient, "
        "oracle_head, oracle_mask; uniform is always measured (default: uniform)",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=number(0, 1),
        default=[],
        metavar="RATE",
        help="also measure every strategy at these rates (default: the run's rate alone)",
    )
    parser.add_argument(
        "--global-size",
        type=integer(0, 2**40),
        default=0,
        metavar="B",
        help="sequences per step, for progress (default: 0, the run's batch.global_size)",
    )
    parser.add_argument(
        "--seconds",
        nargs="+",
        default=[],
        metavar="STRATEGY=S",
        help="seconds of a step, to divide progress by, for each strategy as listed in the results (default: FLOPs "
        "of a step)",
    )
    parser.add_argument(
        "--sequences", type=integer(0, MAX_STEPS), default=64, metavar="N", help="number of rows (default: 64)"
    )
    parser.add_argument(
        "--masks", type=integer(0, _ROUNDS), default=16, metavar="R", help="masks per row and strategy (default: 16)"
    )
    parser.add_argument(
        "--oracle-rounds",
        type=integer(0, _ROUNDS),
        default=8,
        metavar="A",
        help="predictions of each token by an oracle (default: 8)",
    )
    parser.add_argument(
        "--hamming-rounds",
        type=integer(0, _ROUNDS),
        default=0,
        metavar="H",
        help="also measure the covariance of two masks' gradients against their Hamming distance, with H rounds per "
        "row (default: 0, off)",
    )
    parser.add_argument(
        "--sketch-size",
        type=integer(0, 2**24),
        default=4096,
        metavar="S",
        help="gradient sketch size per layer (default: 4096)",
    )
    parser.add_argument(
        "--micro-size",
        type=integer(0, MAX_MICRO_SIZE),
        default=32,
        metavar="N",
        help="masked rows per forward pass (default: 32)",
    )
    parser.add_argument(
        "--seed",
        type=integer(0, MAX_SEED),
        default=0,
        help="seed of rows, masks, gradient sketch and bootstrap (default: 0)",
    )
    parser.add_argument(
        "--confidence",
        type=number(0, 1),
        default=0.95,
        help="confidence level of intervals (default: 0.95)",
    )


def with_rates(texts: Sequence[str], rates: Sequence[float]) -> list[str]:
    """The strategies, and each of them, and uniform, at each of the rates."""
    found = list(texts)
    for text in ["uniform", *(text for text in texts if text != "uniform")]:
        if text != MASK_ORACLE:
            found += [f"{text}{',' if ':' in text else ':'}rate={rate:g}" for rate in rates]
    return list(dict.fromkeys(found))


def read_seconds(texts: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """STRATEGY=SECONDS of every strategy. Raises ConfigError if one is unknown, missing or not positive."""
    found = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            seconds = float(value)
        except ValueError:
            seconds = 0.0
        if name not in names or not 0 < seconds < float("inf"):
            raise ConfigError(f"--seconds {text}: STRATEGY=SECONDS expected, for one of {', '.join(names)}")
        found[name] = seconds
    if missing := [name for name in names if found and name not in found]:
        raise ConfigError(f"--seconds: missing for {', '.join(missing)}; give them for all strategies or for none")
    return found
