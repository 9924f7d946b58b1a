"""What can go wrong in a benchmark. Depends on `testbed.errors`."""

from __future__ import annotations

from testbed.errors import TestbedError


class BenchFailed(TestbedError):
    """A measurement did not come out; the message has which, and what the end that failed said."""


class PeerFailed(TestbedError):
    """A program that is not ours did not come out: what is missing is its figure, not the run.

    No BenchFailed, which ends the run. `message` is one line, which names program and reason; `subject` is what was
    measured with it, for others to leave out.
    """

    def __init__(self, message: str, subject: object) -> None:
        super().__init__(" ".join(message.split())[:400])
        self.subject = subject


class StoreError(TestbedError):
    """The database of results cannot be used; the message names its file."""
