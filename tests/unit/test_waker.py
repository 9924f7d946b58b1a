"""The mask of a doorbell that is rung without end: when it comes, what it does to a selector, when it goes."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING

import pytest

from idc.bell import Waker
from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST_LOOK = 0.016


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def readable(waker: Waker) -> bool:
    poller = select.poll()
    poller.register(waker.fileno(), select.POLLIN)
    return bool(poller.poll(0))


def storm(waker: Waker, event: int) -> None:
    deadline = time.monotonic() + 5
    while not waker.masked:
        assert time.monotonic() < deadline
        os.eventfd_write(event, 1000)
        waker.wait(0)


def test_progress_pays_for_rings_however_many(event: int) -> None:
    waker = Waker(event)
    for n in range(1000):
        os.eventfd_write(event, 1)
        assert waker.wait(1, n)
        if n % 2:  # and the next ring is behind what was taken without it
            os.eventfd_write(event, 1)
            assert waker.wait(1, n)
    assert waker.count == 0


def test_time_without_rings_is_no_storm(event: int) -> None:
    waker = Waker(event)
    assert not any(waker.wait(0.001) for _ in range(100))
    assert waker.count == 0


@pytest.mark.parametrize("early", [True, False])
def test_a_storm_hides_the_descriptor_from_a_selector_until_it_is_over(event: int, early: bool) -> None:
    waker = Waker(event)
    if early:
        assert not readable(waker)
    storm(waker, event)
    os.eventfd_write(event, 1000)
    assert not readable(waker)
    patience = waker.patience
    assert patience is not None
    assert patience <= LONGEST_LOOK
    began = time.monotonic()
    assert waker.wait(1)  # looks when that is due, not at once
    assert 0.003 < time.monotonic() - began < 0.5
    while waker.masked:
        waker.wait(LONGEST_LOOK)
    assert waker.patience is None
    assert waker.count == 1
    os.eventfd_write(event, 1)
    assert readable(waker)
    assert waker.wait(0, 1)
    waker.close()


def test_a_masked_descriptor_is_not_waited_for_longer_than_asked(event: int) -> None:
    waker = Waker(event)
    storm(waker, event)
    cpu = time.process_time()
    for _ in range(20):
        os.eventfd_write(event, 1000)
        waker.wait(0.0005)
    assert waker.masked
    assert time.process_time() - cpu < 0.1
    waker.close()


def test_a_descriptor_that_is_closed_is_the_callers_mistake() -> None:
    fd = os.eventfd(0)
    waker = Waker(fd)
    os.close(fd)
    with pytest.raises(MisuseError, match="was it closed"):
        waker.wait(0.01)
