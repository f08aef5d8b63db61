import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="LAMB: every combination of stage, ranks, precision, clipping, offload and accumulation (an hour)",
    )
