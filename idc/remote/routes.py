"""How bytes travel, which way is taken, and what a refusal is worth there. Rules: docs/remote-buffers.md. No I/O.

Depends on idc.remote.resolution.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from idc.remote.resolution import Lease

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.remote.resolution import OwnerCopy


class Route(enum.Enum):
    """How the bytes of a remote buffer get here or there, in the order of preference."""

    DIRECT = "direct"
    HOST = "host copy"
    OWNER = "owner copy"
    NETWORK = "network"


class Worth(enum.Enum):
    """What it is worth that the owner, or a broker, refuses: see the memory and authority model."""

    SOFT = "soft"
    """An agreement: it protects against mistakes."""
    HARD = "hard"
    """Whoever is refused cannot reach the bytes."""


@dataclass(frozen=True, slots=True)
class Way:
    """What is known when a route is chosen.

    Attributes:
        answer: what the owner answered to RESOLVE.
        own: the buffer is registered by this very domain.
        mapped: the lease's region is mapped here.
        writing: bytes go from here to the buffer.
        writable: the hypervisor lets this member write there.
        broker: there is one to ask.
        placed: the local buffer is pages of a region, so that a broker can reach it.
        near: the peer is on this machine.
    """

    answer: Lease | OwnerCopy | None
    own: bool
    mapped: bool
    writing: bool
    writable: bool
    broker: bool
    placed: bool
    near: bool


def choose(way: Way, forced: Route | None) -> Route | str:
    """The route, or in words why the forced one cannot be taken."""
    for route, against in _look(way):
        if forced is None and not against:
            return route
        if forced is route:
            return f"{route.value} is forced, but {against}" if against else route
    raise AssertionError("one of owner copy and network is always possible")


def _look(way: Way) -> Iterator[tuple[Route, str]]:
    """Each route with what is against it, in words."""
    lease = isinstance(way.answer, Lease)
    no_lease = "" if lease or way.answer is None else f"there is no lease: {way.answer.reason}"  # type: ignore[union-attr]
    if way.own:
        yield Route.DIRECT, ""
    elif not lease:
        yield Route.DIRECT, no_lease
    elif not way.mapped:
        yield Route.DIRECT, "the buffer's region is not mapped here"
    else:
        yield Route.DIRECT, "this member may only read there" if way.writing and not way.writable else ""
    if way.own:
        yield from ((route, "the buffer is this domain's own") for route in (Route.HOST, Route.OWNER, Route.NETWORK))
        return
    if not lease:
        yield Route.HOST, no_lease
    elif not way.broker:
        yield Route.HOST, "there is no broker to ask, or it does not reach the buffer"
    else:
        yield Route.HOST, "" if way.placed else "the local buffer is no pages of a region that is known here"
    hops = way.answer.hops if way.answer is not None else 0
    far = f"the owner is {hops} domains further on" if hops else "" if way.near else "the peer is on another machine"
    yield Route.OWNER, far
    yield Route.NETWORK, "" if far else "the owner is the peer, on this machine"


def worth(*, mapped: bool, writing: bool, writable: bool) -> Worth:
    """What a refusal is worth to who maps the buffer's region, or does not; `writable` is about that mapping.

    Not a matter of the route that is taken: a holder that maps the pages reaches them, whatever it was told.
    """
    return Worth.SOFT if mapped and (writable or not writing) else Worth.HARD
