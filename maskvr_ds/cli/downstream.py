"""`maskvr evaluate`."""

import argparse
from pathlib import Path

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.runtime.numbers import MAX_MICRO_SIZE, MAX_STEPS, integer

_DESCRIPTION = """\
Evaluate models: runs (their newest checkpoint), checkpoints, or folders saved by `maskvr export` or
by transformers.

  mlm   predict masked tokens of held-out rows: loss in nats per masked token, perplexity, accuracy,
        each also by what the model saw at the position: [MASK] (mask), the token itself (kept), or
        another token (random). Masks and rows are those of the evaluations during training, so that
        figures of different models compare if their tokenizers are equal."""
_EXAMPLES = """\
maskvr evaluate runs/base --tasks mlm --data corpus
maskvr evaluate bert-base-uncased runs/domain --tasks mlm --data corpus --output figures.json"""


def add_evaluate(commands: Commands) -> None:
    """Add `maskvr evaluate`."""
    parser = add_command(
        commands, "evaluate", "evaluate models on held-out text", examples=_EXAMPLES, description=_DESCRIPTION
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run, checkpoint, or model folder")
    parser.add_argument("--tasks", nargs="+", choices=["mlm"], default=["mlm"], metavar="TASK", help="mlm (default)")
    parser.add_argument(
        "--data",
        required=True,
        metavar="CORPUS",
        help="corpus; its held_out part is read if it has one, else all of it",
    )
    parser.add_argument(
        "--rows",
        type=integer(1, MAX_STEPS),
        default=1024,
        metavar="N",
        help="maximum number of rows (default: 1024, as evaluation.rows)",
    )
    parser.add_argument(
        "--micro-size",
        type=integer(1, MAX_MICRO_SIZE),
        default=32,
        metavar="N",
        help="sequences per forward pass (default: 32)",
    )
    parser.add_argument("--output", metavar="FILE", help="also write the figures to a JSON file")
    parser.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> int:
    from maskvr_ds.runtime import distributed

    def run() -> None:
        from maskvr_ds.downstream import mlm

        corpus = mlm.evaluation_corpus(Path(arguments.data))
        rows = min(arguments.rows, corpus.rows)
        models = [Path(model) for model in arguments.models]
        found = mlm.evaluate(models, corpus, rows=rows, micro_size=arguments.micro_size)
        entropy = next(iter(found.values()))["held_out_unigram_entropy"]
        print(f"{corpus.folder}: {rows:,} of {corpus.rows:,} rows; unigram entropy {entropy:.4f} nats per token")
        print(mlm.table(found))
        if arguments.output:
            mlm.write(Path(arguments.output), found, corpus, rows)

    return distributed.run_as_rank(run)
