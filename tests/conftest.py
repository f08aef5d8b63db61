import signal

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# What nohup has ignored stays so in all processes of the tests, and some are about this signal. A handler does not.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="LAMB: every combination of stage, ranks, precision, clipping, offload and accumulation (an hour)",
    )
    parser.addoption(
        "--whole-survival",
        action="store_true",
        help="faults: 20 random kills, every file of a checkpoint damaged, all crossings of stages (15 minutes)",
    )
