"""How long an endpoint waits before its next connection, after one that was not to be. Depends on nothing."""

from __future__ import annotations

import time

#: Pause before the next try after a peer broke the protocol, seconds: doubles from the first to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
#: After a connection that stood this long, seconds, the next pause is the first again.
GOOD_AFTER = 1.0


class Pauses:
    """Longer each time, so that a peer that means ill costs little."""

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE
        self._not_before = self._since = 0.0

    @property
    def left(self) -> float:
        """Seconds until the next try is due; 0 or less: it is."""
        return self._not_before - time.monotonic()

    def connected(self) -> None:
        """A connection stands from now on."""
        self._since = time.monotonic()

    def failed(self) -> None:
        """It ended by a fault of the peer's, or never stood."""
        now = time.monotonic()
        if self._since and now - self._since >= GOOD_AFTER:
            self._pause = FIRST_PAUSE
        self._not_before = now + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
