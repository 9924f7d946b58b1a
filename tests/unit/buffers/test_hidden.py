"""Hidden pages: passed on, never read; who holds them copies."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from buffer_support import bench

from idc.buffers import HIDDEN_PAGES, Hidden, LocalBuffer, MemfdStore, process_memory, standard_registry
from idc.errors import BackPressuredError, FileRangeError, HiddenError, MisuseError
from idc.layout import PAGE


def test_the_holder_can_slice_and_pass_on_but_not_look() -> None:
    with bench() as b:
        hidden = b.make("hidden", b"secret", 7)
        part = hidden.slice(2, 3)
        assert (len(part), part.offset_in_page) == (3, 9)
        for call in (HIDDEN_PAGES.copy_to, lambda h, m: HIDDEN_PAGES.copy_from(m, h)):
            with pytest.raises(HiddenError, match="not mapped here: pass the buffer on"):
                call(part, memoryview(bytearray(3)))
        with pytest.raises(HiddenError, match="not mapped here"):
            b.registry.copy(part, process_memory(bytearray(3)))
        with pytest.raises(MisuseError, match="no range"):
            hidden.slice(3, 4)
        assert b.look(part) == b"cre"


def test_the_store_is_never_mapped() -> None:
    with bench() as b:
        b.look(b.make("hidden", b"secret", 0))
        assert "idc-hidden" not in Path("/proc/self/maps").read_text()


def test_released_pages_are_wiped_counted_and_refused() -> None:
    with bench() as b:
        before = b.store.free_pages
        hidden = b.make("hidden", b"s" * 3 * PAGE, 1)
        b.store.retain(hidden)
        b.store.release(hidden)
        assert b.look(hidden) == b"s" * 3 * PAGE
        b.store.release(hidden)
        assert b.store.free_pages == before
        for call in (b.store.release, b.store.retain, lambda h: h.slice(0, 1), b.look):
            with pytest.raises(MisuseError, match="released already"):
                call(hidden)
        assert b.look(b.store.allocate(4 * PAGE)) == bytes(4 * PAGE)


def test_pages_of_two_stores_do_not_mix() -> None:
    with bench() as b, MemfdStore(PAGE) as other:
        here, there = b.store.allocate(9), other.allocate(9)
        for pair in ((here, there), (there, here)):
            with pytest.raises(MisuseError, match="not of this store"):
                b.registry.copy(*pair)
        with pytest.raises(MisuseError, match="not of this store"):
            other.release(here)
        with pytest.raises(BackPressuredError):
            other.allocate(1)


def test_a_closed_store_refuses_and_gives_its_descriptor_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = MemfdStore(PAGE)
    hidden = store.allocate(9)
    one, other = hidden.slice(0, 4), hidden.slice(4, 4)
    store.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(MisuseError, match="closed"):
        standard_registry().copy(one, other)
    with pytest.raises(MisuseError, match="closed"):
        store.release(one)


def test_a_store_that_does_not_fit_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileRangeError, match="no 4096 bytes for hidden pages") as caught:
        MemfdStore(PAGE)
    assert caught.value.errno == errno.ENOSPC
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(MisuseError, match="whole pages"):
        MemfdStore(PAGE + 1)


def test_another_store_can_be_behind_the_same_type() -> None:
    """As a broker in another domain is: the application's side knows handles, and asks for copies."""

    class Broker:
        def __init__(self) -> None:
            self.asked: list[tuple[Any, ...]] = []

        def extent(self, handle: int) -> int:
            return {5: PAGE, 6: 2 * PAGE}[handle]

        def copy(self, source: LocalBuffer, target: LocalBuffer) -> int:
            self.asked.append((source.base.handle, source.offset, target.base.handle, target.offset, source.length))
            return source.length

    broker = Broker()
    source = LocalBuffer(HIDDEN_PAGES, Hidden(broker, 5), 10, 100)
    target = LocalBuffer(HIDDEN_PAGES, Hidden(broker, 6), PAGE, PAGE).slice(10, 100)
    assert standard_registry().copy(source, target) == 100
    assert broker.asked == [(5, 10, 6, PAGE + 10, 100)]
    with pytest.raises(MisuseError, match="no range"):
        LocalBuffer(HIDDEN_PAGES, Hidden(broker, 5), 1, PAGE)
    with pytest.raises(MisuseError, match="overlap"):
        standard_registry().copy(source, LocalBuffer(HIDDEN_PAGES, Hidden(broker, 5), 50, 100))
