"""The blocking face with several threads, and with waits that end before what they were for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from remote_support import SIZE, Site, drive, join, left_over
from support import LocalRegion

from idc.buffers import process_memory
from idc.endpoint import Client, Endpoint, IncomingTransaction, Quotas, Resources, State
from idc.endpoint.blocking import Caller
from idc.errors import BackPressuredError, ClosedError, RefusedError, TimedOutError
from idc.layout import PAGE
from idc.remote import Access, Exports, Refusal, Registration, Remote, RemoteBuffer
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATA = bytes(range(256)) * 256


class Lender(Client):
    """Lends pages to whoever asks; unregisters what it lent last."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.lent: list[Registration] = []

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        self.lent.append(endpoint.register(self.site.fill(DATA), Access.READ | Access.TAKE))
        transaction.complete(self.lent[-1].reference())


class Owner:
    """A lender in a thread of its own, that stands still when told to."""

    def __init__(self) -> None:
        self.region = LocalRegion(size=SIZE)
        self.mine, self.theirs = join(self.region)
        self.site = Site(self.mine)
        self.client = Lender(self.site)
        ports = meeting()
        self.port = ports[1]
        self.endpoint = self.site.endpoint(ports[0], self.client)
        self._over = threading.Event()
        self.runs = threading.Event()
        self.runs.set()
        self._pumping = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            if self.runs.wait(0.05):
                with self._pumping:
                    if self.runs.is_set():
                        self.endpoint.pump(0.01)

    def stand(self) -> None:
        """Take nothing more, until `runs` is set again."""
        self.runs.clear()
        with self._pumping:
            pass

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.endpoint.destroy()
        assert (self.site.exports.registered, self.site.exports.leases) == (0, 0)
        self.region.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.close()


@contextmanager
def caller(owner: Owner, **options: int) -> Iterator[Caller]:
    holder = Site(owner.theirs)
    remote = Remote(holder.exports, **{"buffers": 8, "operations": 2} | options)  # type: ignore[arg-type]
    resources = Resources(Quotas(8, 8, 256, 256), requests=8, messages=8, remote=remote)
    with Caller(owner.port, resources) as calls:
        yield calls
    assert not left_over(calls.endpoint)


def test_threads_that_share_a_caller_share_its_slots(owner: Owner) -> None:
    with caller(owner) as calls:
        remote = calls.remote(calls.transact(b"lend", timeout=10))

        def work(n: int) -> int:
            for lap in range(30):
                at = (n * 997 + lap * 31) % (len(DATA) - 1000)
                target = bytearray(1000)
                calls.receive_from(remote, process_memory(target), offset=at, timeout=20)
                assert target == DATA[at:at + 1000]
                if lap % 10 == 0:
                    with calls.inside():
                        calls.endpoint.notify()
            return n

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == list(range(4))
        assert remote.counter.copied == 4 * 30 * 1000
        remote.close()


def test_one_thread_begins_what_another_thread_that_sleeps_has_to_drive(owner: Owner) -> None:
    with caller(owner) as calls:
        remote = calls.remote(calls.transact(b"lend", timeout=10))
        registration = calls.register(process_memory(bytearray(10)), Access.READ)
        with ThreadPoolExecutor(2) as pool:
            owner.stand()  # so that the first one sleeps, for as long as it takes
            first = pool.submit(calls.transact, b"lend", timeout=20)
            time.sleep(0.3)
            assert not first.done()
            pool.submit(calls.unregister, registration).result(timeout=5)  # needs nobody's answer
            second = pool.submit(calls.receive_from, remote, process_memory(bytearray(10)), timeout=20)
            time.sleep(0.1)
            owner.runs.set()
            began = time.monotonic()
            second.result(timeout=20)
            first.result(timeout=20)
            assert time.monotonic() - began < 5


@pytest.mark.parametrize("how", ["share", "move"])
def test_what_comes_after_the_time_out_is_given_back(owner: Owner, how: str) -> None:
    with caller(owner) as calls:
        remote = calls.remote(calls.transact(b"lend", timeout=10))
        owner.stand()
        with pytest.raises(TimedOutError):
            getattr(calls, how)(remote, timeout=0.05)
        owner.runs.set()
        calls.transact(b"lend", timeout=10)  # its answer comes after the late one, which is given back then
        got = calls.share(remote, timeout=10)
        got.release()
        remote.close()
        drive(calls.endpoint, until=lambda: owner.site.exports.leases == 0)


def test_operations_on_what_is_over_are_closed(owner: Owner) -> None:
    with caller(owner, buffers=1) as calls:
        remote = calls.remote(calls.transact(b"lend", timeout=10))
        with pytest.raises(BackPressuredError):
            calls.remote(remote.data)
        remote.close()
        target = process_memory(bytearray(1))
        for call in calls_on(calls, remote):
            with pytest.raises(ClosedError, match="the remote buffer is closed"):
                call()
        again = calls.remote(remote.data)
        with calls.inside() as endpoint:
            endpoint.disconnect()
        with pytest.raises(ClosedError, match="its connection is over"):
            calls.receive_from(again, target)
        calls.connect(timeout=10)
        stale = calls.remote(remote.data)
        with pytest.raises(RefusedError, match="unregistered") as caught:
            calls.receive_from(stale, target, timeout=10)
        assert caught.value.code == Refusal.STALE


def calls_on(calls: Caller, remote: RemoteBuffer) -> list[Callable[[], object]]:
    target = process_memory(bytearray(1))
    return [lambda: calls.receive_from(remote, target), lambda: calls.share(remote), lambda: calls.move(remote)]


def test_a_registration_that_is_held_says_by_whom() -> None:
    region = LocalRegion(size=SIZE)
    one, other = join(region)
    lender, holder = Site(one), Site(other)
    ports = meeting()
    resources = Resources(Quotas(8, 8, 256, 256), requests=8, messages=8, remote=Remote(lender.exports))
    far = holder.endpoint(ports[1])
    with Caller(ports[0], resources, name="the far side") as calls:
        drive(calls.endpoint, far, until=lambda: calls.endpoint.state is far.state is State.CONNECTED)
        registration = calls.register(lender.fill(bytes(PAGE)), Access.READ)
        remote, got = far.remote(registration.reference()), list[object]()
        remote.share(lambda *what: got.append(what))
        drive(calls.endpoint, far, until=lambda: bool(got))
        with pytest.raises(RefusedError, match="held by the far side") as caught:
            calls.unregister(registration, timeout=0.1)
        assert caught.value.code == Refusal.HELD
    far.destroy()
    assert isinstance(lender.exports, Exports)
    region.close()
