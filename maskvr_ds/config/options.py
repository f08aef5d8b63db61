"""Command-line options that name a configuration: --config, --set, --resume. Loads no torch."""

import argparse

from maskvr_ds.runtime.logs import add_verbosity_options


def add_config_options(parser: argparse.ArgumentParser, of: str = "") -> None:
    """The options that `load_config` takes. of: what the values apply to, if not a single run."""
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
    """The options of `maskvr train` and of `python -m maskvr_ds.train`."""
    add_config_options(parser)
    parser.add_argument(
        "--resume",
        metavar="auto|PATH",
        help="auto: continue from the newest intact checkpoint of output_dir, or start if there is none; "
        "PATH: continue from this checkpoint, or from the newest one of this run",
    )
    add_verbosity_options(parser)
