"""The command `maskvr`."""

from maskvr_ds.cli.main import main

__all__ = ["main"]
