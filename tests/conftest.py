import signal

import pytest
from hypothesis import settings

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")

# What is ignored here (by nohup, or by a shell that runs this behind) stays so in all processes of the tests, and some
# are about these signals. Handlers are not inherited.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
