"""Two sides that measure in turn: never both at once, each slot's two parts next to each other, and no deadlock."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import pytest

from testbed.bench.baton import ALONE, Baton
from testbed.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Callable


def both(one: Callable[[Baton], None], other: Callable[[Baton], None]) -> None:
    """Each side in a thread of its own; what ends closes its socket, as a process does."""
    links = socket.socketpair()

    def side(link: socket.socket, work: Callable[[Baton], None], *, first: bool) -> None:
        with link:
            work(Baton(link, first=first))

    threads = [threading.Thread(target=side, args=(links[0], one), kwargs={"first": True}),
               threading.Thread(target=side, args=(links[1], other), kwargs={"first": False})]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "it waits for somebody who waits too"


class Diary:
    """Who did what when."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._busy = threading.Lock()

    def work(self, name: str, slots: int) -> Callable[[Baton], None]:
        def run(baton: Baton) -> None:
            for slot in range(slots):
                assert self._busy.acquire(blocking=False), "both at once"
                self.done.append(f"{name}{slot}")
                self._busy.release()
                if slot < slots - 1:
                    baton.next()

        return run


def test_the_order_within_a_slot_alternates() -> None:
    diary = Diary()
    both(diary.work("a", 5), diary.work("b", 5))
    assert diary.done == ["a0", "b0", "b1", "a1", "a2", "b2", "b3", "a3", "a4", "b4"]


@pytest.mark.parametrize(("one", "other"), [(1, 1), (1, 6), (6, 1), (4, 7), (7, 4)])
def test_whoever_has_more_to_do_goes_on_alone(one: int, other: int) -> None:
    diary = Diary()
    both(diary.work("a", one), diary.work("b", other))
    assert sorted(diary.done) == sorted([f"a{n}" for n in range(one)] + [f"b{n}" for n in range(other)])


def test_one_that_fails_at_once_leaves_the_rest_to_the_other() -> None:
    diary = Diary()
    both(lambda _: None, diary.work("b", 3))
    both(diary.work("a", 3), lambda _: None)
    assert diary.done == ["b0", "b1", "b2", "a0", "a1", "a2"]


def test_alone_there_is_nothing_to_wait_for() -> None:
    ALONE.next()
    assert not ALONE.shared


@pytest.mark.parametrize("text", ["", "first", "7", "x,first", "0,third", "9999,first"])
def test_what_is_no_socket_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"--in-turn .*: it is for --against alone"):
        Baton.told(text)


def test_told_by_a_command_line_it_is_not_handed_on() -> None:
    one, other = socket.socketpair()
    with other:
        one.set_inheritable(True)
        fd = one.detach()
        baton = Baton.told(f"{fd},first")
        assert baton.shared
        other.close()
        baton.next()
        assert not baton.shared
