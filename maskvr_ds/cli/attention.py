"""`maskvr attention`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.downstream import tasks
from maskvr_ds.runtime.numbers import integer

_DESCRIPTION = """\
Attention heads of encoders (runs, checkpoints, or folders of transformers) on rows of a corpus:

  patterns   every map is vertical, diagonal, vertical + diagonal, block or heterogeneous (Kovaleva
             et al. 2019); shares by layer, and those of random weights as the control. By a rule, or by a
             convolutional network that is trained on the maps of which the rule is sure (--classifier)
  attention  entropy, distance, and the shares that go to [CLS], [SEP], punctuation, equal tokens, and
             the words of your own lists (--words)
  --off      the held-out masked-token loss without each head, and each layer's heads, of the first
             model, next to importance by gradient (Michel et al. 2019)
  --prune N  switch off N of its heads, each time the one that is missed least; --export-pruned
             saves the result as an ordinary model with zeroed columns: not faster, equal logits
  --task     of models from `maskvr finetune`: the score on the task's evaluation set without each
             head and each layer's heads, with intervals; several models are seeds of one task
             (needs the extra `evaluate`)

Two or more models of one shape on a corpus are also compared with the first, layer by layer: cosine
similarity of each head's maps, and of the weights."""
_EXAMPLES = """\
maskvr attention runs/base --data corpus --plot heads.png
maskvr attention bert-base-uncased runs/domain --data corpus --json > heads.json
maskvr attention runs/base --data corpus --words nouns=nouns.txt --words negation=negation.txt
maskvr attention runs/base --data corpus --off zero --prune 8 --export-pruned pruned
maskvr attention sentiment0 sentiment1 sentiment2 --task sst2 --data glue --plot heads.png"""
_ROWS, _MAX_ROWS = 16, 4096


def add_attention(commands: Commands) -> None:
    """Add `maskvr attention`."""
    parser = add_command(
        commands,
        "attention",
        "patterns of attention heads, and the loss without them",
        examples=_EXAMPLES,
        description=_DESCRIPTION,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, checkpoint, or model folder")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="corpus; its held-out part is read if it has one. With --task: the task's folder, as of `maskvr finetune`",
    )
    parser.add_argument(
        "--rows",
        type=integer(1, 1_000_000),
        metavar="N",
        help=f"default: {_ROWS} of a corpus, all examples of a task's evaluation set",
    )
    parser.add_argument("--classifier", choices=["rule", "network"], help="how maps are classified (default: rule)")
    parser.add_argument(
        "--words",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="also measure attention to the words in FILE, one per line, such as nouns or negations; may be repeated",
    )
    names = [name for name in tasks.NAMES if name not in tasks.GROUPS]
    parser.add_argument("--task", choices=names, metavar="TASK", help="judge the heads of fine-tuned models by a task")
    own = "with --task classification or regression: column"
    parser.add_argument("--text-columns", nargs="+", metavar="COLUMN", help=f"{own} of the text, or of two texts")
    parser.add_argument("--label-column", metavar="COLUMN", help=f"{own} of the label")
    parser.add_argument("--max-length", type=integer(1, 2**20), metavar="N", help="tokens per example of --task")
    parser.add_argument(
        "--off",
        choices=["zero", "uniform"],
        help="output of a head that is switched off: zero, or that of uniform attention",
    )
    parser.add_argument("--prune", type=integer(1, 100_000), default=0, metavar="N", help="heads to switch off in turn")
    parser.add_argument("--export-pruned", metavar="DIR", help="save the pruned model there (zeroed columns)")
    parser.add_argument("--json", action="store_true", help="print JSON, with all figures by layer and head")
    parser.add_argument("--plot", metavar="FILE", help="also draw heads by class and example maps as a PNG")
    parser.set_defaults(run=_attention)


def _attention(arguments: argparse.Namespace) -> int:
    if arguments.export_pruned and not arguments.prune:
        raise ValueError("--export-pruned saves the model without the heads of --prune: give --prune N")
    if arguments.export_pruned and arguments.off == "uniform":
        raise ValueError("--export-pruned zeroes columns, and --off uniform does not: choose --off zero")
    if len(set(arguments.models)) < len(arguments.models):
        raise ValueError("a MODEL is given twice")
    if not arguments.task and (arguments.rows or 0) > _MAX_ROWS:
        raise ValueError(f"--rows {arguments.rows}: of a corpus at most {_MAX_ROWS:,}, as they are one batch")
    for name in ("words", "classifier"):
        if getattr(arguments, name) and arguments.task:
            raise ValueError(f"--{name} is an option of the rows of a corpus: give no --task with it")
    for name in ("text_columns", "label_column", "max_length"):
        if getattr(arguments, name) and not arguments.task:
            raise ValueError(f"--{name.replace('_', '-')} describes examples of --task: give --task TASK")
    from maskvr_ds.runtime import distributed

    return distributed.run_as_rank(lambda: _of_task(arguments) if arguments.task else _of_corpus(arguments))


def _of_corpus(arguments: argparse.Namespace) -> None:
    from maskvr_ds.analysis.attention.words import read_word_list
    from maskvr_ds.downstream import attention

    request = attention.Request(
        rows=arguments.rows or _ROWS,
        words=tuple(read_word_list(text) for text in arguments.words),
        network=arguments.classifier == "network",
        off=arguments.off,
        prune=arguments.prune,
        export=Path(arguments.export_pruned) if arguments.export_pruned else None,
        plot=Path(arguments.plot) if arguments.plot else None,
    )
    result = attention.run(arguments.models, Path(arguments.data), request)
    _print(result, f"{result['data']}: {result['rows']:,} rows\n\n{attention.table(result)}", arguments)


def _of_task(arguments: argparse.Namespace) -> None:
    from maskvr_ds.downstream import task_heads

    (task,) = tasks.resolve([arguments.task], arguments.text_columns or (), arguments.label_column)
    request = task_heads.TaskRequest(
        task=task,
        data=Path(arguments.data),
        how=arguments.off or "zero",
        examples=arguments.rows,
        max_length=arguments.max_length,
        prune=arguments.prune,
        export=Path(arguments.export_pruned) if arguments.export_pruned else None,
        plot=Path(arguments.plot) if arguments.plot else None,
    )
    result = task_heads.run(arguments.models, request)
    _print(result, task_heads.table(result), arguments)


def _print(result: dict[str, Any], table: str, arguments: argparse.Namespace) -> None:
    if arguments.json:
        json.dump(result, sys.stdout, indent=1, ensure_ascii=False)
        print()
    else:
        print(table)
