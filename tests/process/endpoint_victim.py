"""python endpoint_victim.py SEED ROUNDS LOG PLACES [HOW...]; PLACES: front and back of good, notes and bulk, as JSON

The front end of one honest back end and of one that scribbles, in one thread. Runs with a core that was built with
AddressSanitizer, each region between two pages that nobody may touch. Prints a line for each round; any sentence that
does not hold is an AssertionError with the round and the seed, any step outside memory is AddressSanitizer's report.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import random
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

from host.ivshmem import client as member
from idc._core import ffi, lib
from idc.channel import ByteChannel
from idc.endpoint import Client, Completion, Endpoint, Quotas, Resources, Result, State
from idc.errors import BackPressuredError, DisconnectedError, IdcError
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.region import Region

HERE = Path(__file__).parent
PAGE: Final = 4096
#: Seconds in which a connection must end once its memory is scribbled over, and in which it must not else.
END_WITHIN: Final = 1.0
#: Seconds for which the scribbling goes on after the end, over the attempts to connect again.
AFTERMATH: Final = 0.3
#: Seconds for what honest parties do, on a machine that is busy with other things.
PATIENCE: Final = 30.0
#: Transactions of the honest connection in each round, at the least.
GOOD_ANSWERS: Final = 20
#: What is written over, and whether the connection must end (True), must stand (False), or either (None).
HOW: Final[dict[str, bool | None]] = {"whole": True, "header": True, "blocks": True, "rings": None, "forge": None,
                                      "parts": False}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
MREMAP_MAYMOVE_FIXED: Final = 3
PROT_NONE: Final = 0


def guarded(fd: int, size: int) -> mmap.mmap:
    """A mapping with a page that nobody may touch directly before and directly after it."""
    mapping = mmap.mmap(fd, size)
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    guard = _libc.mmap(None, size + 2 * PAGE, PROT_NONE, anonymous, -1, 0)
    pointer = ctypes.c_void_p.from_address(id(mapping) + object.__basicsize__)  # the first field of CPython's mmap
    with ffi.from_buffer(mapping) as base:
        assert pointer.value == int(ffi.cast("uintptr_t", base)), "CPython's mmap object has changed"
    moved = _libc.mremap(pointer.value, size, size, MREMAP_MAYMOVE_FIXED, guard + PAGE)
    assert moved == guard + PAGE, os.strerror(ctypes.get_errno())
    pointer.value = moved
    return mapping


class Counting(Client):
    """Counts the ends of connections."""

    cycles = 0

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        self.cycles += 1
        done()


class Regions:
    """Each region is joined once: the two channels that are attacked may lie in one."""

    def __init__(self) -> None:
        self.joined: dict[str, Region] = {}

    def channel(self, place: str) -> tuple[Region, str]:
        """The region and the channel's name of SOCKET/CHANNEL."""
        path, _, name = place.rpartition("/")
        if path not in self.joined:
            self.joined[path] = member.join(path)
        return self.joined[path], name


class Notes:
    """Keeps a few transactions under way."""

    def __init__(self, region: Region, name: str) -> None:
        self.client = Counting()
        quotas = Quotas(requests=4, messages=4, parameter_bytes=1024, status_bytes=1024)
        self.endpoint = Endpoint(SharedPort(region, name, release=lambda: None), self.client,
                                 Resources(quotas, requests=4, messages=4))
        self.answers = 0
        self.chance = random.Random(1)

    def turn(self) -> None:
        endpoint = self.endpoint
        body = self.chance.randbytes(self.chance.randrange(120))
        while endpoint.submit_transaction(b"7" + body.hex().encode(), self._done) is Result.OK:
            pass
        endpoint.pump(0.0005)

    def _done(self, completion: Completion) -> None:
        self.answers += completion.result is Result.OK


class Bulk:
    """Writes, reads and reads in place over a byte channel; opens it anew when it ended."""

    def __init__(self, region: Region, name: str) -> None:
        self._region, self._name = region, name
        self._channel = ByteChannel.begin(self._region, self._name)
        self.connected = False
        self.ends = 0
        self.reason = ""
        self.bytes = 0
        self.chance = random.Random(2)

    def turn(self) -> None:
        channel = self._channel
        try:
            if not self.connected:
                if not channel.intact:
                    channel.close()
                    self._channel = channel = ByteChannel.begin(self._region, self._name)
                self.connected = channel.advance()
                return
            channel.sender.try_write(bytes(self.chance.randrange(2000)))
            self._receive(channel)
        except DisconnectedError as error:
            self.ends += 1
            self.reason = str(error)
            channel.close()
            self._channel, self.connected = ByteChannel.begin(self._region, self._name), False

    def _receive(self, channel: ByteChannel) -> None:
        with contextlib.suppress(BackPressuredError):
            most = self.chance.randrange(1, 3000)
            if most % 2:
                got = len(channel.receiver.read(most, timeout=0))
                assert got <= most
            else:
                with channel.receiver.peek(timeout=0) as span:
                    got = len(bytes(span.memory))
                    span.consume(got)
            self.bytes += got

    def close(self) -> None:
        self._channel.close()


class Hostile:
    """The scribbler, driven by lines. It and the honest back end run with an ordinary core."""

    def __init__(self, seed: int, places: list[str]) -> None:
        self.process = start("endpoint_scribbler.py", str(seed), *places, stdin=subprocess.PIPE)

    def tell(self, command: str, answer: str, meanwhile: Callable[[], None]) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        poller, deadline = select.poll(), time.monotonic() + PATIENCE
        poller.register(self.process.stdout, select.POLLIN)
        while not poller.poll(0):
            assert time.monotonic() < deadline, "the hostile process hangs"
            meanwhile()
        word, _, rest = self.process.stdout.readline().strip().partition(" ")
        assert word == answer, (command, word)
        return rest


def start(name: str, *words: str, stdin: int | None = None) -> subprocess.Popen[str]:
    """A process with an ordinary core."""
    env = {key: value for key, value in os.environ.items()
           if key not in ("LD_PRELOAD", "PYTHONPATH", "PYTHONMALLOC", "ASAN_OPTIONS", "UBSAN_OPTIONS")}
    return subprocess.Popen([sys.executable, str(HERE / name), *words], stdin=stdin, stdout=subprocess.PIPE, text=True,
                            env=env)


def attack(how: str, good: Notes, bad: Notes, bulk: Bulk, hostile: Hostile) -> str:
    """One round; what came of it, in words."""

    def turn() -> None:
        for side in (good, bad, bulk):
            side.turn()

    def turn_until(condition: Callable[[], bool], limit: float, what: str) -> None:
        deadline = time.monotonic() + limit
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {bad.endpoint.state} {bad.endpoint.reason!r}, {bulk.reason!r}"
            turn()

    # more than once round the rings: a slot that was damaged after this side had reset it ends one more connection
    answers, got = bad.answers + 80, bulk.bytes + 20_000
    turn_until(lambda: (bad.answers >= answers and bulk.bytes >= got and bad.endpoint.state is State.CONNECTED
                        and bulk.connected), PATIENCE, "no connection with an honest peer")
    cycles, ends, before = bad.client.cycles, bulk.ends, good.answers
    began = float(hostile.tell(f"scribble {how}", "now", turn))
    expected = HOW[how]
    if expected is True:
        turn_until(lambda: bad.client.cycles > cycles and bulk.ends > ends, END_WITHIN, "did not end in time")
        assert bad.endpoint.reason
        assert bulk.reason
    took = time.monotonic() - began
    until = time.monotonic() + AFTERMATH
    turn_until(lambda: time.monotonic() >= until and good.answers >= before + GOOD_ANSWERS, PATIENCE,
               "the honest connection does not get on")
    if expected is False:
        assert (bad.client.cycles, bulk.ends) == (cycles, ends), f"no need: {bad.endpoint.reason!r}, {bulk.reason!r}"
    assert good.endpoint.state is State.CONNECTED
    assert good.endpoint.connections == 1
    served = good.answers - before
    notes_end = bad.endpoint.reason if bad.client.cycles > cycles else "stands"
    bulk_end = bulk.reason if bulk.ends > ends else "stands"
    when = f" after {took * 1000:.0f} ms" if expected else ""
    hostile.tell("stop", "stopped", turn)
    return f"{how}: {notes_end} / {bulk_end}{when}, {served} honest answers meanwhile"


def main() -> None:
    seed, rounds = int(sys.argv[1]), int(sys.argv[2])
    log, places = sys.argv[3], json.loads(sys.argv[4])
    ways = sys.argv[5:] or list(HOW)
    for size_class in range(3):
        assert lib.idc_copy_force(size_class, 0) == 0  # libc's, into which AddressSanitizer sees
    vars(member)["mmap"] = SimpleNamespace(mmap=guarded)
    chance = random.Random(seed)
    # whoever started this one ends its process group, so also what AddressSanitizer leaves behind
    honest = start("endpoint_nursery.py", f"member:{places['good'][1]}", log)
    hostile = Hostile(seed, [places["notes"][1], places["bulk"][1]])
    regions = Regions()
    good, bad = (Notes(*regions.channel(places[name][0])) for name in ("good", "notes"))
    bulk = Bulk(*regions.channel(places["bulk"][0]))
    for number in range(rounds):
        how = ways[number] if number < len(ways) else chance.choice(ways)
        try:
            told = attack(how, good, bad, bulk, hostile)
        except (AssertionError, IdcError) as error:
            raise AssertionError(f"round {number} ({how}) of seed {seed}: {error}") from error
        sys.stdout.write(f"round {number} {told}\n")
        sys.stdout.flush()
    for side in (good, bad):
        side.endpoint.abandon()
    bulk.close()
    for region in regions.joined.values():
        region.close()
    for process in (honest, hostile.process):
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
