"""TCP ports for tests that listen again and again on one number."""

from __future__ import annotations

import contextlib
import random
import socket

#: Below what systems hand out by themselves (32768 and above): nothing else that runs here connects from one of these,
#: or is given one, while a test's listener is away for a moment.
_OURS = range(15_000, 32_000)


def free_port(host: str = "127.0.0.1", family: socket.AddressFamily = socket.AF_INET, count: int = 1) -> int:
    """A number that nobody listens on now, nor on the `count` - 1 after it."""
    while True:
        first = random.choice(_OURS)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + count):
                probes.enter_context(socket.create_server((host, port), family=family))
            return first
