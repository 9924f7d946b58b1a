"""Requests about another domain's buffer, passed on to where its reference came from; the client sees none of it.

A lease that is forwarded is a lease of this domain's own to the owner, so revoking goes the same way, and completes
when the holder at the end has answered. Depends on this package.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from idc.endpoint.callbacks import call_each
from idc.endpoint.frames import Kind
from idc.endpoint.results import Completion, Result
from idc.errors import ProtocolError, RefusedError
from idc.remote import wire
from idc.remote.reference import Access
from idc.remote.resolution import Lease, OwnerCopy, Refusal

if TYPE_CHECKING:
    from idc.endpoint.session import IncomingAsk
    from idc.remote.link import Link
    from idc.remote.registration import Held
    from idc.remote.wire import Request


@dataclass(frozen=True, slots=True, eq=False)
class _Passed:
    """What a forwarded lease is on: see `idc.remote.registration.LeaseSource`."""

    forwarder: Forwarder
    lease: int

    def given_back(self, held: Held) -> None:
        """Give the lease back to where it came from."""
        del held
        self.forwarder.given_back(self.lease)


class Forwarder:
    """What one link forwards: from its peer to another, by `serve`; and from others to its peer, by `pass_on`.

    Args:
        link: of which it is part.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._leases: dict[int, Held] = {}  # by the number that the upstream peer gave
        self._revoked: dict[int, IncomingAsk] = {}

    def serve(self, ask: IncomingAsk, request: Request) -> None:
        """The peer asks for what came from elsewhere. Raises RefusedError."""
        way = self._link.exports.way(request.reference)
        if way is None:
            raise RefusedError(Refusal.NO_ROUTE, "this domain neither owns the buffer nor forwards that reference")
        if request.hops >= wire.MOST_HOPS:
            raise RefusedError(Refusal.NO_ROUTE, f"the request came through {request.hops} domains already")
        way.forwarder.pass_on(ask, request, self._link)

    def pass_on(self, ask: IncomingAsk, request: Request, downstream: Link) -> None:
        """Ask this link's peer on behalf of another's."""
        upstream = self._link
        kind, length, data = ask.kind, request.length, request.data
        if kind == Kind.PULL:  # the answer has to fit both ways
            length = min(length, upstream.room - wire.MOVED_BYTES, downstream.room - wire.MOVED_BYTES)
        elif kind == Kind.PUSH:
            length = min(length, upstream.room - wire.REQUEST_BYTES)
            data = data[:length]
        if kind in (Kind.PULL, Kind.PUSH) and length <= 0:
            raise RefusedError(Refusal.NOT_SERVED, "where it is forwarded to, no requests are taken")

        def answered(completion: Completion) -> None:
            try:
                self._answered(ask, kind, length, completion, downstream)
            except ProtocolError:  # ends this link's connection; the one who asked has done nothing wrong
                if not ask.completed:
                    ask.refuse(Refusal.NO_ROUTE, "where the reference came from, the rules were broken")
                    downstream.notify()
                raise

        body = wire.request(request.reference, request.want, request.hops + 1, request.offset, length, data)
        upstream.ask(kind, body, answered)
        upstream.notify()

    def _answered(self, ask: IncomingAsk, kind: Kind, length: int, completion: Completion, downstream: Link) -> None:
        if completion.result is Result.ERROR:
            ask.refuse(completion.error, completion.reason)
        elif completion.result is not Result.OK:
            ask.refuse(Refusal.STALE, f"the connection to where the reference came from is over: {completion.reason}")
        elif kind == Kind.RESOLVE:
            ask.answer(wire.resolution(self._pass_lease(completion, ask, downstream)))
        elif kind == Kind.FILLED:
            ask.answer()
        else:
            copies, count, data = wire.parse_moved(kind, completion.status, length)
            ask.answer(wire.moved(copies + 1, count, data))
        downstream.notify()

    def _pass_lease(self, completion: Completion, ask: IncomingAsk, downstream: Link) -> Lease | OwnerCopy:
        answer = wire.parse_resolution(completion.status)
        if isinstance(answer, Lease) and self._link.knows(answer.lease):
            raise ProtocolError(f"lease {answer.lease} was given twice")
        hops = min(answer.hops + 1, wire.MOST_HOPS)
        if isinstance(answer, OwnerCopy):
            return replace(answer, hops=hops)
        exports = self._link.exports
        passed = _Passed(self, answer.lease)
        held = None if ask.over else exports.lend(passed, downstream, taken=bool(answer.access & Access.TAKE))
        if held is None:
            self._link.give_back(answer.lease)
            return OwnerCopy("who forwards has no lease left for this holder", answer.region, hops)
        self._leases[answer.lease] = held
        return replace(answer, lease=held.lease, hops=hops)

    def holds(self, lease: int) -> bool:
        """Whether the upstream peer gave that lease for someone else."""
        return lease in self._leases

    def given_back(self, lease: int) -> None:
        """The holder at the other end let go of it."""
        if self._leases.pop(lease, None) is None:
            return
        ask = self._revoked.pop(lease, None)
        if ask is None:
            self._link.give_back(lease)
        else:
            ask.answer()
            self._link.notify()

    def revoked(self, ask: IncomingAsk, lease: int) -> bool:
        """The upstream peer wants a lease back; False if it is none that was forwarded."""
        held = self._leases.get(lease)
        if held is None:
            return False
        if lease in self._revoked:
            raise ProtocolError(f"lease {lease} was revoked twice")
        self._revoked[lease] = ask
        held.holder.revoke(held.lease)
        return True

    def end(self) -> None:
        """The connection to the upstream peer is over: the leases that came from it are worth nothing any more."""
        leases, self._leases = self._leases, {}
        asked, self._revoked = self._revoked, {}
        call_each(partial(held.holder.revoke, held.lease) for lease, held in leases.items() if lease not in asked)
