"""Traffic that shows every torn, lost, doubled or foreign byte, over a channel of either kind, from either end.

As a program it is one end in a process of its own, which a fault may stop or kill:

    python tests/traffic.py SOCKET CHANNEL send|receive COUNT
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from idc.channel import ByteChannel, MessageChannel
from idc.errors import PeerGoneError, TimedOutError
from idc.layout import ChannelSpec, Kind

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.region import Region

Role = Literal["send", "receive"]
AnyChannel = MessageChannel | ByteChannel

#: Few places, so that both sides wait for each other all the time.
CHANNELS = (
    ChannelSpec("messages", Kind.MESSAGE, "front", "back", 4 * 128, 128),
    ChannelSpec("bytes", Kind.BYTE, "front", "back", 4096),
)
#: Items until the other side is the slow one: more than a ring takes.
BLOCK = 100
PATIENCE = 60.0
_PATTERN = random.Random(5).randbytes(1 << 16)


def item(index: int) -> bytes:
    """Message `index`, or piece `index` of the stream: its own length and content, different from every other's."""
    start = index * 7919 % (len(_PATTERN) - 1024)
    length = 8 + index * 13 % 108
    return index.to_bytes(4, "little") + _PATTERN[start : start + length]


def attach(region: Region, name: str, timeout: float = PATIENCE) -> AnyChannel:
    """Open this member's end of one of CHANNELS."""
    kind = MessageChannel if name == "messages" else ByteChannel
    channel: AnyChannel = kind.attach(region, name, timeout=timeout)
    channel.sender.spin = channel.receiver.spin = 0.0
    return channel


class Talk:
    """One conversation over a fresh connection: `count` items one way, each checked.

    `stalled` is called whenever nothing moved for `timeout` seconds; then it is tried again.
    """

    def __init__(self, channel: AnyChannel, seed: int, timeout: float, stalled: Callable[[], None]) -> None:
        self._channel = channel
        self._dice = random.Random(seed)
        self._timeout = timeout
        self._stalled = stalled
        self._deadline = time.monotonic() + PATIENCE

    def run(self, role: Role, count: int) -> None:
        """All of it. Raises PeerGoneError or CorruptError as the channel does."""
        for index in range(count):
            # The slower side changes, and with it which one waits: first for data, later for room.
            if (role == "send") == (index // BLOCK % 2 == 0):
                time.sleep(self._dice.random() * 1e-3)
            if role == "send":
                self._send(item(index))
            else:
                self._receive(item(index))

    def _wait(self) -> None:
        self._stalled()
        assert time.monotonic() < self._deadline, "the conversation hangs"

    def _send(self, data: bytes) -> None:
        while data:
            try:
                if isinstance(self._channel, MessageChannel):
                    self._channel.sender.send(data, timeout=self._timeout)
                else:
                    self._channel.sender.write(data, timeout=self._timeout)
                return
            except TimedOutError as error:
                data = data[error.done :]
                self._wait()

    def _receive(self, expected: bytes) -> None:
        got = b""
        while len(got) < len(expected):
            try:
                if isinstance(self._channel, MessageChannel):
                    got = self._channel.receiver.recv(timeout=self._timeout)
                    break
                got += self._channel.receiver.read(len(expected) - len(got), timeout=self._timeout)
            except TimedOutError:
                self._wait()
        assert got == expected, f"got {got!r} instead of {expected!r}"


def converse(region: Region, name: str, role: Role, count: int, *, timeout: float = PATIENCE,
             stalled: Callable[[], None] = lambda: None) -> int:
    """Attach and talk from the first item on, as often as the peer goes away; returns how often it did."""
    ends = 0
    deadline = time.monotonic() + PATIENCE
    while True:
        assert time.monotonic() < deadline, f"no whole conversation after {ends} that broke off"
        try:
            with attach(region, name, timeout) as channel:
                Talk(channel, 1 if role == "send" else 2, timeout, stalled).run(role, count)
                return ends
        except TimedOutError:  # of attach: the peer was not there in time
            stalled()
        except PeerGoneError:
            ends += 1


def main() -> None:
    """See the module's text."""
    from host.ivshmem import client

    socket, name, role, count = sys.argv[1:]
    assert role in ("send", "receive")
    with client.join(Path(socket)) as region:
        converse(region, name, "send" if role == "send" else "receive", int(count))


if __name__ == "__main__":
    main()
