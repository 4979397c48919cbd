"""Options of the suites, beside those of pytest-benchmark."""

import pytest

from effseg.plans import parse_bytes


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the tuning suite can be told."""
    group = parser.getgroup("effseg")
    group.addoption(
        "--steps", type=int, default=200, help="of a tuned training; 5 with --benchmark-disable"
    )
    group.addoption(
        "--step-seconds",
        type=float,
        default=60.0,
        help="after which a tuned training ends, whatever its steps",
    )
    group.addoption(
        "--budgets",
        type=lambda text: tuple(parse_bytes(part) for part in text.split(",")),
        help="such as 512MiB,1GiB; else three that leave a network room beside its weights",
    )
