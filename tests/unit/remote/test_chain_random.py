"""Random sequences on a chain of three domains, replayed by seed: everything completes once, and nothing is left."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
from remote_support import SIZE, Site, drive, join, left_over
from support import LocalRegion

from idc.buffers import process_memory
from idc.endpoint import Completion, Endpoint, Result, State
from idc.errors import BackPressuredError, MisuseError
from idc.layout import PAGE
from idc.remote import Access, Borrowed, Registration, RemoteBuffer
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTH = 5 * PAGE
STEPS = 250


class Chaos:
    """A - B - C with small tables; `steps` does one random thing after another."""

    def __init__(self, seed: int, region: LocalRegion, *, near: bool) -> None:
        self.chance = random.Random(seed)
        a, c = join(region)
        self.a = Site(a, count=4, leases=3)
        self.b = Site(leases=2, forwards=2)
        self.c = Site(*([c] if near else []))
        ends = [*meeting(), *meeting()]
        small: dict[str, Any] = {"asks": 2, "serves": 2, "buffers": 3, "operations": 3}
        self.all: list[Endpoint] = [
            self.a.endpoint(ends[0], name="B", **small), self.b.endpoint(ends[1], name="A", ask_bytes=700, **small),
            self.b.endpoint(ends[2], name="C", **small), self.c.endpoint(ends[3], name="B", **small)]
        self.connect()
        self.registrations: list[Registration] = []
        self.ways: list[RemoteBuffer] = []
        self.remotes: list[RemoteBuffer] = []
        self.borrowed: list[Borrowed] = []
        self.begun = self.ended = 0
        self.cuts = {0: 0, 2: 0}
        self.unregistering = 0

    def connect(self) -> None:
        drive(*self.all, until=lambda: all(e.state is State.CONNECTED for e in self.all))

    def done(self) -> Callable[[Completion], None]:
        """For one operation: to be called once."""
        calls: list[Completion] = []

        def done(completion: Completion) -> None:
            assert not calls
            calls.append(completion)
            self.ended += 1

        return done

    def got(self, completion: Completion, borrowed: Borrowed | None) -> None:
        self.ended += 1
        assert (completion.result is Result.OK) == (borrowed is not None)
        if borrowed is not None:
            self.borrowed.append(borrowed)

    def step(self) -> None:
        connections = [1 + self.cuts[0]] * 2 + [1 + self.cuts[2]] * 2
        assert [e.connections for e in self.all] == connections, "an honest peer broke a rule"
        assert all(e.state is State.CONNECTED for e in self.all), [e.reason for e in self.all]
        self.chance.choice((self.lend, self.pass_on, *4 * (self.use,), self.borrow, self.release, self.close, self.end,
                            *3 * (self.pump,), self.cut))()

    def lend(self) -> None:
        """A registers."""
        buffer = self.a.pool.allocate(LENGTH) if self.chance.random() < 0.7 else process_memory(bytearray(LENGTH))
        try:
            self.registrations.append(self.all[0].register(
                buffer, Access.READ | Access.WRITE | Access.TAKE, outlives=self.chance.random() < 0.3))
        except BackPressuredError:
            assert self.a.exports.registered == 4
        if buffer.type.name == "region pages":
            self.a.pool.release(buffer)

    def pass_on(self) -> None:
        """B forwards to C."""
        live = [registration for registration in self.registrations if registration.live]
        if not live:
            return
        try:
            way = self.all[1].remote(self.chance.choice(live).reference())
        except BackPressuredError:
            return
        self.ways.append(way)
        try:
            self.remotes.append(self.all[3].remote(way.forward()))
        except BackPressuredError:
            way.close()
            self.ways.remove(way)

    def use(self) -> None:
        """C, or B itself, transfers."""
        users = self.remotes + self.ways
        if not users:
            return
        remote = self.chance.choice(users)
        length = self.chance.choice((0, 1, 4096, LENGTH))
        local = process_memory(bytearray(length))
        operation = remote.send_to if self.chance.random() < 0.5 else remote.receive_from
        self.begun += operation(local, self.done()) is Result.OK

    def borrow(self) -> None:
        if self.remotes:
            remote = self.chance.choice(self.remotes)
            self.begun += self.chance.choice((remote.share, remote.move))(self.got) is Result.OK

    def release(self) -> None:
        if self.borrowed:
            self.borrowed.pop(self.chance.randrange(len(self.borrowed))).release()

    def close(self) -> None:
        for some in (self.ways, self.remotes):
            if some and self.chance.random() < 0.5:
                some.pop(self.chance.randrange(len(some))).close()

    def end(self) -> None:
        """A unregisters."""
        live = [registration for registration in self.registrations if registration.live]
        if live:
            registration = self.chance.choice(live)
            self.unregistering += 1
            registration.unregister(self.quiet, timeout=None)
            with pytest.raises(MisuseError):
                registration.unregister()

    def quiet(self, completion: Completion) -> None:
        assert completion.result is Result.OK
        self.unregistering -= 1

    def pump(self) -> None:
        for _ in range(self.chance.randrange(8)):
            self.chance.choice(self.all).pump()

    def cut(self) -> None:
        if self.chance.random() < 0.2:
            index = self.chance.randrange(4)
            both = self.all[index & 2:][:2]
            before = [endpoint.connections for endpoint in both]
            self.all[index].disconnect()
            drive(*self.all, until=lambda: all(e.connections > n for e, n in zip(both, before, strict=True)))
            self.connect()
            self.cuts[index & 2] += 1

    def finish(self) -> None:
        """Let go of all; then nothing may be under way, held or registered anywhere."""
        for _ in range(400):
            while self.borrowed:
                self.borrowed.pop().release()
            for endpoint in self.all:
                endpoint.pump()
        assert self.begun == self.ended
        for some in (self.remotes, self.ways):
            while some:
                some.pop().close()
        for registration in self.registrations:
            if registration.live:
                self.unregistering += 1
                registration.unregister(self.quiet, timeout=None)
        drive(*self.all, until=lambda: not self.unregistering and not left_over(*self.all))
        sites: list[Any] = [self.a, self.b, self.c]
        assert [site.exports.registered for site in sites] == [0, 0, 0]
        assert self.a.pool.free_pages * PAGE == self.a.pool.length
        for endpoint in self.all:
            endpoint.destroy()
        assert not left_over(*self.all)


@pytest.mark.parametrize("near", [True, False], ids=["mapped at both ends", "mapped by the owner only"])
@pytest.mark.parametrize("seed", range(15))
def test_everything_completes_once_and_nothing_is_left(seed: int, *, near: bool) -> None:
    region = LocalRegion(size=SIZE)
    chaos = Chaos(seed, region, near=near)
    for _ in range(STEPS):
        chaos.step()
    chaos.finish()
    region.close()
