"""Doorbells that are lost, doubled and late: nothing but time is lost, and the seed says which ones they were."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import DEADLINE, PAIR, descriptors, running, settle, until, word
from traffic import BLOCK, CHANNELS, PATIENCE, attach, converse

from host.errors import PeerError, RegionError
from host.ivshmem import client
from host.ivshmem.detour import Counts, Detour, Doorbells
from host.region import RegionSpec
from idc.channel import MessageChannel
from testbed import faults

if TYPE_CHECKING:
    from collections.abc import Iterator

    from host.ivshmem.client import Peer
    from host.region import Region, RegionService

ROOT = Path(__file__).resolve().parents[2]
SPEC = RegionSpec("link", 1 << 20, PAIR, CHANNELS)


@pytest.fixture
def service() -> Iterator[RegionService]:
    with running() as service:
        yield service


@pytest.fixture
def region(service: RegionService) -> Region:
    return service.create(SPEC)


def path_beside(region: Region) -> Path:
    return region.socket("front").with_name("detour.sock")


def ring_through(front: Peer, detour: Detour, vector: int) -> int:
    """Ring a vector of member 1 and wait until the detour has looked at it; how many copies it passed on."""
    before = dataclasses.replace(detour.total(1))
    front.ring(1, vector)
    until("it was looked at", lambda: detour.total(1).rung > before.rung)
    return detour.total(1).passed - before.passed


def both(stack: ExitStack, region: Region) -> list[MessageChannel]:
    """Two connected ends in this process, front's first."""
    mine = [stack.enter_context(client.join(region.socket(member))) for member in PAIR]
    with ThreadPoolExecutor(2) as pool:
        ends = [end.result() for end in [pool.submit(attach, region, "messages") for region in mine]]
    found = []
    for end in ends:
        assert isinstance(end, MessageChannel)
        found.append(stack.enter_context(end))
    return found


def test_without_a_single_doorbell_messages_still_arrive_late_and_counted(region: Region) -> None:
    """The safety recheck finds them; docs/protocol.md, "lost doorbells"."""
    with ExitStack() as stack:
        detoured, detours = faults.detour(region, Doorbells(drop=1.0))
        for one in detours.values():
            stack.callback(one.close)
        front, back = both(stack, detoured)

        def echo() -> None:
            for _ in range(5):
                back.sender.send(back.receiver.recv(timeout=PATIENCE), timeout=PATIENCE)

        with ThreadPoolExecutor(1) as pool:
            echoing = pool.submit(echo)
            for number in range(5):
                front.sender.send(bytes([number]), timeout=PATIENCE)
                assert front.receiver.recv(timeout=PATIENCE) == bytes([number])
            echoing.result()
        for end in (front, back):
            assert end.receiver.counters.late > 0
            assert end.receiver.counters.wakeups == end.receiver.counters.spurious  # by the host, who rings at attach
        told = faults.counts(region, detours)
        assert told["front", "back"].rung >= 5
        for pair in told.values():
            assert (pair.passed, pair.dropped) == (0, pair.rung)


@pytest.mark.parametrize("channel", ["messages", "bytes"])
@pytest.mark.parametrize("role", ["send", "receive"])
def test_a_conversation_comes_through(region: Region, channel: str, role: str) -> None:
    """Some of everything, both ways, with the other side in a process of its own."""
    detoured, detours = faults.detour(region, Doorbells(drop=0.15, double=0.3, delay=(0.0, 0.004), seed=11))
    command = [sys.executable, str(ROOT / "tests" / "traffic.py"), str(detoured.socket("back")), channel, role]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        with (
            subprocess.Popen([*command, str(2 * BLOCK)], env=environment) as other,
            client.join(detoured.socket("front")) as mine,
        ):
            assert converse(mine, channel, "receive" if role == "send" else "send", 2 * BLOCK) == 0
            assert other.wait(PATIENCE) == 0
        told = sum(faults.counts(region, detours).values(), Counts())
        assert min(told.delayed, told.doubled, told.dropped) > 0, told
    finally:
        for one in detours.values():
            one.close()


def test_the_seed_says_which(region: Region) -> None:
    """Doorbell by doorbell, over two connections: the fates are those that the seed announces."""
    spec = Doorbells(drop=0.3, double=0.2, seed=5)
    count = 150
    expected = [len(fate) for fate in itertools.islice(spec.fates(0, 1, 2), 2 * count)]
    with Detour(region.socket("front"), path_beside(region), {1: spec}) as detour:
        with client.connect(region.socket("back")) as back:
            got: list[int] = []
            for _ in range(2):
                with client.connect(detour.path) as front:
                    back.wait(2, 0)  # the server rings all vectors when a member comes
                    got += [ring_through(front, detour, 2) for _ in range(count)]
        assert got == expected
        counts = detour.counts[1, 2]
        assert counts.dropped == expected.count(0)
        assert counts.doubled == expected.count(2)
        assert detour.counts[1, 0].rung == 0


def test_fates_do_not_depend_on_what_else_is_asked() -> None:
    plain = itertools.islice(Doorbells(delay=(0.001, 0.002), seed=1).fates(0, 1, 3), 200)
    lossy = itertools.islice(Doorbells(delay=(0.001, 0.002), seed=1, drop=0.5).fates(0, 1, 3), 200)
    pairs = list(zip(plain, lossy, strict=True))
    assert all(b in ((), a) for a, b in pairs)
    assert 50 < sum(not b for _, b in pairs) < 150
    elsewhere = itertools.islice(Doorbells(delay=(0.001, 0.002), seed=1).fates(0, 1, 4), 200)
    assert [a for a, _ in pairs] != list(elsewhere)


def test_late_doorbells_come(region: Region) -> None:
    late = Doorbells(delay=(0.05, 0.1))
    with (
        Detour(region.socket("front"), path_beside(region), {1: late}) as detour,
        client.connect(region.socket("back")) as back,
        client.connect(detour.path) as front,
    ):
        back.wait(1, DEADLINE)
        front.ring(1, 1)
        until("it was looked at", lambda: detour.total(1).delayed == 1)
        assert detour.total(1).passed == 0
        assert back.wait(1, DEADLINE) == 1
        assert front.peers.keys() == {1}  # and nothing else is different for it
        back.ring(0, 1)
        assert front.wait(1, DEADLINE) >= 1


def test_an_eventfd_full_of_rubbish_holds_nothing_up(region: Region) -> None:
    with (
        Detour(region.socket("front"), path_beside(region), {1: Doorbells()}) as detour,
        client.connect(region.socket("back")) as back,
        client.connect(detour.path) as front,
    ):
        os.eventfd_write(front.bell(1, 1), 2**64 - 2)
        assert back.wait(1, DEADLINE) > 0
        until("it is done", lambda: detour.total(1).rung == 1000)
        before = detour.total(1).rung
        front.ring(1, 2)
        until("the next one is looked at", lambda: detour.total(1).rung > before)


def test_comings_and_goings_are_seen_through_it(service: RegionService, region: Region) -> None:
    with Detour(region.socket("front"), path_beside(region), {1: Doorbells(drop=1.0)}) as detour:
        with client.connect(region.socket("back")) as back:
            with client.connect(detour.path):
                settle(service)
                assert word(back, 0) == (1, True)
                service.restart()
                assert service.members("link")["front"] == (1, True)
            until("the server has seen it go", lambda: word(back, 0) == (1, False))
            with client.connect(detour.path) as front:
                assert word(back, 0) == (2, True)
                service.drop("link")
                with pytest.raises(PeerError, match="ended the connection"):
                    front.update(DEADLINE)
        with pytest.raises(PeerError):
            client.connect(detour.path)


def test_it_leaves_nothing_open(region: Region) -> None:
    before = descriptors(os.getpid())
    for _ in range(3):
        with Detour(region.socket("front"), path_beside(region), {1: Doorbells(delay=(9.0, 9.0))}) as detour:
            with client.connect(detour.path) as front:
                ring_through(front, detour, 1)
            assert detour.path.exists()
        assert not detour.path.exists()
    del detour
    assert descriptors(os.getpid()) == before


@pytest.mark.parametrize("bad", [{"drop": 1.5}, {"double": -0.1}, {"delay": (0.2, 0.1)}, {"delay": (-1.0, 0.0)},
                                 {"delay": (0.0, float("inf"))}])
def test_faults_that_make_no_sense_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(RegionError, match="doorbells"):
        Doorbells(**bad)  # type: ignore[arg-type]


def test_a_pair_that_does_not_ring_is_refused(region: Region) -> None:
    for pair in (("front", "front"), ("front", "nobody")):
        with pytest.raises(RegionError, match="cannot ring"):
            faults.detour(region, {pair: Doorbells()})
