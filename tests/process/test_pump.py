"""A queue between two processes: killed and started again under traffic; and a liar, under AddressSanitizer."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import PAIR, running

from host.region import Region, RegionSpec
from idc.device.classes import queue_channel
from idc.layout import ChannelSpec, Kind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
CHANNEL = ChannelSpec(queue_channel(0), Kind.MESSAGE, "front", "back", 256 * 256, 256)
LIMIT = 30.0


@pytest.fixture
def region() -> Iterator[Region]:
    with running() as service:
        yield service.create(RegionSpec("queues", 1 << 22, PAIR, [CHANNEL]))


@contextlib.contextmanager
def side(region: Region, what: str, member: str, first: int = 0) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, str(HERE / "pump_side.py"), what,
                              f"member:{region.socket(member)}/{CHANNEL.name}", str(first)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield child
    finally:
        child.kill()
        child.wait(LIMIT)
        for end in (child.stdin, child.stdout):
            assert end is not None
            end.close()


def numbers(child: subprocess.Popen[str], count: int) -> list[int]:
    assert child.stdout is not None
    return [int(child.stdout.readline()) for _ in range(count)]


def ended(child: subprocess.Popen[str]) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.close()
    said = child.stdout.read().splitlines()[-1]
    assert child.wait(LIMIT) == 0
    return said


def test_the_receiver_killed_and_started_again_under_traffic(region: Region) -> None:
    with side(region, "send", "front") as sender:
        last = -1
        for _ in range(6):
            with side(region, "receive", "back") as receiver:
                got = numbers(receiver, 4)
                assert got[0] > last, "a packet of a former connection"
                last = got[-1]
        assert ended(sender) == "late 0"


def test_the_sender_killed_and_started_again(region: Region) -> None:
    for _ in range(3):
        with side(region, "receive", "back") as receiver, side(region, "send", "front", 1 << 32) as sender:
            numbers(receiver, 3)
            sender.kill()
            sender.wait(LIMIT)
            with side(region, "send", "front"):  # all of whose numbers, whatever it drops, come after higher ones
                assert receiver.wait(LIMIT) == 1


def lies(core: Mapping[str, str], seed: int, rounds: int) -> str:
    env = {**core, "PYTHONPATH": core["PYTHONPATH"] + os.pathsep + str(HERE.parent)}
    done = subprocess.run([sys.executable, str(HERE / "pump_liar.py"), str(seed), str(rounds)], env=env,
                          capture_output=True, text=True, check=False, timeout=100 + rounds / 5)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stdout


def test_whatever_a_peer_says_of_a_packet_is_taken_or_ends_its_connection(sanitized_core: dict[str, str]) -> None:
    said = lies(sanitized_core, 20261128, 150)
    taken, refused = (int(word) for word in said.split()[1::2])
    assert taken > 30
    assert refused > 30


@pytest.mark.soak
def test_whatever_a_peer_says_for_long(sanitized_core: dict[str, str]) -> None:
    seed = int.from_bytes(os.urandom(4), "little")
    sys.stdout.write(f"seed {seed}\n")
    lies(sanitized_core, seed, 3000)
