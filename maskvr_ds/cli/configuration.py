"""`maskvr recipes` and `maskvr config`."""

import argparse
import itertools
import re
import sys
import textwrap

from maskvr_ds.cli.options import Commands, add_command
from maskvr_ds.runtime.hostfile import read_hostfile
from maskvr_ds.runtime.numbers import MAX_NODES, MAX_SLOTS, integer

# Characters of a line of the list of recipes.
_LINE = 120
_RECIPES_EXAMPLES = """\
maskvr recipes
maskvr recipes bert_base_4k > run.yaml"""


def add_recipes(commands: Commands) -> None:
    """Add `maskvr recipes`."""
    parser = add_command(
        commands, "recipes", "list the built-in recipes, or print one as a template", examples=_RECIPES_EXAMPLES
    )
    parser.add_argument("name", nargs="?", help="print this recipe")
    parser.set_defaults(run=_recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import recipe_parts, recipe_text, recipes

    if arguments.name:
        print(recipe_text(arguments.name), end="")
        return 0
    names, parts = recipes(), recipe_parts()
    width = max(map(len, (*names, *parts)))
    lines = [f"{name:{width}}  {_first_sentence(recipe_text(name), _LINE - width - 2)}" for name in (*names, *parts)]
    print(*lines[: len(names)], "", "parts of recipes, to be combined in base: [...]", *lines[len(names) :], sep="\n")
    return 0


def _first_sentence(recipe: str, width: int) -> str:
    """Of the comment at the top of a recipe, at most `width` characters of it."""
    comment = itertools.takewhile(lambda line: line.startswith("# ") and "Source" not in line, recipe.splitlines())
    text = " ".join(line.removeprefix("# ") for line in comment)
    # A sentence ends before a capital: not at "et al. 2018".
    return textwrap.shorten(re.split(r"\.(?= [A-Z]|$)", text)[0], width, placeholder=" …")


_CONFIG_DESCRIPTION = """\
Validate a config and print it fully resolved, defaults included. Also checked, as at the start of
training: the DeepSpeed file, the corpora (paths, sequence lengths, tokenizers, masks that they
allow), the initial model, and the batch sizes.

Exit status: 0 valid; 1 with a line on standard error for each fault."""
_CONFIG_EXAMPLES = """\
maskvr config --config run.yaml
maskvr config --config run.yaml --num-gpus 8
maskvr config --config bert_base_4k --no-files --set batch.micro_size=32"""


def add_config(commands: Commands) -> None:
    """Add `maskvr config`."""
    from maskvr_ds.config import add_config_options

    parser = add_command(
        commands,
        "config",
        "validate a config and print it fully resolved, defaults included",
        examples=_CONFIG_EXAMPLES,
        description=_CONFIG_DESCRIPTION,
    )
    add_config_options(parser)
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument(
        "--num-gpus",
        type=integer(1, MAX_NODES * MAX_SLOTS),
        metavar="N",
        help="also check that N ranks can share a batch",
    )
    ranks.add_argument("--hostfile", metavar="FILE", help="also check that its ranks can share a batch")
    parser.add_argument(
        "--no-files",
        action="store_true",
        help="do not check the corpora, tokenizers and initial model that it names (they will be made later)",
    )
    parser.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import dump_config
    from maskvr_ds.training.references import check_run

    ranks = sum(read_hostfile(arguments.hostfile).values()) if arguments.hostfile else arguments.num_gpus
    checked = check_run(arguments.config, arguments.assignments, ranks, files=not arguments.no_files)
    faults = checked.settings + checked.files
    print(dump_config(checked.config), end="")
    for kind, lines in (("warning", checked.remarks), ("error", faults)):
        for line in lines:
            print(f"{kind}: {line}", file=sys.stderr)
    if not faults:
        steps = checked.config.training.steps
        length = "" if steps is None else f": {steps:,} step{'s' * (steps != 1)}"
        print(f"{arguments.config}: valid{length}", file=sys.stderr)
    return 1 if faults else 0
