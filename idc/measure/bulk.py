"""Bulk transfers: the near end announces runs of its pages, the far end copies them, maps them or takes them over.

A completed transaction gives the run back (copy, map), or other pages in exchange (handover). Depends on idc.buffers,
idc.endpoint and idc._core.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from idc._core import ffi, lib
from idc.buffers import PagePool, PeerPart, Strategy, process_memory, standard_registry
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Result
from idc.errors import MisuseError, NotConnectedError, TimedOutError

if TYPE_CHECKING:
    from idc.buffers import LocalBuffer
    from idc.endpoint.endpoint import Endpoint
    from idc.endpoint.results import Completion
    from idc.layout import Part
    from idc.region import Region

#: Bytes that go round, as many as the ring's of a stream has.
WORKING_SET: Final = 2 << 20
#: What an announcement is: what it is about, and offset in the region and length of the pages.
ANNOUNCEMENT: Final = struct.Struct("<BQQ")
#: What is answered: the pages given in exchange, and the sum of the bytes.
ANSWER: Final = struct.Struct("<QQ")
#: A run to consume; pages for the consumer to give in exchange for the first; the last of those back.
RUN, STOCK, RETURN = range(3)
#: Announcements of one transfer that are no transfers: STOCK and RETURN.
EXTRA: Final = 2


def part_of(region: Region, *, own: bool) -> Part:
    """The part of this member, or of the other of two. Raises MisuseError if there is none."""
    for part in region.header.parts:
        if (part.owner == region.member) is own:
            return part
    raise MisuseError(f"region {region.header.name!r} has no pages to allocate from")


class Consumer:
    """The far end: `answer` is the handler."""

    def __init__(self, region: Region, strategy: Strategy, size: int, *, touched: bool) -> None:
        part = part_of(region, own=False)
        self._registry = standard_registry(force=strategy)
        self._peer = PeerPart(region.memory, part.offset, part.length)
        self._taken = PagePool(region.memory, part.offset, part.length, away=True)
        self._memory = bytearray(size)
        self._target: LocalBuffer = process_memory(self._memory)
        self._touched = touched
        self._consume = {Strategy.COPY: self._copy, Strategy.MAP: self._map, Strategy.HANDOVER: self._hand}[strategy]

    def answer(self, parameters: bytes) -> bytes:
        """What a transaction asks for."""
        kind, at, length = ANNOUNCEMENT.unpack(parameters)
        if kind == STOCK:
            self._target = self._taken.take_over(at, length)
            return b""
        if kind == RETURN:
            return ANSWER.pack(self._taken.hand_away(self._target), 0)
        return ANSWER.pack(*self._consume(at, length))

    def _copy(self, at: int, length: int) -> tuple[int, int]:
        self._registry.copy(self._peer.at(at, length), self._target)
        return at, total(self._memory) if self._touched else 0

    def _map(self, at: int, length: int) -> tuple[int, int]:
        view = self._registry.share(self._peer.at(at, length)).base
        return at, sum(map(total, view.pieces(0, length))) if self._touched else 0

    def _hand(self, at: int, length: int) -> tuple[int, int]:
        source = self._taken.take_over(at, length)
        self._registry.move(source, self._target)
        found = total(self._taken.view(self._target)) if self._touched else 0
        return self._taken.hand_away(source), found


class Producer:
    """The near end: allocates and fills runs of pages, and announces them, `outstanding` at a time."""

    def __init__(self, region: Region, endpoint: Endpoint, strategy: Strategy, size: int, *, touched: bool,
                 outstanding: int, limit: float) -> None:  # fmt: skip
        part = part_of(region, own=True)
        self._pool = PagePool(region.memory, part.offset, part.length)
        self._endpoint = endpoint
        self._hands = strategy is Strategy.HANDOVER
        self._size = size
        self._outstanding = outstanding
        self._limit = limit
        self._runs: deque[LocalBuffer] = deque()
        filling = (bytes(range(251)) * (size // 251 + 1))[:size]
        for _ in range(max(WORKING_SET // size, outstanding) + self._hands):
            self._runs.append(self._pool.allocate(size))
            self._pool.view(self._runs[-1])[:] = filling
        self._expected = total(filling) if touched else 0
        if self._hands:
            self._one(STOCK, self._pool.hand_away(self._runs.popleft()))

    def transfer(self, count: int) -> None:
        """`count` runs. Raises MisuseError if the consumer saw other bytes than these."""
        pool, endpoint, runs, size, outstanding = self._pool, self._endpoint, self._runs, self._size, self._outstanding
        sent = done = 0
        under_way: deque[LocalBuffer] = deque()

        def completed(completion: Completion) -> None:
            nonlocal done
            done += 1
            at, found = self._answer(completion)
            run = under_way.popleft()
            runs.append(pool.take_over(at, size) if self._hands else run)
            if found != self._expected:
                raise MisuseError(f"the consumer's sum of a run is {found}, {self._expected} was sent")

        while done < count:
            while sent < count and sent - done < outstanding:
                run = runs.popleft()
                under_way.append(run)
                at = pool.hand_away(run) if self._hands else pool.pages(run)[0]
                if endpoint.submit_transaction(ANNOUNCEMENT.pack(RUN, at, size), completed,
                                               ordered=True) is not Result.OK:  # fmt: skip
                    raise NotConnectedError(endpoint.reason or "the consumer takes no more")
                sent += 1
            self._pump()

    def close(self) -> None:
        """Take back what the consumer still has."""
        if self._hands:
            self._pool.take_over(self._one(RETURN, 0), self._size)

    def _one(self, kind: int, at: int) -> int:
        answers: list[Completion] = []
        self._endpoint.submit_transaction(ANNOUNCEMENT.pack(kind, at, self._size), answers.append)
        while not answers:
            self._pump()
        return self._answer(answers[0])[0] if kind == RETURN else 0

    def _answer(self, completion: Completion) -> tuple[int, int]:
        if completion.result is not Result.OK:
            raise NotConnectedError(f"a run was not consumed: {completion.reason}")
        at, found = ANSWER.unpack(completion.status)
        return at, found

    def _pump(self) -> None:
        began = time.monotonic()
        while not self._endpoint.pump(1.0):
            if self._endpoint.state is not State.CONNECTED:
                raise NotConnectedError(f"the connection was lost: {self._endpoint.reason}")
            if time.monotonic() - began > self._limit:
                raise TimedOutError("the consumer did not answer in time")


def fill(region: Region, size: int) -> tuple[int, int, int]:
    """Runs of this member's pages side by side, filled: where they begin, how many, and the sum of one."""
    part, runs = part_of(region, own=True), WORKING_SET // size
    pool = PagePool(region.memory, part.offset, part.length)
    whole = pool.allocate(runs * size)
    filling = (bytes(range(251)) * (size // 251 + 1))[:size]
    pool.view(whole)[:] = filling * runs
    return pool.pages(whole)[0], runs, total(filling)


def total(memory: bytes | bytearray | memoryview) -> int:
    """The sum of all bytes, as 64-bit words, modulo 2**64: by a C loop, so that looking costs as little as can be."""
    with ffi.from_buffer(memory) as start:
        return int(lib.idc_loop_sum(start, len(start)))
