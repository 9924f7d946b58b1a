"""Watches: which are to be told of a change, and what each of them is told next. No I/O.

A watch has at most one event on its way and one that waits, which names what all changes since then have in common. So
a watcher that is slow, or does not answer at all, costs two paths. Depends on host.registry.tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from idc.registry import frames
from idc.registry.frames import Permit

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Iterable

    from host.registry.tree import Change, Node


@dataclass(slots=True, eq=False)
class Watch:
    """One watch.

    Attributes:
        who: the domain that is told.
        number: its name for it.
        path: at or below which changes count.
        pending: path of the event that waits; empty if none does.
        changes: that it stands for.
        queue: of the watches of its link that have an event which waits, and none on its way.
        but: of whose link it does not tell the changes; None: of all.
        nodes: its events bring what is there.
        told: an event is on its way.
        queued: it is in the queue.
    """

    who: str
    number: int
    path: str
    pending: str
    queue: deque[Watch]
    but: object = None
    nodes: bool = False
    changes: int = 0
    told: bool = False
    queued: bool = False

    def add(self, path: str) -> None:
        """One more change."""
        self.changes += 1
        self.pending = path if not self.pending else common(self.pending, path)
        self.enqueue()

    def enqueue(self) -> None:
        """Have the event that waits sent next, if there is one and none is on its way."""
        if self.pending and not self.told and not self.queued:
            self.queued = True
            self.queue.append(self)

    def take(self) -> None:
        """The event that waits is on its way now."""
        self.pending, self.changes, self.told = "", 0, True


class Watches:
    """All watches, by path."""

    def __init__(self) -> None:
        self._at: dict[str, list[Watch]] = {}

    def add(self, watch: Watch) -> None:
        """From now on it is told."""
        self._at.setdefault(watch.path, []).append(watch)

    def remove(self, watch: Watch) -> None:
        """No more."""
        there = self._at[watch.path]
        there.remove(watch)
        if not there:
            del self._at[watch.path]

    def note(self, changes: Iterable[Change], by: object = None) -> None:
        """Those that watch what changed, and may read it or could, have an event that waits now. `by`: whose link."""
        for change in changes:
            for path in _upwards(change.path):
                for watch in self._at.get(path, ()):
                    if by is not None and watch.but is by:
                        continue
                    if _readable(change.before, watch.who) or _readable(change.after, watch.who):
                        watch.add(change.path)


def common(one: str, other: str) -> str:
    """The deepest path at or below which both are."""
    shared = []
    for a, b in zip(frames.split(one), frames.split(other), strict=False):
        if a != b:
            break
        shared.append(a)
    return "/" + "/".join(shared)


def _upwards(path: str) -> Iterable[str]:
    while path != "/":
        yield path
        path = path.rpartition("/")[0] or "/"
    yield "/"


def _readable(node: Node | None, who: str) -> bool:
    return node is not None and bool(node.permissions.of(who) & Permit.READ)
