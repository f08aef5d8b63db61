"""`maskvr evaluate --shots`: episodes with few examples per class."""

import argparse
from pathlib import Path
from typing import Any

from maskvr_ds.downstream import tasks
from maskvr_ds.runtime.logs import configure
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_STEPS, integer, number

# Bounds of the command line only.
_MAX_SHAPE, _MAX_MARGIN = 10_000, 1e6
# As METHODS of downstream/few_shot.py, which loads torch.
_METHODS = ("centroid", "probe", "prototypical", "margin")
_TASK = "classification"
# Option -> field of Request, and of Training.
_OF_REQUEST = ("ways", "queries", "episodes", "max_per_class", "methods", "split_seed")
_OF_TRAINING = {
    "train_episodes": "episodes",
    "train_queries": "queries",
    "train_learning_rate": "learning_rate",
    "margin": "margin",
    "margin_weight": "weight",
    "margin_distances": "normalised",
}
# Options of this evaluation other than --shots; of others, those that it shares.
OPTIONS = (*_OF_REQUEST, *_OF_TRAINING)
SHARED = ("seeds", "max_length", "text_columns", "label_column")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of episodes."""
    group = parser.add_argument_group("options of episodes (few examples)")
    group.add_argument(
        "--shots",
        nargs="+",
        type=integer(1, _MAX_SHAPE),
        metavar="K",
        help="evaluate on episodes with K labelled examples per class, of classes that nothing was trained on; --data "
        "is one labelled file (.tsv, .csv, .jsonl, .parquet)",
    )
    group.add_argument("--ways", type=integer(2, _MAX_SHAPE), metavar="N", help="classes per episode (default: 5)")
    group.add_argument(
        "--queries", type=integer(1, _MAX_SHAPE), metavar="N", help="queries per class and episode (default: 15)"
    )
    group.add_argument(
        "--episodes", type=integer(2, MAX_STEPS), metavar="N", help="test episodes (default: 600, as published)"
    )
    group.add_argument(
        "--methods",
        nargs="+",
        choices=_METHODS,
        help="centroid: nearest class mean, and probe: logistic regression, on the frozen encoder; prototypical: "
        "trained on episodes; margin: the same with a large-margin term (default: all)",
    )
    group.add_argument(
        "--max-per-class",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="draw from a fixed random subset of N examples of each class (default: 200)",
    )
    group.add_argument(
        "--split-seed",
        type=integer(0, 2**31 - 1),
        metavar="N",
        help="seed of the division of the classes into training, validation and test, and of the episodes (default: 0)",
    )
    group.add_argument("--train-episodes", type=integer(1, MAX_STEPS), metavar="N", help="default: 300")
    group.add_argument(
        "--train-queries",
        type=integer(1, MAX_MICRO_SIZE),
        metavar="N",
        help="queries per class and training episode (default: 15)",
    )
    group.add_argument("--train-learning-rate", type=number(0, 1, above=True), metavar="RATE", help="default: 2e-5")
    group.add_argument("--margin", type=number(0, _MAX_MARGIN), metavar="M", help="of squared distances (default: 0.5)")
    group.add_argument(
        "--margin-weight", type=number(0, _MAX_MARGIN), metavar="W", help="of the large-margin term (default: 1)"
    )
    group.add_argument(
        "--margin-distances",
        choices=["normalised", "unnormalised"],
        help="between embeddings of unit length, at most 4, or as they are (default: normalised)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate on episodes. Raises ValueError for settings that cannot be."""
    (task,) = tasks.resolve([_TASK], arguments.text_columns or (), arguments.label_column)
    if len(task.texts) != 1:
        raise ValueError(f"--text-columns {' '.join(arguments.text_columns)}: episodes have one text per example")
    for name in ("margin", "margin_weight", "margin_distances"):
        if getattr(arguments, name) is not None and "margin" not in (arguments.methods or _METHODS):
            raise ValueError(f"--{name.replace('_', '-')} is an option of the method margin; add it to --methods")
    if getattr(arguments, "margin_weight", None) == 0:
        raise ValueError("--margin-weight 0 is the method prototypical: choose it with --methods, or a higher weight")
    from maskvr_ds.downstream import few_shot
    from maskvr_ds.downstream.command import leave_launcher
    from maskvr_ds.downstream.episodic import Training

    configure(arguments.verbosity)
    leave_launcher()
    given: dict[str, Any] = {
        name: value for name in ("seeds", "max_length", *_OF_REQUEST) if (value := getattr(arguments, name)) is not None
    }
    if "split_seed" in given:
        given["seed"] = given.pop("split_seed")
    training: dict[str, Any] = {"weight": 1.0, "margin": 0.5}
    for option, name in _OF_TRAINING.items():
        if (value := getattr(arguments, option)) is not None:
            training[name] = value == "normalised" if option == "margin_distances" else value
    request = few_shot.Request(
        task,
        Path(arguments.data),
        Path(arguments.output),
        arguments.shots,
        training=Training(**training),
        **given,
    )
    print(few_shot.evaluate(arguments.models, request), end="")
    return 0
