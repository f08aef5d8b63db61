"""`maskvr recipes` and `maskvr config`."""

import argparse

from maskvr_ds.cli.options import Commands, add_command

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
        print(recipe_text(arguments.name))
    else:
        print("\n".join(recipes()))
        print("\nparts of recipes, to be combined in base: [...]")
        print("\n".join(recipe_parts()))
    return 0


_CONFIG_EXAMPLES = """\
maskvr config --config run.yaml
maskvr config --config bert_base_4k --set data.path=corpus --set batch.micro_size=32"""


def add_config(commands: Commands) -> None:
    """Add `maskvr config`."""
    from maskvr_ds.config import add_config_options

    parser = add_command(
        commands,
        "config",
        "validate a config and print it fully resolved, defaults included",
        examples=_CONFIG_EXAMPLES,
    )
    add_config_options(parser)
    parser.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import dump_config, load_config

    print(dump_config(load_config(arguments.config, arguments.assignments)), end="")
    return 0
