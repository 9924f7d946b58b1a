"""For all tests: what a marker demands of the machine."""

import os

import pytest


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs root, saying so."""
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")
