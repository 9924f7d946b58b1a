"""The page pool against the plainest model: who holds which pages, and how often."""

from __future__ import annotations

import mmap
import threading
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from idc.buffers import LocalBuffer, PagePool, PeerPart, Strategy, process_memory, standard_registry
from idc.buffers.pool import hand_over
from idc.errors import BackPressuredError, MisuseError, TooBigError
from idc.layout import PAGE

PAGES = 12
START = 3 * PAGE


class Pools(RuleBasedStateMachine):
    """Each live buffer holds bytes of its own, which stay as they are whatever happens to the others."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = bytearray(b"#" * ((PAGES + 5) * PAGE))
        self.pool = PagePool(self.memory, START, PAGES * PAGE)
        self.registry = standard_registry()
        self.live: list[LocalBuffer] = []
        self.references: dict[LocalBuffer, int] = {}
        self.content: dict[LocalBuffer, bytes] = {}
        self.serial = 0

    def _one(self, data: Any) -> LocalBuffer:
        index: int = data.draw(st.integers(0, len(self.live) - 1))
        return self.live[index]

    def _largest(self) -> int:
        """Pages of the longest run that nobody holds."""
        held = {page for buffer in self.live for page in self.pool.pages(buffer)}
        longest = now = 0
        for page in range(START, START + PAGES * PAGE, PAGE):
            now = 0 if page in held else now + 1
            longest = max(longest, now)
        return longest

    @rule(length=st.integers(1, 4 * PAGE), skew=st.integers(0, PAGE - 1) | st.just(0))
    def allocate(self, length: int, skew: int) -> None:
        fits = -(-(skew + length) // PAGE) <= self._largest()
        if not fits:
            with pytest.raises(BackPressuredError, match="release some"):
                self.pool.allocate(length, skew)
            return
        buffer = self.pool.allocate(length, skew)
        assert (buffer.offset_in_page, buffer.length) == (skew, length)
        self.serial += 1
        self.live.append(buffer)
        self.references[buffer] = 1
        self.content[buffer] = bytes([self.serial % 251]) * length
        self.pool.view(buffer)[:] = self.content[buffer]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def retain(self, data: Any) -> None:
        buffer = self._one(data)
        self.pool.retain(buffer)
        self.references[buffer] += 1

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        buffer = self._one(data)
        self.pool.release(buffer.slice(0, 1))  # any part of it stands for the whole
        self.references[buffer] -= 1
        if not self.references[buffer]:
            self.live.remove(buffer)
            for call in (self.pool.release, self.pool.retain, self.pool.pages, self.pool.view):
                with pytest.raises(MisuseError, match="released already"):
                    call(buffer)
            with pytest.raises(MisuseError, match="released already"):
                self.registry.copy(buffer, process_memory(bytearray(buffer.length)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def move(self, data: Any) -> None:
        source = self._one(data)
        alike = [b for b in self.live if b.length == source.length and b is not source]
        if alike:
            target = data.draw(st.sampled_from(alike))
        elif source.offset_in_page + source.length <= self._largest() * PAGE:
            target = self.pool.allocate_like(source)
            self.live.append(target)
            self.references[target] = 1
        else:
            return
        self.registry.move(source, target)
        self.content[target] = self.content[source]
        self.content[source] = bytes(self.pool.view(source))  # undefined, but nobody else's

    @invariant()
    def nothing_overlaps_and_all_is_kept(self) -> None:
        held = [page for buffer in self.live for page in self.pool.pages(buffer)]
        assert len(set(held)) == len(held)
        assert all(START <= page < START + PAGES * PAGE for page in held)
        assert self.pool.free_pages == PAGES - len(held)
        for buffer in self.live:
            assert bytes(self.pool.view(buffer)) == self.content[buffer]

    def teardown(self) -> None:
        for buffer in self.live:
            for _ in range(self.references[buffer]):
                self.pool.release(buffer)
        assert self.pool.free_pages == PAGES
        self.pool.allocate(PAGES * PAGE)
        assert self.memory[:START] == b"#" * START
        assert self.memory[START + PAGES * PAGE :] == b"#" * (2 * PAGE)


TestPools = Pools.TestCase
TestPools.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_can_never_fit_is_told_from_what_does_not_now() -> None:
    pool = PagePool(bytearray(4 * PAGE), 0, 4 * PAGE)
    with pytest.raises(TooBigError, match="5 pages, the pool has 4"):
        pool.allocate(4 * PAGE, 1)
    kept = pool.allocate(1)
    with pytest.raises(BackPressuredError, match=r"3 of 4 are free"):
        pool.allocate(4 * PAGE)
    pool.release(kept)
    assert len(pool.allocate(4 * PAGE)) == 4 * PAGE


@pytest.mark.parametrize(("length", "skew"), [(0, 0), (-1, 0), (1, -1), (1, PAGE)])
def test_odd_allocations_are_refused(length: int, skew: int) -> None:
    with pytest.raises(MisuseError, match="cannot allocate"):
        PagePool(bytearray(PAGE), 0, PAGE).allocate(length, skew)


@pytest.mark.parametrize(("offset", "length"), [(1, PAGE), (0, PAGE + 1), (0, 3 * PAGE), (-PAGE, PAGE), (PAGE, -PAGE)])
def test_odd_parts_are_refused(offset: int, length: int) -> None:
    with pytest.raises(MisuseError):
        PagePool(bytearray(2 * PAGE), offset, length)


def test_a_buffer_of_another_pool_is_refused() -> None:
    one, other = (PagePool(bytearray(PAGE), 0, PAGE) for _ in range(2))
    buffer = one.allocate(1)
    for stranger in (buffer, process_memory(b"x")):
        for call in (other.release, other.retain, other.pages, other.view):
            with pytest.raises(MisuseError, match="not of this pool"):
                call(stranger)


def test_the_pool_survives_a_peer_that_writes_over_the_whole_region() -> None:
    memory = bytearray(8 * PAGE)
    pool = PagePool(memory, 0, 8 * PAGE)
    kept = [pool.allocate(PAGE) for _ in range(8)]
    memory[:] = b"\xff" * len(memory)
    for buffer in kept:
        pool.release(buffer)
    assert pool.free_pages == 8
    assert len(pool.allocate(8 * PAGE)) == 8 * PAGE


def test_pages_are_never_given_twice_to_threads() -> None:
    pool, failed = PagePool(bytearray(8 * PAGE), 0, 8 * PAGE), []

    def churn(mark: int) -> None:
        for _ in range(300):
            try:
                buffer = pool.allocate(PAGE)
            except BackPressuredError:
                continue
            view = pool.view(buffer)
            view[:] = bytes([mark]) * PAGE
            if view.tobytes() != bytes([mark]) * PAGE:
                failed.append(mark)
            pool.release(buffer)

    threads = [threading.Thread(target=churn, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert pool.free_pages == 8


def test_pages_are_handed_to_a_peer_and_others_come_back() -> None:
    memory = mmap.mmap(-1, 6 * PAGE)
    ours, theirs = PagePool(memory, PAGE, 4 * PAGE), PagePool(memory, PAGE, 4 * PAGE, away=True)
    first, second = ours.allocate(PAGE), ours.allocate(PAGE)
    ours.view(first)[:5] = b"first"
    stock = theirs.take_over(ours.hand_away(second), PAGE)
    source = theirs.take_over(ours.hand_away(first), PAGE)
    assert standard_registry(force=Strategy.HANDOVER).move(source, stock) == 0
    assert bytes(theirs.view(stock)[:5]) == b"first"
    back = ours.take_over(theirs.hand_away(source), PAGE)
    assert ours.pages(back) == range(2 * PAGE, 3 * PAGE, PAGE), "the second's pages, in exchange"
    ours.release(back)
    assert (ours.free_pages, theirs.free_pages) == (3, 0)
    with pytest.raises(MisuseError, match="released already"):
        ours.view(first)
    with pytest.raises(MisuseError, match="released already"):
        ours.hand_away(second)


@pytest.mark.parametrize(("at", "length", "said"), [
    (PAGE, PAGE, "they are here"), (2 * PAGE, PAGE, "they are here"), (2 * PAGE, 2 * PAGE, "they are here"),
    (3 * PAGE + 1, 10, "no whole pages"), (0, PAGE, "no whole pages"), (5 * PAGE, PAGE, "no whole pages"),
    (3 * PAGE, 0, "no whole pages"), (3 * PAGE, 2 * PAGE + 1, "no whole pages"), (1 << 64, PAGE, "no whole pages"),
])  # fmt: skip
def test_what_a_peer_hands_over_is_never_what_is_here(at: int, length: int, said: str) -> None:
    pool = PagePool(bytearray(6 * PAGE), PAGE, 4 * PAGE)
    kept, gone, freed = pool.allocate(PAGE), pool.allocate(2 * PAGE), pool.allocate(PAGE)
    pool.release(freed)
    assert pool.hand_away(gone) == 2 * PAGE
    pool.release(pool.take_over(2 * PAGE, PAGE))
    with pytest.raises(MisuseError, match=said):
        pool.take_over(at, length)
    pool.view(kept)[:1] = b"k"


def test_pages_with_a_second_holder_are_not_handed_over() -> None:
    pool = PagePool(bytearray(PAGE), 0, PAGE)
    buffer = pool.allocate(1)
    pool.retain(buffer)
    with pytest.raises(MisuseError, match="has 2 holders"):
        pool.hand_away(buffer)
    pool.release(buffer)
    assert pool.hand_away(buffer) == 0


def test_a_peers_part_is_used_in_place_and_never_left() -> None:
    memory = mmap.mmap(-1, 4 * PAGE)
    part = PeerPart(memory, PAGE, 2 * PAGE)
    memory[PAGE + 10 : PAGE + 13] = b"abc"
    buffer = part.at(PAGE + 10, 3)
    assert buffer.offset_in_page == 10
    target = bytearray(3)
    assert standard_registry().copy(buffer, process_memory(target)) == 3
    assert target == b"abc"
    for offset, length in ((PAGE - 1, 2), (3 * PAGE - 1, 2), (PAGE, 2 * PAGE + 1), (PAGE, 0), (-1, 2), (1 << 64, 1)):
        with pytest.raises(MisuseError, match="not in the peer's part"):
            part.at(offset, length)


def test_each_use_of_a_peers_pages_is_its_own_whatever_became_of_another() -> None:
    memory = mmap.mmap(-1, 4 * PAGE)
    part = PeerPart(memory, 0, 4 * PAGE)
    memory[:PAGE], memory[PAGE : 2 * PAGE] = b"a" * PAGE, b"b" * PAGE
    one, two, again = part.at(0, PAGE), part.at(PAGE, PAGE), part.at(0, PAGE)
    assert hand_over(one, two)
    for buffer, byte in ((part.at(0, PAGE), b"a"), (part.at(PAGE, PAGE), b"b"), (again, b"a")):
        target = bytearray(1)
        standard_registry().copy(buffer.slice(0, 1), process_memory(target))
        assert target == byte
