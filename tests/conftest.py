import logging
import os
import signal

import pytest
import torch
from hypothesis import Phase, settings

from maskvr_ds.runtime import logs

# The time of an example depends more on the machine's load than on the code.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")
# Whether an example fails is enough there, and must not depend on chance.
settings.register_profile("mutants", deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))

# Without a GPU, Triton's kernels are run by its interpreter. Read when Triton is imported, also by forked ranks.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Children inherit ignored signals (from nohup, or from a shell that runs pytest in the background), and some tests send
# these signals. Handlers are not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _loggers_as_imported() -> None:
    """A command that an earlier test called in this process has configured them."""
    logger = logging.getLogger(logs.ROOT)
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="all combinations of settings (stage, ranks, precision, clipping, offload, accumulation, strategies) "
        "instead of a subset that covers all pairs (an hour)",
    )
    parser.addoption(
        "--whole-survival",
        action="store_true",
        help="20 random kills per test, damage to all files of a checkpoint, all transitions between stages "
        "(15 minutes)",
    )
