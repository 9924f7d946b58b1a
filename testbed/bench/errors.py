"""What can go wrong in a benchmark. Depends on `testbed.errors`."""

from __future__ import annotations

from testbed.errors import TestbedError


class BenchFailed(TestbedError):
    """A measurement did not come out; the message has which, and what the end that failed said."""


class StoreError(TestbedError):
    """The database of results cannot be used; the message names its file."""
