"""Entry point of `python -m maskvr_ds.cli`."""

import sys

from maskvr_ds.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
