"""Copies between every two types against plain bytes, and the count of what was copied."""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest
from buffer_support import KINDS, UNMAPPED, Foreign, bench
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.buffers import (
    FILE_RANGE,
    PROCESS_MEMORY,
    CopyCounter,
    LocalBuffer,
    PagePool,
    Registry,
    Strategy,
    file_range,
    process_memory,
    process_memory_like,
    standard_registry,
)
from idc.errors import FileRangeError, HiddenError, IdcError, MisuseError
from idc.layout import PAGE

if TYPE_CHECKING:
    from pathlib import Path

#: Hidden pages are copied to and from these alone.
MEETS_HIDDEN = {"hidden", "region"}


def _allowed(one: str, other: str) -> bool:
    return "hidden" not in (one, other) or {one, other} <= MEETS_HIDDEN


@pytest.mark.parametrize("target_kind", KINDS)
@pytest.mark.parametrize("source_kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_range_gets_from_any_type_to_any_other(source_kind: str, target_kind: str, data: Any) -> None:
    size = data.draw(st.integers(1, 3 * PAGE))
    at, to = data.draw(st.integers(0, size)), data.draw(st.integers(0, size))
    length = data.draw(st.integers(0, size - max(at, to)))
    skews = data.draw(st.integers(0, PAGE - 1)), data.draw(st.integers(0, PAGE - 1))
    old, new = bytes(i * 7 % 251 for i in range(size)), bytes(i * 11 % 241 for i in range(size))
    with bench(bounce=1000) as b:
        source, target = b.make(source_kind, new, skews[0]), b.make(target_kind, old, skews[1])
        counter = CopyCounter()
        if not _allowed(source_kind, target_kind):
            with pytest.raises(HiddenError, match="hidden"):
                b.registry.copy(source.slice(0, 1), target.slice(0, 1), counter)
            assert b.look(target) == old
            return
        count = b.registry.copy(source.slice(at, length), target.slice(to, length), counter)
        assert b.look(target) == old[:to] + new[at : at + length] + old[to + length :]
        assert b.look(source) == new
        assert counter.copied == count
        times = 2 if {source_kind, target_kind} <= UNMAPPED else 1
        if target_kind != "cow":
            assert count == times * length
        else:  # and the pages that are written in part, copied before
            assert times * length <= count < times * length + 2 * PAGE


def test_a_refused_copy_from_hidden_pages_counts_nothing() -> None:
    with bench() as b:
        counter, plain = CopyCounter(), bytearray(9)
        with pytest.raises(HiddenError, match="not mapped here: pass the buffer on"):
            b.registry.copy(b.store.allocate(9), process_memory(plain), counter)
        assert counter == CopyCounter()


def test_a_registered_pair_is_taken_in_its_direction_only() -> None:
    with bench() as b:
        one, other = b.foreign.values()
        taken = []

        def faster(source: LocalBuffer, target: LocalBuffer) -> int:
            taken.append((source, target))
            target.base[:] = source.base
            return source.length

        b.registry.register_copy(one, other, faster)
        there, back = b.make("foreign", b"abc", 0), b.make("other", b"xyz", 0)
        assert b.registry.copy(there, back) == 3
        assert b.registry.copy(back, there) == 6
        assert taken == [(there, back)]
        assert b.look(back) == b"abc"


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (5, 6), (11, 0), (2**64 - 1, 2), (1, 2**64), (-1, 5)])
def test_ranges_that_are_none_are_refused(offset: int, length: int) -> None:
    whole = process_memory(bytearray(10))
    with pytest.raises(MisuseError, match="no range"):
        whole.slice(offset, length)
    with pytest.raises(MisuseError, match="no range"):
        LocalBuffer(PROCESS_MEMORY, bytearray(10), offset, length)


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (2**63 - 1, 1), (2**64, 0)])
def test_ranges_that_no_file_has_are_refused(offset: int, length: int) -> None:
    with pytest.raises(MisuseError, match="no range"):
        file_range(0, offset, length)
    with pytest.raises(MisuseError, match="no file descriptor"):
        file_range(-1, 0, 0)


def test_a_slice_of_a_slice_does_not_reach_out_of_it() -> None:
    part = process_memory(bytearray(b"0123456789")).slice(2, 5)
    assert (len(part), part.slice(5, 0).length, part.slice(1, 4).offset) == (5, 0, 3)
    with pytest.raises(MisuseError):
        part.slice(0, 6)


def test_lengths_must_agree_and_types_be_known() -> None:
    registry = standard_registry()
    with pytest.raises(MisuseError, match="do not go into"):
        registry.copy(process_memory(b"abc"), process_memory(bytearray(4)))
    stranger = LocalBuffer(Foreign("stranger"), [1], 0, 1)
    with pytest.raises(MisuseError, match="stranger is not registered"):
        registry.copy(stranger, process_memory(bytearray(1)))
    with pytest.raises(MisuseError, match="stranger is not registered"):
        registry.register_copy(stranger.type, PROCESS_MEMORY, lambda _s, _t: 0)
    with pytest.raises(MisuseError, match="already"):
        registry.register(PROCESS_MEMORY)
    with pytest.raises(MisuseError, match="bounce"):
        Registry(bounce=0)


@pytest.mark.parametrize("kind", ["process", "region", "hidden", "file", "cow", "foreign"])
def test_overlapping_ranges_are_refused_and_adjacent_ones_copied(kind: str) -> None:
    with bench() as b:
        buffer = b.make(kind, b"abcdefgh", 0)
        with pytest.raises(MisuseError, match="overlap"):
            b.registry.copy(buffer.slice(0, 5), buffer.slice(3, 5))
        b.registry.copy(buffer.slice(0, 4), buffer.slice(4, 4))
        assert b.look(buffer) == b"abcdabcd"


def test_overlap_is_seen_through_two_views_and_two_descriptors() -> None:
    registry, memory = standard_registry(), bytearray(10)
    with memoryview(memory) as one, memoryview(memory) as other, pytest.raises(MisuseError, match="overlap"):
        registry.copy(process_memory(one).slice(0, 6), process_memory(other).slice(2, 6))
    with bench() as b:
        buffer = b.make("file", b"abcdefgh", 0)
        again = os.dup(buffer.base)
        try:
            with pytest.raises(MisuseError, match="overlap"):
                b.registry.copy(buffer, LocalBuffer(FILE_RANGE, again, 1, 8))
        finally:
            os.close(again)


@pytest.mark.parametrize("source_kind", ["process", "file", "foreign"])
def test_memory_that_cannot_be_written_is_no_target(source_kind: str) -> None:
    with bench() as b, pytest.raises(MisuseError, match="read-only"):
        b.registry.copy(b.make(source_kind, b"abc", 0), process_memory(b"xyz"))


def test_memory_that_went_away_is_named() -> None:
    registry, memory, mapping = standard_registry(), bytearray(100), mmap.mmap(-1, PAGE)
    shrunk, closed, pages = process_memory(memory), process_memory(mapping), PagePool(mapping, 0, PAGE).allocate(PAGE)
    del memory[50:]
    mapping.close()
    with pytest.raises(MisuseError, match="no range of process memory, which has 50"):
        registry.copy(shrunk, process_memory(bytearray(100)))
    for gone in (closed, pages):
        with pytest.raises(MisuseError, match="closed"):
            registry.copy(gone, process_memory(bytearray(PAGE)))
    with pytest.raises(MisuseError, match="contiguous"):
        process_memory(memoryview(memory)[::2])


@pytest.mark.parametrize("target_kind", ["process", "region", "foreign"])
def test_a_file_that_ends_too_early_is_an_error_with_what_was_read(target_kind: str) -> None:
    with bench() as b:
        source, target = b.make("file", b"abc", 0), b.make(target_kind, bytes(5), 0)
        with pytest.raises(FileRangeError, match="after 3") as caught:
            b.registry.copy(LocalBuffer(FILE_RANGE, source.base, 0, 5), target)
        assert (caught.value.errno, caught.value.done) == (errno.ENODATA, 3)
        assert isinstance(caught.value, (IdcError, OSError))


def test_a_full_file_system_is_an_error_with_its_number() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    try:
        with pytest.raises(FileRangeError, match="No space left") as caught:
            standard_registry().copy(process_memory(b"abc"), file_range(fd, 0, 3))
    finally:
        os.close(fd)
    assert (caught.value.errno, caught.value.done) == (errno.ENOSPC, 0)


def test_a_closed_or_read_only_descriptor_is_an_error_with_its_number(tmp_path: Path) -> None:
    registry, path = standard_registry(), tmp_path / "x"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(FileRangeError) as caught:
        registry.copy(process_memory(b"xyz"), file_range(fd, 0, 3))
    assert caught.value.errno == errno.EBADF
    os.close(fd)
    with pytest.raises(FileRangeError, match="descriptor") as caught:
        registry.copy(file_range(fd, 0, 3), process_memory(bytearray(3)))
    assert caught.value.errno == errno.EBADF


def test_the_generic_copy_counts_what_it_copied_before_it_failed() -> None:
    with bench(bounce=2) as b:
        source = LocalBuffer(FILE_RANGE, b.make("file", b"abc", 0).base, 0, 5)
        counter = CopyCounter()
        with pytest.raises(FileRangeError):
            b.registry.copy(source, b.make("foreign", bytes(5), 0), counter)
        assert counter.copied == 4
        assert b.registry.copy(source.slice(0, 3), b.make("foreign", bytes(3), 0)) == 6, "the bounce buffer serves on"


def test_a_type_that_copies_by_the_generic_copy_is_told() -> None:
    with bench() as b:
        inner = b.make("foreign", b"abc", 0), b.make("other", b"xyz", 0)

        class Nested(Foreign):
            def copy_to(self, source: LocalBuffer, memory: memoryview) -> None:
                b.registry.copy(*inner)

        nested = Nested("nested")
        b.registry.register(nested)
        with pytest.raises(MisuseError, match="part of itself"):
            b.registry.copy(LocalBuffer(nested, [1, 2, 3], 0, 3), inner[1])


@given(skew=st.integers(0, PAGE - 1), length=st.integers(1, 3 * PAGE))
@settings(max_examples=50, deadline=None)
def test_alignment_survives_every_route(skew: int, length: int) -> None:
    with bench() as b:
        region = b.pool.allocate(length, skew)
        there = [b.store.allocate_like(region), process_memory_like(region), file_range(0, skew, length)]
        there += [b.pool.allocate_like(other) for other in there]
        there += [b.registry.share(region), standard_registry(Strategy.COPY).share(region)]
        for buffer in there:
            assert (buffer.offset_in_page, len(buffer)) == (skew, length)
        if length > 1:
            assert region.slice(1, length - 1).offset_in_page == (skew + 1) % PAGE
        assert region.page_aligned == (skew == 0 and length % PAGE == 0)


@pytest.mark.parametrize("force", [None, Strategy.HANDOVER])
def test_a_move_in_one_pool_swaps_the_pages(force: Strategy | None) -> None:
    with bench(force=force) as b:
        source, target = b.make("region", b"s" * 5000, 17), b.make("region", b"t" * 5000, 17)
        before, counter = b.pool.pages(source), CopyCounter()
        assert b.registry.move(source, target, counter) == 0
        assert counter == CopyCounter(handed=5000)
        assert b.pool.pages(target) == before
        assert bytes(b.pool.view(target)) == b"s" * 5000


def test_a_move_that_cannot_swap_copies() -> None:
    with bench() as b:
        strict = standard_registry(Strategy.HANDOVER)
        pool = PagePool(bytearray(4 * PAGE), 0, 4 * PAGE)
        whole = b.make("region", b"s" * 5000, 17)
        held, skewed = b.make("region", bytes(5000), 17), b.make("region", bytes(5000), 18)
        b.pool.retain(held)
        for source, target in (
            (whole, held),
            (held, whole),
            (whole, skewed),
            (whole.slice(0, 100), skewed.slice(0, 100)),
            (whole, pool.allocate_like(whole)),
            (whole, process_memory(bytearray(5000))),
        ):
            expected, counter = b.look(source), CopyCounter()
            with pytest.raises(MisuseError, match="hand-over is forced"):
                strict.move(source, target, counter)
            assert counter == CopyCounter()
            assert b.registry.move(source, target, counter) == counter.copied == source.length
            assert b.look(target) == expected
        assert b.registry.move(whole.slice(0, 0), held.slice(0, 0)) == 0


def test_copying_can_be_forced() -> None:
    with bench(force=Strategy.COPY) as b:
        source, target, counter = b.make("region", b"abc", 0), b.make("region", b"xyz", 0), CopyCounter()
        assert b.registry.move(source, target, counter) == 3
        shared = b.registry.share(target, counter)
        assert counter == CopyCounter(copied=6)
        assert (shared.type, b.look(shared)) == (PROCESS_MEMORY, b"abc")


def test_mapping_can_be_forced() -> None:
    with bench(force=Strategy.MAP) as b:
        counter = CopyCounter()
        shared = b.registry.share(b.make("region", b"abc", 0), counter)
        assert (counter, b.look(shared)) == (CopyCounter(mapped=3), b"abc")
        with pytest.raises(MisuseError, match="not mapped here"):
            b.registry.share(b.make("file", b"abc", 0))
