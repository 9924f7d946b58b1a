"""Threads that share one Caller: each gets its own answers in its own order, one drives for all, none is made."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import running

sys.path.insert(0, str(Path(__file__).resolve().parent))

from endpoint_slow_back import QUOTA, serve

from host.region import RegionSpec
from idc.endpoint import Client, IncomingTransaction, Resources, State
from idc.endpoint.blocking import NAP, Caller
from idc.errors import ClosedError, IdcError, OutcomeUnknownError, TimedOutError
from idc.layout import ChannelSpec, Kind, Rights
from idc.transport.address import open_port
from idc.transport.local import meeting
from idc.transport.tcp import ListenPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.endpoint import Endpoint

BACK = Path(__file__).with_name("endpoint_slow_back.py")
THREADS = 8
CALLS = 60
LIMIT = 30.0


@contextmanager
def local() -> Iterator[Caller]:
    address = f"local:threads-{secrets.token_hex(4)}"
    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(serve, address)
        with Caller(open_port(address)) as caller:
            yield caller
        back.result(LIMIT)


@contextmanager
def process(address: str) -> Iterator[None]:
    back = subprocess.Popen([sys.executable, str(BACK), address], stderr=subprocess.PIPE, text=True)
    try:
        yield
        _, errors = back.communicate(timeout=LIMIT)
        assert back.returncode == 0, errors
    finally:
        back.kill()
        back.communicate()


@contextmanager
def rings() -> Iterator[Caller]:
    channel = ChannelSpec("service", Kind.MESSAGE, "front", "back", 128 * 512, 512)
    with running() as service:
        region = service.create(RegionSpec("link", 1 << 20, {"front": Rights.RW, "back": Rights.RW}, [channel]))
        with (process(f"member:{region.socket('back')}/service"),
              Caller(open_port(f"member:{region.socket('front')}/service")) as caller):
            yield caller


@contextmanager
def tcp() -> Iterator[Caller]:
    listener = ListenPort("127.0.0.1", 0)
    host, port = listener.address
    with process(f"tcp-dial:{host}:{port}"), Caller(listener) as caller:
        yield caller


PLACES = pytest.mark.parametrize("place", [local, rings, tcp])


def at_once(*jobs: Callable[[], object]) -> list[object]:
    """What each returns or raises, all of them run at the same time."""
    def run(job: Callable[[], object]) -> object:
        try:
            return job()
        except IdcError as error:
            return error

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(LIMIT) for future in [pool.submit(run, job) for job in jobs]]


@PLACES
def test_eight_threads_get_their_own_answers(place: Callable[[], Iterator[Caller]]) -> None:
    with place() as caller:  # type: ignore[attr-defined]
        before = threading.active_count()
        counts: set[int] = set()

        def ask(thread: int) -> None:
            for n in range(CALLS):
                body = b"%d:%d" % (thread, n)
                assert caller.transact(body, timeout=LIMIT) == body[::-1]
                if n % 10 == 0:
                    caller.send(b"a message", timeout=LIMIT)
                    counts.add(threading.active_count())

        assert at_once(*(lambda t=t: ask(t) for t in range(THREADS))) == [None] * THREADS
        assert max(counts) <= before + THREADS  # none but the test's own
        most, messages, total = map(int, caller.transact(b"end", timeout=LIMIT).split())
        assert 1 < most <= QUOTA  # in flight together, and never more than the quota
        assert messages == THREADS * CALLS / 10
        assert total == THREADS * (CALLS - 1)
        assert caller.endpoint.connections == 1
        assert caller.endpoint.outstanding == 0


@PLACES
def test_one_that_waits_for_long_holds_up_nobody(place: Callable[[], Iterator[Caller]]) -> None:
    """It leads when it comes first; when it gives up, another leads."""
    with place() as caller:  # type: ignore[attr-defined]
        caller.connect(LIMIT)
        done: list[float] = []

        def never() -> None:
            caller.transact(b"never", timeout=1.0)

        def ask() -> None:
            time.sleep(0.1)
            began = time.monotonic()
            for n in range(50):
                caller.transact(b"0:%d" % n, timeout=LIMIT)
            done.append(time.monotonic() - began)

        gave_up, answered = at_once(never, ask)
        assert isinstance(gave_up, TimedOutError)
        assert answered is None
        assert done[0] < 50 * NAP / 4  # no answer waited for the leader to wake by itself
        caller.transact(b"end", timeout=LIMIT)


@PLACES
def test_a_lost_connection_ends_each_threads_call_and_all_go_on(place: Callable[[], Iterator[Caller]]) -> None:
    with place() as caller:  # type: ignore[attr-defined]
        unknown: list[int] = []

        def ask(thread: int) -> None:
            for n in range(CALLS):
                body = b"%d:%d" % (thread, n)
                try:
                    assert caller.transact(b"cut" if (thread, n) == (3, 30) else body, timeout=LIMIT) == body[::-1]
                except OutcomeUnknownError:
                    unknown.append(thread)

        assert at_once(*(lambda t=t: ask(t) for t in range(THREADS))) == [None] * THREADS
        assert 3 in unknown
        assert len(unknown) <= QUOTA
        assert caller.endpoint.connections == 2
        caller.transact(b"end", timeout=LIMIT)


def test_closing_ends_the_calls_of_others() -> None:
    mine, theirs = meeting()
    caller = Caller(mine)
    began = time.monotonic()

    def close() -> None:
        time.sleep(0.3)
        caller.close()

    results = at_once(*[lambda: caller.transact(b"x")] * 4, lambda: caller.connect(LIMIT), close)
    assert all(isinstance(result, ClosedError) for result in results[:-1]), results
    assert results[-1] is None
    assert time.monotonic() - began < LIMIT / 2
    assert caller.endpoint.state is State.DESTROYED
    theirs.close()


def test_a_handler_that_does_not_end_costs_others_their_time_out_only() -> None:
    """And no more: two callers whose handlers call on each other, from two threads, end by that as well."""
    mine, theirs = meeting()
    free, entered = threading.Event(), threading.Event()

    class Stuck(Client):
        def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
            entered.set()
            free.wait(LIMIT)
            transaction.complete()

    def ask_from_the_other_side() -> None:
        with Caller(theirs) as other:
            other.transact(b"", timeout=LIMIT)

    def late() -> None:
        assert entered.wait(LIMIT)
        began = time.monotonic()
        try:
            caller.transact(b"", timeout=0.2)
        finally:
            free.set()
            assert time.monotonic() - began < LIMIT / 2

    with Caller(mine, client=Stuck()) as caller:
        stuck, timed_out, other = at_once(lambda: caller.transact(b"", timeout=1.0), late, ask_from_the_other_side)
    assert isinstance(timed_out, TimedOutError)
    assert "handler" in str(timed_out)
    assert other is None
    assert isinstance(stuck, IdcError)  # the other side handles no transactions, or had ended before


class Curious(Client):
    """Asks back before it answers."""

    caller: Caller

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        if transaction.parameters.startswith(b"back"):
            transaction.complete(transaction.parameters)
        else:
            transaction.complete(self.caller.transact(b"back" + transaction.parameters, timeout=LIMIT))


def test_handlers_call_on_the_callers_that_they_serve() -> None:
    """Two callers on one connection, several threads on each, and each handler needs the other side."""
    mine, theirs = meeting()
    clients = Curious(), Curious()
    with (Caller(mine, Resources(requests=64), clients[0]) as one,
          Caller(theirs, Resources(requests=64), clients[1]) as two):
        clients[0].caller, clients[1].caller = one, two

        def ask(caller: Caller, thread: int) -> None:
            for n in range(20):
                body = b"%d:%d" % (thread, n)
                assert caller.transact(body, timeout=LIMIT) == b"back" + body
            finished.append(thread)
            while len(finished) < 6:  # this side's handlers run in its calls, and the other side still needs them
                with contextlib.suppress(TimedOutError):
                    caller.transact(b"back", timeout=0.1)

        finished: list[int] = []
        jobs = [lambda c=c, t=t: ask(c, t) for t in range(3) for c in (one, two)]
        assert at_once(*jobs) == [None] * len(jobs)
