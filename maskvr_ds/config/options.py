"""Command-line options that name a configuration: --config, --set, --resume."""

import argparse


def add_config_options(parser: argparse.ArgumentParser, of: str = "") -> None:
    """The options that `load_config` takes. of: what their values are for, where that is not one run."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, or the name of a recipe")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        dest="assignments",
        help=f"change a value{of}",
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which run: for `maskvr train` and `python -m maskvr_ds.train` alike."""
    add_config_options(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: go on from the newest complete checkpoint of output_dir, or begin; PATH: a checkpoint or a run",
    )
