"""A peer that rings at full rate: its receiver masks the doorbell, looks by a timer, and goes on.

What is bounded is the receiver's CPU, as a part of the time that passes: in a blocking wait, under a selector, under
asyncio, and while there is no connection at all. Traffic on the same endpoint goes on, and when the storm is over the
doorbell wakes again.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import running

from host.region import Region, RegionSpec
from idc.endpoint import Client, Completion, Endpoint, Resources, Result, State
from idc.endpoint.aio import AsyncCaller
from idc.endpoint.together import drive
from idc.layout import ChannelSpec, Kind, Rights
from idc.transport.address import open_port
from idc.transport.local import meeting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOSTILE = Path(__file__).with_name("endpoint_hostile.py")
LIMIT = 20.0
#: Seconds of the storm that are measured, and the most CPU seconds in each.
MEASURED = 1.5
MOST_CPU = 0.1
#: Seconds between two transactions meanwhile.
PACE = 0.02


@pytest.fixture(scope="module")
def region() -> Iterator[Region]:
    channels = [ChannelSpec("service", Kind.MESSAGE, "front", "back", 128 * 512, 512)]
    with running() as service:
        yield service.create(RegionSpec("storm", 1 << 20, {"front": Rights.RW, "back": Rights.RW}, channels))


@contextmanager
def hostile(region: Region, what: str) -> Iterator[Callable[[str], bool]]:
    """A hostile back end; the function says whether it has said that word, without waiting for it."""
    child = subprocess.Popen([sys.executable, str(HOSTILE), str(region.socket("back")), what], stdout=subprocess.PIPE)
    assert child.stdout is not None
    os.set_blocking(child.stdout.fileno(), False)
    said = b""

    def has_said(word: str) -> bool:
        nonlocal said
        assert child.stdout is not None
        said += child.stdout.read() or b""
        return word.encode() in said

    try:
        yield has_said
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()


class Paced:
    """Submits one transaction after the other, PACE seconds apart."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.answers = 0
        self.longest = 0.0
        self._due = 0.0

    def turn(self) -> None:
        now = time.monotonic()
        if now >= self._due and not self.endpoint.outstanding:
            self._due = now + PACE
            self.endpoint.submit_transaction(b"x", lambda c: self._done(c, now))

    def _done(self, completion: Completion, began: float) -> None:
        self.answers += completion.result is Result.OK
        self.longest = max(self.longest, time.monotonic() - began)


def blocking(endpoint: Endpoint) -> None:
    endpoint.pump(PACE)


def selector(endpoint: Endpoint) -> None:
    drive([endpoint, _other()], PACE)


_others: list[Endpoint] = []


def _other() -> Endpoint:
    """Another endpoint of the same process, whose peer never comes."""
    if not _others:
        _others.append(Endpoint(meeting()[0], Client(), Resources()))
    return _others[0]


def storm_over(step: Callable[[], None], said: Callable[[str], bool]) -> float:
    """CPU seconds in each second of MEASURED, then until the storm is over."""
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < MEASURED:
        step()
    share = (time.process_time() - cpu) / (time.monotonic() - began)
    deadline = time.monotonic() + LIMIT
    while not said("over"):
        assert time.monotonic() < deadline
        step()
    return share


@pytest.mark.parametrize("wait", [blocking, selector])
def test_the_receivers_cpu_is_bounded_and_traffic_goes_on(region: Region, wait: Callable[[Endpoint], None]) -> None:
    endpoint = Endpoint(open_port(f"member:{region.socket('front')}/service"), Client(), Resources())
    load, deadline = Paced(endpoint), time.monotonic() + LIMIT

    def step() -> None:
        load.turn()
        wait(endpoint)

    with hostile(region, "ring") as said:
        while not said("now"):
            assert time.monotonic() < deadline
            endpoint.submit_transaction(b"x")
            wait(endpoint)
        while endpoint.outstanding:
            wait(endpoint)
        assert endpoint.status.masked == 0
        share = storm_over(step, said)
        answers, status = load.answers, endpoint.status
        sys.stdout.write(f"{share:.3f} CPU s/s, {answers} answers, longest {load.longest * 1000:.1f} ms, {status}\n")
        assert share <= MOST_CPU
        assert answers > 0.5 * MEASURED / PACE
        assert status.masked > 0
        assert status.state is State.CONNECTED
        assert status.connections == 1
        while endpoint.status.masked_now:  # the first look after the last ring unmasks
            step()
        before = endpoint.status.masked
        load.answers = 0
        while load.answers < 50:
            step()
        assert endpoint.status.masked == before
        assert endpoint.patience is None
    endpoint.destroy()


def test_under_asyncio(region: Region) -> None:
    async def run() -> None:
        async with asyncio.timeout(LIMIT), AsyncCaller(open_port(f"member:{region.socket('front')}/service")) as caller:
            with hostile(region, "ring") as said:
                while not said("now"):
                    await caller.transact(b"x")
                began, cpu, answers = time.monotonic(), time.process_time(), 0
                while time.monotonic() - began < MEASURED:
                    await caller.transact(b"x")
                    answers += 1
                    await asyncio.sleep(PACE)
                share = (time.process_time() - cpu) / (time.monotonic() - began)
                sys.stdout.write(f"{share:.3f} CPU s/s, {answers} answers, {caller.endpoint.status}\n")
                assert share <= MOST_CPU
                assert answers > 0.25 * MEASURED / PACE
                assert caller.endpoint.status.masked > 0
                while not said("over") or caller.endpoint.status.masked_now:  # noqa: ASYNC110 - nothing else says so
                    await asyncio.sleep(PACE)
                assert await caller.transact(b"again") == b"again"

    asyncio.run(run())


@pytest.mark.parametrize("wait", [blocking, selector])
def test_without_a_connection(region: Region, wait: Callable[[Endpoint], None]) -> None:
    endpoint = Endpoint(open_port(f"member:{region.socket('front')}/service"), Client(), Resources())
    with hostile(region, "knock") as said:
        deadline = time.monotonic() + LIMIT
        while not said("now"):
            assert time.monotonic() < deadline
            wait(endpoint)
        share = storm_over(lambda: wait(endpoint), said)
        sys.stdout.write(f"{share:.3f} CPU s/s, {endpoint.status}\n")
        assert share <= MOST_CPU
        assert endpoint.status.masked > 0
        while endpoint.state is not State.CONNECTED:
            assert time.monotonic() < deadline + LIMIT
            wait(endpoint)
    endpoint.destroy()
