"""`maskvr evaluate` and `maskvr finetune`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskvr_ds.cli import few_shot, fine_tuning
from maskvr_ds.cli.fine_tuning import refuse
from maskvr_ds.cli.options import Commands, add_command, add_task_data_options
from maskvr_ds.downstream import tasks
from maskvr_ds.runtime.logs import add_verbosity_options, configure
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_STEPS, integer, number

if TYPE_CHECKING:
    from maskvr_ds.downstream.command import Request

_MLM = "mlm"
# Bounds of the command line only.
_MAX_SEEDS, _MAX_EPOCHS, _MAX_LENGTH, _MAX_JOBS = 1000, 10_000, 2**20, 1024

_DESCRIPTION = """\
Evaluate models: runs (their newest checkpoint), checkpoints, folders saved by `maskvr export` or by
transformers, or names on a hub (OWNER/NAME, OWNER/NAME@REVISION). A folder of that name takes
precedence.

  mlm   predict masked tokens of held-out rows: loss in nats per masked token, perplexity, accuracy,
        each also by what the model saw at the position: [MASK] (mask), the token itself (kept), or
        another token (random). Masks and rows are those of the evaluations during training, so that
        figures of different models compare if their tokenizers are equal.

Other tasks fine-tune the models (needs the extra `evaluate`):

  glue  all tasks of GLUE: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; or name some of them
  squad, squad_v2
        answers to questions, as spans of a text; of 2.0 some questions have none
  classification, regression
        your own train and dev files (.tsv, .csv, .jsonl, .parquet) with one or two columns of text
  conll token classification: token and tag in the first and last column, scored by entity

With --shots, models are evaluated on episodes with few examples of classes that nothing was trained
on: prototypical networks with and without a large-margin term, and baselines on the frozen encoder.

The learning rate is chosen on a part of the training set, never on the evaluation set. The table
has mean and standard deviation over seeds, the majority class and a bag of words as further rows,
and says which differences are within noise. Finished runs are stored in the output folder: the same
command continues after an interruption."""
_EXAMPLES = """\
maskvr evaluate runs/base --tasks mlm --data corpus
maskvr evaluate google-bert/bert-base-uncased runs/domain --tasks mlm --data corpus --output figures.json
maskvr evaluate runs/base bert-base-uncased --tasks cola sst2 rte --data glue --output scores
maskvr evaluate runs/base --tasks squad squad_v2 --data squad --jobs 4 --output answers
maskvr evaluate runs/base --shots 1 5 --data sections.jsonl --output episodes
maskvr evaluate runs/base --checkpoints every:1000 --tasks sst2 --data glue --output curve
maskvr evaluate runs/base --tasks rte --data glue --intermediate mnli --layer-decay 0.9 --output two_stages
maskvr evaluate runs/base --tasks classification --text-columns title body --label-column topic \\
    --data tickets --output scores"""
_FINETUNE_EXAMPLES = """\
maskvr finetune runs/base --task sst2 --data glue --output sentiment
maskvr finetune bert-base-uncased --task conll --data newspaper --learning-rates 3e-5 --output entities"""


def add_evaluate(commands: Commands) -> None:
    """Add `maskvr evaluate`."""
    parser = add_command(
        commands,
        "evaluate",
        "evaluate models on held-out text or downstream tasks",
        examples=_EXAMPLES,
        description=_DESCRIPTION,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="run, checkpoint, model folder, or name on a hub")
    parser.add_argument("--tasks", nargs="+", choices=[_MLM, *tasks.NAMES], metavar="TASK", help="default: mlm")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="mlm: corpus; its held_out part is read if it has one, else all of it. Other tasks: folder with the "
        "tasks' folders, or with your own files",
    )
    parser.add_argument(
        "--output", metavar="PATH", help="mlm: JSON file for the figures. Other tasks: folder, required"
    )
    parser.add_argument(
        "--checkpoints",
        metavar="WHICH",
        help="evaluate these checkpoints of each run: all, every:N (steps that are multiples of N) or best "
        "(checkpoint.keep_best); scores against step, seconds and tokens are in OUTPUT/curve.json and curve.png",
    )
    _mlm_options(parser)
    parser.add_argument(
        "--seeds", type=integer(1, _MAX_SEEDS), metavar="N", help="final runs per model (default: 5; with --shots 3)"
    )
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=list(tasks.WEIGHTED_ROWS),
        help="further bags of words, with other weights of the terms than TF–IDF: tf (none), information gain, χ², "
        "relevance frequency, or learned by a network from the term's distribution over the classes (ltw, one run per "
        "seed); with them, models are optional",
    )
    parser.add_argument(
        "--jobs",
        type=integer(1, _MAX_JOBS),
        metavar="N",
        help="processes that fine-tune at the same time, each on its own GPU while there are some (default: 1)",
    )
    _task_options(parser)
    few_shot.add_options(parser)
    add_verbosity_options(parser)
    parser.set_defaults(run=_evaluate)


def add_finetune(commands: Commands) -> None:
    """Add `maskvr finetune`."""
    parser = add_command(
        commands,
        "finetune",
        "fine-tune a model on a task",
        examples=_FINETUNE_EXAMPLES,
        description="Fine-tune a model on a task and save it as OUTPUT/model, which transformers loads. The learning "
        "rate is chosen on a part\nof the training set; OUTPUT also has the scores, as of `maskvr evaluate`.",
    )
    parser.add_argument("model", metavar="MODEL", help="run, checkpoint, model folder, or name on a hub")
    names = [name for name in tasks.NAMES if name not in tasks.GROUPS]
    parser.add_argument("--task", required=True, choices=names, metavar="TASK", help=", ".join(names))
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with the task's folder, or with your own files"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the model and its scores")
    parser.add_argument("--seed", type=integer(0, 2**32 - 1), default=0, metavar="N", help="default: 0")
    _task_options(parser)
    add_verbosity_options(parser)
    parser.set_defaults(run=_finetune)


def _mlm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of mlm")
    group.add_argument(
        "--rows",
        type=integer(1, MAX_STEPS),
        metavar="N",
        help="maximum number of rows (default: 1024, as evaluation.rows)",
    )
    group.add_argument(
        "--micro-size",
        type=integer(1, MAX_MICRO_SIZE),
        metavar="N",
        help="sequences per forward pass (default: 32)",
    )


def _task_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of fine-tuning")
    group.add_argument(
        "--learning-rates",
        nargs="+",
        type=number(0, 1, above=True),
        metavar="RATE",
        help="grid to choose from; a single one is used as it is (default: of the task's publication, 2e-5 to 5e-5)",
    )
    group.add_argument(
        "--selection-seeds",
        type=integer(1, _MAX_SEEDS),
        metavar="N",
        help="runs per learning rate of the grid (default: 1)",
    )
    group.add_argument("--epochs", type=number(0, _MAX_EPOCHS, above=True), metavar="N", help="default: the task's, 3")
    group.add_argument(
        "--batch-size", type=integer(1, MAX_MICRO_SIZE), metavar="N", help="examples per step (default: the task's, 32)"
    )
    group.add_argument(
        "--max-length",
        type=integer(8, _MAX_LENGTH),
        metavar="N",
        help="tokens per example; longer ones are truncated and counted (default: 128). Of questions: tokens per "
        "window (default: 384)",
    )
    group.add_argument(
        "--stride",
        type=integer(0, _MAX_LENGTH),
        metavar="N",
        help="tokens that successive windows of a long context or text share (default: a third of --max-length)",
    )
    add_task_data_options(group)
    fine_tuning.add_training_options(parser)


_OWN = ("seeds", "selection_seeds", "epochs", "batch_size", "max_length", "stride", "precision")
_PROTOCOL = (*_OWN, *fine_tuning.PROTOCOL)
_OF_TASKS = (
    *_PROTOCOL,
    *fine_tuning.OTHERS,
    "baselines",
    "jobs",
    "checkpoints",
    "learning_rates",
    "max_train",
    "text_columns",
    "label_column",
)


# Without a model.
_OF_WORDS = ("baselines", "seeds", "max_train", "text_columns", "label_column")


def check_evaluate(arguments: argparse.Namespace) -> None:
    """Raise ValueError for arguments of `maskvr evaluate` that contradict each other, or would be ignored. Sets the
    default of --tasks. Loads no torch."""
    if arguments.shots is not None:
        _check_episodes(arguments)
        return
    refuse(arguments, few_shot.OPTIONS, "is an option of episodes; give the number of examples with --shots")
    arguments.tasks = arguments.tasks or [_MLM]
    if not arguments.models and (arguments.checkpoints or not arguments.baselines):
        raise ValueError("nothing to evaluate: name a MODEL")
    if arguments.tasks == [_MLM]:
        refuse(arguments, _OF_TASKS, "is an option of fine-tuning, and mlm trains nothing")
        return
    if _MLM in arguments.tasks:
        raise ValueError("mlm reads a corpus and other tasks read labelled files: evaluate them by two commands")
    refuse(arguments, ("rows", "micro_size"), "is an option of the task mlm")
    if not arguments.models:
        others = tuple(name for name in _OF_TASKS if name not in _OF_WORDS)
        refuse(arguments, others, "is an option of fine-tuning: name a MODEL")
        if tasks.LEARNING_TO_WEIGHT not in arguments.baselines:
            refuse(arguments, ("seeds",), "is an option of fine-tuning and of --baselines ltw: name one of them")
    _check_output(arguments)
    tasks.resolve(arguments.tasks, arguments.text_columns or (), arguments.label_column)


def _check_output(arguments: argparse.Namespace) -> None:
    if arguments.output is None:
        raise ValueError("--output is required: the folder for the scores and the finished runs")


def _evaluate(arguments: argparse.Namespace) -> int:
    check_evaluate(arguments)
    if arguments.shots is not None:
        return few_shot.run(arguments)
    if arguments.tasks == [_MLM]:
        return _evaluate_mlm(arguments)
    request = _request(arguments, arguments.tasks)
    from maskvr_ds.downstream import command

    print(command.evaluate(arguments.models, request), end="")
    return 0


def _check_episodes(arguments: argparse.Namespace) -> None:
    if arguments.tasks not in (None, ["classification"]):
        raise ValueError("--shots: episodes are of the task classification; omit --tasks")
    others = tuple(name for name in ("rows", "micro_size", *_OF_TASKS) if name not in few_shot.SHARED)
    refuse(arguments, others, "has no meaning with --shots")
    if not arguments.models:
        raise ValueError("nothing to evaluate: name a MODEL")
    _check_output(arguments)


def _finetune(arguments: argparse.Namespace) -> int:
    request = _request(arguments, [arguments.task])
    from maskvr_ds.downstream import command

    print(command.finetune(arguments.model, request, arguments.seed), end="")
    return 0


def _request(arguments: argparse.Namespace, names: list[str]) -> "Request":
    chosen = tasks.resolve(names, arguments.text_columns or (), arguments.label_column)
    from maskvr_ds.downstream.command import Request
    from maskvr_ds.downstream.protocol import Protocol

    windows = arguments.long_texts == "windows"
    if arguments.stride is not None and not windows and all(task.kind is not tasks.Kind.SPAN for task in chosen):
        raise ValueError(
            "--stride is an option of squad and squad_v2, and of --long-texts windows: other tasks read no windows"
        )
    configure(arguments.verbosity)
    given: dict[str, Any] = {name: value for name in _PROTOCOL if (value := getattr(arguments, name, None)) is not None}
    if getattr(arguments, "baselines", None) is not None:
        given["baselines"] = tuple(dict.fromkeys(arguments.baselines))
    if arguments.learning_rates is not None:
        given["learning_rates"] = tuple(arguments.learning_rates)
    given["windows"] = windows
    protocol = Protocol(**given)
    if arguments.selection_seeds is not None and not any(map(protocol.chooses, chosen)):
        raise ValueError("--selection-seeds: a single learning rate is not chosen; omit it, or name several rates")
    return Request(
        chosen,
        Path(arguments.data),
        Path(arguments.output),
        protocol,
        arguments.max_train,
        getattr(arguments, "jobs", None) or 1,
        getattr(arguments, "checkpoints", None),
        fine_tuning.first(arguments, [task.name for task in chosen]),
    )


def _evaluate_mlm(arguments: argparse.Namespace) -> int:
    from maskvr_ds.runtime import distributed
    from maskvr_ds.runtime.files import check_output_file

    if arguments.output:
        check_output_file(arguments.output, "--output")

    configure(arguments.verbosity)

    def run() -> None:
        from maskvr_ds.downstream import mlm

        corpus = mlm.evaluation_corpus(Path(arguments.data))
        rows = min(arguments.rows or 1024, corpus.rows)
        found = mlm.evaluate(arguments.models, corpus, rows=rows, micro_size=arguments.micro_size or 32)
        entropy = next(iter(found.values()))["held_out_unigram_entropy"]
        of = f"{corpus.rows:,} row{'s' * (corpus.rows != 1)}"
        print(f"{corpus.folder}: {rows:,} of {of}; unigram entropy {entropy:.4f} nats per token")
        print(mlm.table(found))
        if arguments.output:
            mlm.write(Path(arguments.output), found, corpus, rows)

    return distributed.run_as_rank(run)
