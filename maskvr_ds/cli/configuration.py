"""`maskvr recipes`, `maskvr config`."""

import argparse


def add_recipes(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("recipes", help="list the recipes, or print one to start your own run.yaml from")
    parser.add_argument("name", nargs="?", help="print this recipe")
    parser.set_defaults(run=_recipes)


def _recipes(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import recipe_text, recipes

    print(recipe_text(arguments.name) if arguments.name else "\n".join(recipes()))
    return 0


def add_config(commands: argparse._SubParsersAction) -> None:
    from maskvr_ds.config import add_config_options

    parser = commands.add_parser("config", help="check a run's configuration and print it whole, defaults included")
    add_config_options(parser)
    parser.set_defaults(run=_config)


def _config(arguments: argparse.Namespace) -> int:
    from maskvr_ds.config import dump_config, load_config

    print(dump_config(load_config(arguments.config, arguments.assignments)), end="")
    return 0
