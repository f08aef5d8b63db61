"""`maskvr token-scores`."""

import argparse
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.downstream import tasks
from maskvr_ds.runtime.numbers import integer

_DESCRIPTION = """\
Weigh the tokens of a tokenizer by how they are distributed over the classes of a labelled task, and write
the weights as scores for masking strategy frequency, which then masks tokens in proportion to them:

  masking: {strategy: frequency, frequency: {scores: scores.json}}

Weights are computed from the training set. Needs the extra `evaluate`."""
_EXAMPLES = """\
maskvr token-scores --tokenizer corpus --data tickets --output scores.json
maskvr token-scores --tokenizer corpus --data glue --task sst2 --weights chi2 --output scores.json"""


def add_token_scores(commands: Commands) -> None:
    """Add `maskvr token-scores`."""
    parser = add_command(
        commands,
        "token-scores",
        "scores of tokens for masking, from a labelled task",
        examples=_EXAMPLES,
        description=_DESCRIPTION,
    )
    names = [task.name for task in tasks.TASKS.values() if task.kind is tasks.Kind.CLASSIFICATION]
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="corpus, or other folder with tokenizer.json")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with the task's folder, or with your own files"
    )
    parser.add_argument("--task", choices=names, default="classification", metavar="TASK", help=", ".join(names))
    parser.add_argument(
        "--weights",
        choices=[name for name in tasks.WEIGHTED_ROWS if name != "tf"],
        default=tasks.LEARNING_TO_WEIGHT,
        help="as --baselines of `maskvr evaluate` (default: ltw)",
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file for the scores")
    parser.add_argument("--seed", type=integer(0, 2**31 - 1), metavar="N", help="of ltw (default: 0)")
    parser.add_argument("--text-columns", nargs="+", metavar="NAME", help="of your own files")
    parser.add_argument("--label-column", metavar="NAME", help="of your own files (default: label)")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.seed is not None and arguments.weights != tasks.LEARNING_TO_WEIGHT:
        raise ValueError(f"--seed has no meaning with --weights {arguments.weights}, which is not random")
    (task,) = tasks.resolve([arguments.task], arguments.text_columns or (), arguments.label_column)
    from maskvr_ds.downstream import token_scores

    request = token_scores.Request(
        task,
        Path(arguments.data),
        Path(arguments.tokenizer),
        arguments.weights,
        Path(arguments.output),
        arguments.seed or 0,
    )
    print(token_scores.write(request), end="")
    return 0
