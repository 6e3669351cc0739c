"""The option that runs every drawn case instead of the few that cover most."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-full", action="store_true", help="run every case of the parity matrix, not only the first")
