"""Two real endpoints over queues, step by step, against a model: data, counts, and that nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from remote_support import SIZE, Site, drive, join, left_over
from support import LocalRegion

from idc.buffers import LocalBuffer, Strategy, process_memory
from idc.endpoint import Completion, Result, State
from idc.errors import BackPressuredError
from idc.layout import PAGE
from idc.remote import Access, Borrowed, Refusal, Registration, RemoteBuffer, Route
from idc.remote import transfer as transfers
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable

RW = Access.READ | Access.WRITE
LENGTH = 3 * PAGE + 11
OVER = {Refusal.STALE, Refusal.WITHDRAWN}


@dataclass(eq=False)
class Lent:
    """A registration, and what its bytes must be when nothing is under way."""

    registration: Registration
    buffer: LocalBuffer
    pages: bool
    outlives: bool
    content: bytearray
    ended: list[Completion] | None = None
    told: list[tuple[int, int]] = field(default_factory=list)
    writes: int = 0  # under way
    written: int = 0  # begun

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"lent {id(self):x}")


@dataclass(eq=False)
class Used:
    """A remote buffer of it."""

    remote: RemoteBuffer
    lent: Lent
    pending: int = 0
    begun: int = 0
    shared: list[Borrowed] = field(default_factory=list)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(f"used {id(self):x}")


class Model(RuleBasedStateMachine):
    """Each rule does one thing and pumps a little, or not at all; `settle` lets everything come to rest."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(transfers, "STEP", PAGE)
        self.shared = LocalRegion(size=SIZE)
        one, other = join(self.shared)
        self.owner, self.holder = Site(one, count=5, leases=3), Site(other)
        ports = meeting()
        self.back = self.owner.endpoint(ports[0], name="holder", asks=2, serves=2, ask_bytes=1024)
        self.front = self.holder.endpoint(ports[1], name="owner", asks=2, serves=2, ask_bytes=2048, buffers=4)
        self.lent: list[Lent] = []
        self.used: list[Used] = []
        self.under_way = 0
        self.free = self.owner.pool.free_pages
        self.connect()

    @property
    def connected(self) -> bool:
        return self.front.state is self.back.state is State.CONNECTED

    def connect(self) -> None:
        drive(self.front, self.back, until=lambda: self.connected)

    def teardown(self) -> None:
        try:
            self.end()
        finally:
            self.patch.undo()
            self.shared.close()

    def end(self) -> None:
        """Nothing may be left."""
        self.settle()
        self.let_go()
        for lent in self.lent:
            if lent.ended is None:
                lent.ended = []
                lent.registration.unregister(lent.ended.append)
        self.settle()
        for endpoint in (self.front, self.back):
            endpoint.destroy()
        assert not left_over(self.front, self.back)
        assert self.owner.exports.registered == 0
        for lent in self.lent:
            if lent.pages:
                self.owner.pool.release(lent.buffer)
        assert self.owner.pool.free_pages == self.free

    def let_go(self) -> None:
        for used in self.used:
            for shared in used.shared:
                shared.release()
            used.shared.clear()

    def settle(self) -> None:
        for _ in range(200):
            if not self.front.pump() | self.back.pump() and not self.under_way:
                break
        assert not self.under_way

    # -- the owner

    @precondition(lambda self: self.connected)
    @rule(pages=st.booleans(), outlives=st.booleans(), skew=st.sampled_from([0, 1, 4000]), seed=st.integers(0, 255))
    def register(self, *, pages: bool, outlives: bool, skew: int, seed: int) -> None:
        content = bytearray(bytes([seed]) * LENGTH)
        buffer = self.owner.fill(bytes(content), skew) if pages else process_memory(bytearray(content))
        told: list[tuple[int, int]] = []
        full = self.owner.exports.registered == 5
        try:
            registration = self.back.register(buffer, RW, filled=lambda *what: told.append(what), outlives=outlives)
        except BackPressuredError:
            assert full
            if pages:
                self.owner.pool.release(buffer)
            return
        assert not full
        self.lent.append(Lent(registration, buffer, pages, outlives, content, told=told))

    @precondition(lambda self: any(lent.ended is None for lent in self.lent))
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        lent = data.draw(st.sampled_from([lent for lent in self.lent if lent.ended is None]))
        lent.ended = told = []
        self.under_way += 1

        def done(completion: Completion) -> None:
            assert completion.result is Result.OK
            told.append(completion)
            self.under_way -= 1
            assert not any(used.shared for used in self.used if used.lent is lent), "still shared"

        for used in self.used:  # an unregister that waits for this test to let go would wait for ever
            if used.lent is lent:
                for shared in used.shared:
                    shared.release()
                used.shared.clear()
        lent.registration.unregister(done, timeout=None)
        assert not lent.registration.live

    # -- the holder

    @precondition(lambda self: self.connected and self.lent)
    @rule(data=st.data(), route=st.sampled_from([None, None, Route.DIRECT, Route.OWNER]))
    def use(self, data: st.DataObject, route: Route | None) -> None:
        lent = data.draw(st.sampled_from([lent for lent in self.lent if lent.ended is None] or self.lent[-1:]))
        if lent.ended is not None:
            return
        try:
            self.used.append(Used(self.front.remote(lent.registration.reference(), route=route), lent))
        except BackPressuredError:
            assert sum(not used.remote.closed or bool(used.pending or used.shared) for used in self.used) >= 4

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.used)).remote.close()

    @precondition(lambda self: self.used)
    @rule(data=st.data(), writing=st.booleans(), at=st.integers(0, LENGTH), length=st.integers(0, LENGTH),
          tell=st.booleans())
    def transfer(self, data: st.DataObject, at: int, length: int, *, writing: bool, tell: bool) -> None:
        used = data.draw(st.sampled_from(self.used))
        length = min(length, LENGTH - at)
        lent, copied = used.lent, used.remote.counter.copied
        alone, number = not used.pending, used.begun + 1
        local = bytearray(bytes([at % 251]) * length)
        still, before = not lent.writes, lent.written
        if writing:
            lent.writes += 1
            lent.written += 1

        def done(completion: Completion) -> None:
            used.pending -= 1
            self.under_way -= 1
            forced = used.remote.forced
            if completion.result is Result.OK:
                assert used.remote.route is not None
                if alone and used.begun == number:
                    times = 1 if used.remote.route is Route.DIRECT else 2
                    assert used.remote.counter.copied - copied == times * length
                if writing:
                    lent.content[at:at + length] = local
                elif still and lent.written == before:
                    assert local == lent.content[at:at + length]
                assert used.remote.route in ((Route.DIRECT, Route.OWNER) if forced is None else (forced,))
            elif completion.result is Result.ERROR:
                assert completion.error in OVER if lent.pages or forced is not Route.DIRECT else (
                    completion.error in OVER | {Refusal.FORCED})
                if completion.error in OVER:
                    assert not lent.registration.live
            else:
                assert completion.result is Result.OUTCOME_UNKNOWN
                assert not self.connected
            if writing:
                lent.writes -= 1
                if completion.result is not Result.OK or lent.writes:
                    lent.writes = 1 << 30  # undefined from now on

        operation = partial_send(used.remote, tell) if writing else used.remote.receive_from
        result = operation(process_memory(local), done, offset=at)
        if result is Result.OK:
            used.pending += 1
            used.begun += 1
            self.under_way += 1
        else:
            if writing:
                lent.writes -= 1
            link: Any = self.front._party
            assert (result is Result.CLOSED) == used.remote.closed
            assert result is Result.CLOSED or (result is Result.BACK_PRESSURED and link.under_way == 4)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        used = data.draw(st.sampled_from(self.used))

        def got(completion: Completion, borrowed: Borrowed | None) -> None:
            self.under_way -= 1
            used.pending -= 1
            if borrowed is not None and used.lent.ended is None:
                used.shared.append(borrowed)
            elif borrowed is not None:
                borrowed.release()
            else:
                assert completion.result in (Result.ERROR, Result.OUTCOME_UNKNOWN)

        if used.remote.share(got) is Result.OK:
            used.pending += 1
            used.begun += 1
            self.under_way += 1

    @rule()
    def give_back(self) -> None:
        self.let_go()

    # -- both

    @rule(front=st.integers(0, 4), back=st.integers(0, 4))
    def pump(self, front: int, back: int) -> None:
        for _ in range(front):
            self.front.pump()
        for _ in range(back):
            self.back.pump()

    @precondition(lambda self: self.connected)
    @rule(mine=st.booleans())
    def disconnect(self, *, mine: bool) -> None:
        (self.back if mine else self.front).disconnect()
        drive(self.front, self.back, until=lambda: not (self.front.connections - self.back.connections))
        self.connect()
        assert not self.under_way, "not completed by the end of the connection"
        assert not left_over(self.front, self.back)
        for lent in self.lent:
            if not lent.outlives and lent.ended is None:
                assert not lent.registration.live
                lent.ended = []
        for used in self.used:
            for shared in used.shared:
                assert shared.lost or not used.remote.mapped
                shared.release()
        self.used.clear()

    @rule()
    def rest(self) -> None:
        """Everything that was begun ends; then counts and bytes are what the model says."""
        self.settle()
        live = [lent for lent in self.lent if lent.ended is None]
        assert self.owner.exports.registered == len(live)
        link: Any = self.front._party
        assert {used.remote for used in self.used if not used.remote.closed or any(
            shared.strategy is Strategy.MAP for shared in used.shared)} == link._buffers
        for lent in live:
            if lent.writes == 0:
                found = bytearray(LENGTH)
                self.owner.exports.registry.copy(lent.buffer, process_memory(found))
                assert found == lent.content

    @invariant()
    def bounded(self) -> None:
        exports = self.owner.exports
        assert exports.registered <= 5
        assert exports.leases <= 3
        assert self.holder.exports.registered == 0


def partial_send(remote: RemoteBuffer, tell: bool) -> Callable[..., Result]:
    def send(local: LocalBuffer, done: Callable[[Completion], None], offset: int) -> Result:
        return remote.send_to(local, done, offset=offset, filled=tell)

    return send


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
