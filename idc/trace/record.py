"""The back end of tracing: takes one domain's events from a channel, checks them, writes them to a file here.

    python3 -m idc.trace.record ADDRESS --domain NAME --here NAME [--directory DIR]

serves one writer after the other until it is ended, each connection in a file of its own. A writer that sends what is
no event, or more than its files may take, loses its connection, and nothing else happens; why is in its file.
`--domain` is who mediates' word for who is at the other end: nothing a writer says about that counts.
Depends on idc.channel, idc.trace.events and idc.trace.store.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idc.channel import ByteChannel
from idc.errors import BackPressuredError, CorruptError, DisconnectedError, IdcError, ProtocolError, TimedOutError
from idc.region import wait_event
from idc.trace import events
from idc.trace.events import PONG
from idc.trace.place import open_place
from idc.trace.store import DIRECTORY, MOST_BYTES, FullError, StoreWriter

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from idc.region import Region

#: Longest time that an event waits in the ring, seconds. A doorbell comes when the ring is half full.
NAP: Final = 0.02
#: After a PING, seconds of polling for the next: clocks are compared several times in a row.
LIVELY: Final = 0.002
#: Most bytes taken at a time.
MOST_TAKEN: Final = 256 << 10
#: Pause after a writer that broke the rules, seconds: doubles from the first to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.01, 1.0
#: What a writer that broke the rules reads as the reason of the end, in its side's state word.
BROKE_RULES, NO_ROOM = 1, 2


class Recorder:
    """One connection.

    Args:
        region: the channel's.
        channel: connected; closed by `run`.
        store: where events go; closed by `run`.
        clock: ns, of the recorder's domain.

    Attributes:
        events_bytes: taken so far.
    """

    def __init__(self, region: Region, channel: ByteChannel, store: StoreWriter, *,
                 clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.taken = 0
        self._channel = channel
        self._store = store
        self._clock = clock
        self._event = region.events[channel.entry.data_vector]
        self._half = channel.receiver.size // 2
        self._piece = bytearray(min(MOST_TAKEN, channel.receiver.size))
        self._rest = b""
        self._lively = 0.0

    def run(self, stopped: Callable[[], bool] = lambda: False) -> str:
        """Record until the writer is gone, breaks the rules, there is no more room, or `stopped`; why it ended."""
        reason, code = "stopped", 0
        try:
            while not stopped():
                self.pump(NAP)
        except (ProtocolError, CorruptError) as error:
            reason, code = f"the writer broke the rules: {error}", BROKE_RULES
        except DisconnectedError as error:
            reason = str(error) + (f"; {len(self._rest)} bytes of an unfinished event" if self._rest else "")
        except (FullError, OSError) as error:
            reason, code = f"no room: {error}", NO_ROOM
        self._channel.close(code)
        try:
            self._store.close(reason)
        except OSError as error:
            reason += f"; the file could not be finished: {error.strerror}"
        return reason

    def pump(self, timeout: float) -> int:
        """Take what is there, waiting up to `timeout` seconds for half a ring or a PING; how many bytes.

        Raises:
            ProtocolError, CorruptError: the writer broke the rules.
            DisconnectedError: it is gone, and all it sent was taken.
            FullError, OSError: the file cannot take it.
        """
        took = self._take()
        if took:
            return took
        if time.monotonic() < self._lively:
            time.sleep(0)
            return self._take()
        if self._channel.receiver.arm(self._half):
            wait_event(self._event, timeout)
        return self._take()

    def _take(self) -> int:
        try:
            count = self._channel.receiver.read_into(self._piece, 1, timeout=0)
        except BackPressuredError:
            return 0
        except DisconnectedError as error:
            if not error.done:
                raise
            count = error.done  # what was sent before the end counts; the next look finds the end again
        came = self._clock()
        run = self._rest + bytes(memoryview(self._piece)[:count])
        end, pings = events.whole(run)
        for at in pings:
            self._answer(run, at, came)
        self._rest = run[end:]
        self._store.append(run[:end])
        self.taken += count
        return count

    def _answer(self, run: bytes, at: int, came: int) -> None:
        self._lively = time.monotonic() + LIVELY
        number = events.HEADER.unpack_from(run, at)[-1]
        with contextlib.suppress(DisconnectedError):  # what it sent before that is still to be written
            if self._channel.sender.available() >= PONG.size:  # else it takes no answers, and gets none
                self._channel.sender.try_write(PONG.pack(number, came, self._clock()))


def serve(address: str, domain: str, here: str, directory: Path, *, most_bytes: int = MOST_BYTES,
          say: Callable[[str], None] = lambda _: None, stopped: Callable[[], bool] = lambda: False,
          clock: Callable[[], int] = time.monotonic_ns) -> None:
    """Record one connection after the other until `stopped`.

    Raises:
        MisuseError: the address, or a name, cannot be one.
        OSError, IdcError: the region cannot be opened.
        FullError: the domain's files have taken all that they may.
    """
    region, name = open_place(address)
    pause = FIRST_PAUSE
    with region:
        while not stopped():
            try:
                channel = ByteChannel.attach(region, name, timeout=1.0)
            except TimedOutError:
                continue
            try:
                store = StoreWriter(directory, domain, here, most_bytes=most_bytes)
            except BaseException:
                channel.close(NO_ROOM)
                raise
            say(f"{domain}: connected, into {store.path}")
            began = time.monotonic()
            recorder = Recorder(region, channel, store, clock=clock)
            reason = recorder.run(stopped)
            say(f"{domain}: {reason}; {recorder.taken} bytes in {store.path}")
            pause = FIRST_PAUSE if time.monotonic() - began > LONGEST_PAUSE else min(2 * pause, LONGEST_PAUSE)
            if not stopped():
                time.sleep(pause)


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(prog="python3 -m idc.trace.record")
    parser.add_argument("address", help="ivshmem:REGION/CHANNEL or member:SOCKET/CHANNEL")
    parser.add_argument("--domain", required=True, help="who is at the other end")
    parser.add_argument("--here", required=True, help="this domain's name")
    parser.add_argument("--directory", type=Path, default=Path(DIRECTORY))
    parser.add_argument("--most-bytes", type=int, default=MOST_BYTES, help="of all files of the domain")
    parser.add_argument("--clock-offset", type=int, default=0, metavar="NS", help="shift this clock, for tests")
    given = parser.parse_args()
    ended = False

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal ended
        ended = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    try:
        serve(given.address, given.domain, given.here, given.directory, most_bytes=given.most_bytes, say=say,
              stopped=lambda: ended, clock=lambda: time.monotonic_ns() + given.clock_offset)
    except (OSError, IdcError, FullError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
