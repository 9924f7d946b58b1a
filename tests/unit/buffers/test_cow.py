"""Private copy on write over shared pages, against a model that copies each page when it is first written."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.buffers import CopyCounter, CowView, LocalBuffer, file_range, process_memory, standard_registry
from idc.errors import MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

SIZE = 4 * PAGE
Step = tuple[str, int, int]
STEP = st.tuples(st.sampled_from(["write", "owner"]), st.integers(0, SIZE), st.integers(0, PAGE + 50))


@pytest.fixture
def shared() -> Iterator[tuple[mmap.mmap, mmap.mmap]]:
    """A region as its owner maps it, and as a read-only member does."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, SIZE)
    with mmap.mmap(fd, SIZE) as owner, mmap.mmap(fd, SIZE, prot=mmap.PROT_READ) as reader:
        os.close(fd)
        yield owner, reader


@given(skew=st.integers(0, PAGE), cut=st.integers(0, PAGE), steps=st.lists(STEP, max_size=12))
@settings(max_examples=150, deadline=None)
def test_pages_are_shared_until_they_are_written(skew: int, cut: int, steps: list[Step]) -> None:
    with mmap.mmap(-1, SIZE) as memory:
        memory[:] = bytes(i % 249 for i in range(SIZE))
        source = process_memory(memory).slice(skew, SIZE - skew - cut)
        view, private, mark, copied = CowView(source), dict[int, bytes](), 250, 0
        registry, buffer = standard_registry(), view.buffer()

        def expected() -> bytes:
            pages = (private.get(page, memory[page * PAGE : (page + 1) * PAGE]) for page in range(4))
            return b"".join(pages)[skew : SIZE - cut]

        for kind, at, length in steps:
            data = bytes([mark]) * length
            mark = 250 + (mark + 1) % 6
            if kind == "owner":
                memory[at : at + length] = data[: max(SIZE - at, 0)]
                continue
            begin, end = max(at, skew), min(at + length, SIZE - cut)
            if begin >= end:
                continue
            for page in range(begin // PAGE, -(-end // PAGE)):
                own = bytearray(private.get(page, memory[page * PAGE : (page + 1) * PAGE]))
                low, high = max(begin, page * PAGE), min(end, (page + 1) * PAGE)
                inside = max(page * PAGE, skew), min((page + 1) * PAGE, SIZE - cut)
                if page not in private and (low, high) != inside:
                    copied += inside[1] - inside[0]
                own[low - page * PAGE : high - page * PAGE] = data[: high - low]
                private[page] = bytes(own)
            registry.copy(process_memory(data[: end - begin]), buffer.slice(begin - skew, end - begin))
            assert view.private_pages == len(private)
            assert view.counter.copied == copied
            assert b"".join(view.pieces(0, source.length)) == expected()
        target = bytearray(source.length)
        assert registry.copy(buffer, process_memory(target)) == source.length
        assert target == expected()
        del view, buffer


def test_reading_copies_nothing_and_cannot_write(shared: tuple[mmap.mmap, mmap.mmap]) -> None:
    owner, reader = shared
    view = CowView(process_memory(reader))
    (piece,) = view.pieces(10, 3 * PAGE)
    owner[10:13] = b"abc"
    assert bytes(piece[:3]) == b"abc", "it is the owner's memory itself"
    assert piece.readonly
    assert (view.private_pages, view.counter) == (0, CopyCounter())
    piece.release()


def test_a_write_stays_private_and_its_neighbours_stay_shared(shared: tuple[mmap.mmap, mmap.mmap]) -> None:
    owner, reader = shared
    counter = CopyCounter()
    registry = standard_registry()
    buffer = registry.share(process_memory(reader), counter)
    assert counter == CopyCounter(mapped=SIZE)
    assert registry.copy(process_memory(b"mine"), buffer.slice(PAGE, 4), counter) == 4 + PAGE
    owner[:] = b"#" * SIZE
    pieces = list(buffer.base.pieces(0, SIZE))
    assert [len(piece) for piece in pieces] == [PAGE, PAGE, 2 * PAGE]
    assert b"".join(pieces) == b"#" * PAGE + b"mine" + bytes(PAGE - 4) + b"#" * 2 * PAGE
    assert owner[PAGE : PAGE + 4] == b"####"
    assert registry.copy(process_memory(bytes(PAGE)), buffer.slice(0, PAGE), counter) == PAGE, "replaced in full"
    for piece in pieces:
        piece.release()


def test_ranges_outside_and_sources_that_are_not_mapped_are_refused() -> None:
    view = CowView(process_memory(bytearray(10)))
    for call in (lambda: list(view.pieces(5, 6)), lambda: view.write(-1, memoryview(b"x")),
                 lambda: view.write(2**64 - 1, memoryview(b"x")), lambda: view.buffer().slice(0, 11)):
        with pytest.raises(MisuseError, match="no range"):
            call()
    for unmapped in (file_range(0, 0, 1), view.buffer()):
        assert isinstance(unmapped, LocalBuffer)
        with pytest.raises(MisuseError, match="not mapped here"):
            CowView(unmapped)
