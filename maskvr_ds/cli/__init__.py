"""Command-line interface `maskvr`. Loads no torch at import."""

from maskvr_ds.cli.main import main

__all__ = ["main"]
