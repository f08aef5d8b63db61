"""Options of `maskvr evaluate` and `maskvr finetune` about how a model is trained, and about an intermediate task."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskvr_ds.downstream import tasks
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_STEPS, integer, number

if TYPE_CHECKING:
    from maskvr_ds.downstream.command import First

# Bounds of the command line only.
_MAX_EPOCHS, _MAX_LAYERS = 10_000, 1000
# Fields of `Protocol`.
PROTOCOL = ("accumulation", "layer_decay", "freeze", "class_weights", "patience", "group_by_length")
_INTERMEDIATE = tuple(f"intermediate_{name}" for name in ("data", "learning_rate", "epochs", "max_train"))
OTHERS = ("long_texts", "intermediate", *_INTERMEDIATE)
# Options whose name is not that of their value.
_NAMES = {"patience": "early_stopping"}


def refuse(arguments: argparse.Namespace, options: tuple[str, ...], reason: str) -> None:
    """Raise ValueError for an option that would be ignored."""
    if given := [name for name in options if getattr(arguments, name, None) is not None]:
        raise ValueError(f"--{_NAMES.get(given[0], given[0]).replace('_', '-')} {reason}")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("further options of fine-tuning")
    group.add_argument(
        "--long-texts",
        choices=["truncate", "windows"],
        help="texts of more than --max-length tokens: cut, or read in windows whose logits are averaged (default: "
        "truncate). Contexts of questions are always read in windows",
    )
    group.add_argument(
        "--accumulation",
        type=integer(2, MAX_MICRO_SIZE),
        metavar="A",
        help="compute each batch in A equal parts, one after the other, to save memory",
    )
    group.add_argument(
        "--early-stopping",
        dest="patience",
        type=integer(1, _MAX_EPOCHS),
        metavar="P",
        help="stop after P epochs without a better score on the held-out part of the training set, and take the best "
        "epoch's weights; final runs then do not train on that part either",
    )
    group.add_argument(
        "--class-weights",
        choices=["balanced"],
        help="balanced: weight the loss of an example by the inverse frequency of its class",
    )
    group.add_argument(
        "--layer-decay",
        type=number(0, 1, above=True),
        metavar="D",
        help="multiply the learning rate by D from each layer to the one below (ELECTRA: 0.8 for base models)",
    )
    group.add_argument(
        "--group-by-length",
        action="store_const",
        const=True,
        help="make each batch of examples of similar length: less padding, less time; batches are less random",
    )
    group.add_argument(
        "--freeze",
        type=_frozen,
        metavar="embeddings|N",
        help="train neither the embeddings nor the lowest N layers",
    )
    _intermediate_options(parser)


def _intermediate_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of an intermediate task, on which models are fine-tuned first")
    names = [name for name in tasks.NAMES if name not in tasks.GROUPS]
    group.add_argument(
        "--intermediate",
        choices=names,
        metavar="TASK",
        help="fine-tune on all of its training set first, once per seed; the head is new afterwards",
    )
    group.add_argument("--intermediate-data", metavar="DIR", help="folder with its files (default: --data)")
    group.add_argument(
        "--intermediate-learning-rate",
        type=number(0, 1, above=True),
        metavar="RATE",
        help="default: the lowest of the task's publication, 2e-5",
    )
    group.add_argument(
        "--intermediate-epochs", type=number(0, _MAX_EPOCHS, above=True), metavar="N", help="default: the task's, 3"
    )
    group.add_argument(
        "--intermediate-max-train",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="train on a fixed random subset of N of its examples",
    )


def _frozen(text: str) -> int:
    """Layers that are frozen, besides the embeddings."""
    return 0 if text == "embeddings" else integer(1, _MAX_LAYERS)(text)


def first(arguments: argparse.Namespace, chosen: list[str]) -> "First | None":
    if arguments.intermediate is None:
        refuse(arguments, _INTERMEDIATE, "describes an intermediate task: add --intermediate TASK, or omit it")
        return None
    from maskvr_ds.downstream.command import First

    (task,) = tasks.resolve([arguments.intermediate])
    data = Path(arguments.intermediate_data or arguments.data)
    if task.name in chosen and data.resolve() == Path(arguments.data).resolve():
        raise ValueError(
            f"--intermediate {task.name}: is evaluated by this command on the same files, which it would be trained on "
            "twice; name another task, or another --intermediate-data"
        )
    return First(
        task,
        data,
        arguments.intermediate_learning_rate,
        arguments.intermediate_epochs,
        arguments.intermediate_max_train,
    )
