"""Holders in processes of their own that are killed, or stopped, while they use an owner's pages: quiescence."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import running

from host.region import Region, RegionSpec
from idc.buffers import LocalBuffer, PagePool, process_memory
from idc.endpoint import Client, Completion, Endpoint, Resources, Result, State
from idc.layout import PAGE, ChannelSpec, Kind, Rights
from idc.remote import Access, Exports, Refusal, Regions, Remote
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOLDER = Path(__file__).with_name("remote_holder.py")
LIMIT = 20.0
LENGTH = 10 * PAGE + 3


@pytest.fixture(scope="module")
def region() -> Iterator[Region]:
    channel = ChannelSpec("service", Kind.MESSAGE, "owner", "holder", 128 * 512, 512)
    with running() as service:
        yield service.create(RegionSpec("link", 1 << 20, {"owner": Rights.RW, "holder": Rights.RW}, [channel]))


class Owner:
    """This process."""

    def __init__(self, address: str) -> None:
        port = open_port(address)
        self.exports = Exports(4, 4, regions=Regions(*port.regions))
        self.pool = PagePool.of(port.regions[0]) if port.regions else None
        self.endpoint = Endpoint(port, Client(), Resources(remote=Remote(self.exports)), "the holder")

    def buffer(self) -> LocalBuffer:
        return process_memory(bytearray(LENGTH)) if self.pool is None else self.pool.allocate(LENGTH)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline, (self.endpoint.state, self.endpoint.reason)
            self.endpoint.pump(0.05)


@contextmanager
def both(addresses: list[str], how: str) -> Iterator[tuple[Owner, subprocess.Popen[str]]]:
    owner = Owner(addresses[0])
    child = subprocess.Popen([sys.executable, str(HOLDER), addresses[1], how], stdout=subprocess.PIPE, text=True)
    try:
        owner.until(lambda: owner.endpoint.state is State.CONNECTED)
        yield owner, child
    finally:
        child.kill()
        child.communicate()
        owner.endpoint.abandon()
        assert (owner.exports.registered, owner.exports.leases) == (0, 0)


def heard(owner: Owner, child: subprocess.Popen[str]) -> str:
    """The holder's next line, while this side is driven."""
    assert child.stdout is not None
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    owner.until(lambda: bool(poll.poll(0)))
    return child.stdout.readline().strip()


def test_pages_that_a_stopped_holder_uses_are_not_given_up_and_those_of_a_killed_one_are(region: Region) -> None:
    addresses = [f"member:{region.socket(member)}/service" for member in ("owner", "holder")]
    with both(addresses, "share") as (owner, child):
        registration = owner.endpoint.register(owner.buffer(), Access.READ, outlives=True)
        assert owner.endpoint.submit_message(registration.reference()) is Result.OK
        assert heard(owner, child) == "ok map"
        assert registration.holders == ["the holder"]
        os.kill(child.pid, signal.SIGSTOP)
        told: list[Completion] = []
        registration.unregister(told.append, timeout=0.3)
        owner.until(lambda: bool(told))
        assert (told[0].result, told[0].error) == (Result.ERROR, Refusal.HELD)
        assert told[0].reason == "held by the holder, which did not let go in time"
        assert owner.exports.registered == 1
        os.kill(child.pid, signal.SIGCONT)
        registration.unregister(told.append, timeout=0.3)
        owner.until(lambda: len(told) == 2)
        assert told[1].error == Refusal.HELD  # it runs, and holds on
        registration.unregister(told.append)
        child.kill()
        owner.until(lambda: len(told) == 3)
        assert told[2] == Completion(Result.OK)


def test_a_holder_that_lets_go_lets_unregister_complete(region: Region) -> None:
    addresses = [f"member:{region.socket(member)}/service" for member in ("owner", "holder")]
    with both(addresses, "share") as (owner, child):
        registration = owner.endpoint.register(owner.buffer(), Access.READ)
        owner.endpoint.submit_message(registration.reference())
        assert heard(owner, child) == "ok map"
        told: list[Completion] = []
        registration.unregister(told.append)
        owner.endpoint.submit_message(b"release")
        owner.until(lambda: bool(told))
        assert told == [Completion(Result.OK)]


@pytest.mark.parametrize("near", [True, False], ids=["direct", "network"])
def test_holders_killed_at_any_moment_of_their_transfers_leave_nothing(region: Region, *, near: bool) -> None:
    for lap in range(5):
        if near:
            addresses = [f"member:{region.socket(member)}/service" for member in ("owner", "holder")]
        else:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                place = f"127.0.0.1:{probe.getsockname()[1]}"
            addresses = [f"tcp-listen:{place}", f"tcp-dial:{place}"]
        with both(addresses, "receive") as (owner, child):
            registration = owner.endpoint.register(owner.buffer(), Access.READ, outlives=True)
            owner.endpoint.submit_message(registration.reference())
            assert heard(owner, child) == ("ok direct" if near else "ok network")
            until = time.monotonic() + 0.01 * lap
            owner.until(lambda until=until: time.monotonic() > until)  # type: ignore[misc]
            told: list[Completion] = []
            child.kill()
            registration.unregister(told.append)
            owner.until(lambda told=told: bool(told))  # type: ignore[misc]
            assert told == [Completion(Result.OK)]
