"""Faults between real VMs: doorbells that get lost and late, a program stopped in mid-protocol, a VM without CPU."""

import json
import time
from collections.abc import Iterator

import pytest

from host.region import Region
from testbed.bed import Testbed
from testbed.faults import Action, Counts, Doorbells, Fault, Point
from testbed.transfer import OverRegion, transfer
from testbed.vm import Vm

FAULTS = Doorbells(drop=0.2, double=0.2, delay=(0.0, 0.003), seed=7)

PING = """
import sys
from guest.ivshmem import open_region
from idc.channel import MessageChannel
late = 0
with open_region(sys.argv[1]) as region, MessageChannel.attach(region, "rtt", timeout=30) as channel:
    channel.sender.spin = channel.receiver.spin = 0.0
    for number in range(60):
        channel.sender.send(number.to_bytes(4, "little"), timeout=30)
        assert channel.receiver.recv(timeout=30) == number.to_bytes(4, "little")
    print(channel.receiver.counters.late)
"""
ECHO = """
import sys
from guest.ivshmem import open_region
from idc.channel import MessageChannel
with open_region(sys.argv[1]) as region, MessageChannel.attach(region, "rtt", timeout=30) as channel:
    channel.sender.spin = channel.receiver.spin = 0.0
    for number in range(60):
        channel.sender.send(channel.receiver.recv(timeout=30), timeout=30)
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        bed.boot("front", "back")
        yield bed


@pytest.fixture(scope="module")
def front(bed: Testbed) -> Vm:
    return bed.vms["front"]


@pytest.fixture(scope="module")
def back(bed: Testbed) -> Vm:
    return bed.vms["back"]


@pytest.fixture(scope="module")
def lossy(bed: Testbed, front: Vm, back: Vm) -> Region:
    return bed.link(front, back, name="lossy", doorbells=FAULTS)


@pytest.fixture(scope="module")
def link(bed: Testbed, front: Vm, back: Vm) -> Region:
    return bed.link(front, back)


def test_messages_and_files_come_through_lost_doorbells(bed: Testbed, front: Vm, back: Vm, lossy: Region) -> None:
    echo = back.spawn(["python3", "-c", ECHO, lossy.name])
    late = int(front.succeed(["python3", "-c", PING, lossy.name], timeout=120))
    result = echo.wait(60)
    assert result.exit_code == 0, result.err
    told = bed.doorbells(lossy.name)
    assert told.keys() == {("front", "back"), ("back", "front")}
    total = sum(told.values(), Counts())
    assert min(total.dropped, total.doubled, total.delayed) > 0
    assert late > 0  # a doorbell was lost, the recheck found the message, and it was counted

    front.succeed("head -c 5000000 /dev/urandom > /tmp/data")
    done = transfer(front, "/tmp/data", back, "/tmp/copy", OverRegion(lossy.name))
    assert back.succeed("sha256sum < /tmp/copy") == front.succeed("sha256sum < /tmp/data")
    assert done.size == 5_000_000


def test_a_region_without_faults_has_none(bed: Testbed, front: Vm, back: Vm, link: Region) -> None:
    echo = back.spawn(["python3", "-c", ECHO, link.name])
    assert front.succeed(["python3", "-c", PING, link.name], timeout=120) == "0\n"
    assert echo.wait(60).exit_code == 0
    assert bed.doorbells(link.name) == {}


@pytest.mark.parametrize("point", [Point.PUBLISHED, Point.ARMED_DATA])
def test_a_guest_program_stopped_at_a_point(front: Vm, back: Vm, link: Region, point: Point) -> None:
    echo = back.spawn(["python3", "-c", ECHO, link.name], env=Fault(point, 20).env)
    ping = front.spawn(["python3", "-c", PING, link.name])
    pid = back.wait_until_succeeds("ps -eo stat=,pid=,comm= | awk '$1 ~ /^T/ && $3 ~ /python/ {print $2; f=1} "
                                   "END {exit !f}'")
    assert ping.poll() is None
    back.succeed(f"kill -CONT {pid}")
    assert ping.wait(60).exit_code == 0
    assert echo.wait(60).exit_code == 0


def test_a_guest_program_killed_at_a_point(front: Vm, back: Vm, link: Region) -> None:
    echo = back.spawn(["python3", "-c", ECHO, link.name], env=Fault(Point.TAKEN, 20, Action.KILL).env)
    ping = front.spawn(["python3", "-c", PING, link.name])
    assert echo.wait(60).exit_code == -9
    # its VM lives, so only the next one to attach tells: docs/protocol.md, section 7
    again = back.spawn(["python3", "-c", ECHO, link.name])
    ended = ping.wait(60)
    assert ended.exit_code == 1
    assert "PeerGoneError" in ended.err
    assert front.execute(["python3", "-c", PING, link.name], timeout=60).exit_code == 0
    assert again.wait(60).exit_code == 0


def test_a_starved_vm_is_slow_and_recovers(front: Vm) -> None:
    loop = "python3 -c 'for _ in range(2000000): pass'"

    def seconds() -> float:
        began = time.monotonic()
        front.succeed(loop)
        return time.monotonic() - began

    seconds()  # translated now
    fed = min(seconds(), seconds())
    with front.starve(0.2, seed=3) as starved:
        hungry = seconds()
    assert 0.1 < starved.share < 0.4
    assert hungry / fed > 2
    assert seconds() / fed < hungry / fed
    assert json.loads(front.succeed("echo 1")) == 1
