"""Copy routines: each right for every size and alignment, chosen by measurement, forceable."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idc._core import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Iterator

ROUTINES = range(lib.idc_copy_count())
NAMES = [ffi.string(lib.idc_copy_name(i)).decode() for i in ROUTINES]
GUARD = 64


@pytest.fixture
def kept_choice() -> Iterator[None]:
    before = [lib.idc_copy_chosen(c) for c in range(3)]
    yield
    for size_class, routine in enumerate(before):
        assert lib.idc_copy_force(size_class, routine) == lib.IDC_OK


@pytest.mark.parametrize("routine", ROUTINES, ids=NAMES)
@given(size=st.one_of(st.integers(0, 300), st.integers(0, 70_000)), skew=st.integers(0, 31), turn=st.integers(0, 31))
def test_routine_copies_exactly(routine: int, size: int, skew: int, turn: int) -> None:
    pattern = bytes(i * 7 % 251 for i in range(256)) * (size // 256 + 1)
    source = ffi.new("uint8_t[]", size + 64)
    target = ffi.new("uint8_t[]", size + 64 + 2 * GUARD)
    ffi.memmove(source + turn, pattern, size)
    lib.idc_copy_run(routine, target + GUARD + skew, source + turn, size)
    got = bytes(ffi.buffer(target, size + 64 + 2 * GUARD))
    assert got[GUARD + skew :][:size] == pattern[:size]
    assert not any(got[: GUARD + skew])
    assert not any(got[GUARD + skew + size :])


@pytest.mark.usefixtures("kept_choice")
def test_choice_can_be_forced_and_measured_again() -> None:
    assert {"libc", "words"} <= set(NAMES)
    for size_class in range(3):
        for routine in ROUTINES:
            assert lib.idc_copy_force(size_class, routine) == lib.IDC_OK
            assert lib.idc_copy_chosen(size_class) == routine
        assert lib.idc_copy_force(size_class, -1) == lib.IDC_OK
        assert lib.idc_copy_chosen(size_class) in ROUTINES
    assert lib.idc_copy_force(3, 0) == lib.IDC_EINVAL
    assert lib.idc_copy_force(0, len(NAMES)) == lib.IDC_EINVAL
    assert lib.idc_copy_name(len(NAMES)) == ffi.NULL
    assert lib.idc_copy_chosen(-1) == lib.IDC_EINVAL


@pytest.mark.usefixtures("kept_choice")
def test_the_chosen_routine_is_not_far_from_the_best() -> None:
    """Measured again here: the choice may lose to noise, but not by half."""
    area = ffi.new("uint8_t[]", 2 << 20)
    for size_class, chunk in ((0, 512), (1, 4096), (2, 65536)):
        lib.idc_copy_force(size_class, -1)
        best = {
            routine: min(
                lib.idc_loop_copy(routine, area, area + (1 << 20), 1 << 20, chunk, (4 << 20) // chunk)
                for _ in range(7)
            )
            for routine in ROUTINES
        }
        assert best[lib.idc_copy_chosen(size_class)] < 2 * min(best.values()), (chunk, NAMES, best)


def test_copy_serves_every_size_class() -> None:
    for size in (0, 1, 63, 64, 65, 1024, 1025, 16384, 16385, 100_000):
        data = bytes(i * 11 % 256 for i in range(size))
        target = ffi.new("uint8_t[]", size + 1)
        lib.idc_copy(target, ffi.from_buffer(data), size)
        assert bytes(ffi.buffer(target, size + 1)) == data + b"\0"
