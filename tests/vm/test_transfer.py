"""Files between real VMs: any size, both transports, and every way it can fail, with nothing half-made left."""

import hashlib
import re
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.bed import Testbed
from testbed.errors import TestbedError, VmStopped
from testbed.transfer import OverRegion, OverTcp, TransferFailed, transfer
from testbed.vm import Vm

MIB = 1 << 20
Over = OverRegion | OverTcp


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        bed.boot(*(bed.spec(name, memory_mib=512) for name in ("front", "back")), network=True)
        bed.vms["front"].succeed("cd /tmp && head -c 40000000 /dev/urandom > big",
                                 "cd /tmp && head -c 100001 big > odd && : > empty")
        yield bed


@pytest.fixture(scope="module")
def front(bed: Testbed) -> Vm:
    return bed.vms["front"]


@pytest.fixture(scope="module")
def back(bed: Testbed) -> Vm:
    return bed.vms["back"]


@pytest.fixture(scope="module")
def region_way(bed: Testbed, front: Vm, back: Vm) -> OverRegion:
    return OverRegion(bed.link(front, back).name)


@pytest.fixture(params=["region", "tcp"])
def over(request: pytest.FixtureRequest, bed: Testbed, region_way: OverRegion) -> Over:
    if request.param == "region":
        return region_way
    assert bed.network is not None
    return OverTcp(bed.network.members[1].address)


@pytest.fixture(autouse=True)
def landing(back: Vm) -> None:
    back.succeed("rm -rf /tmp/in && mkdir /tmp/in")


def names(vm: Vm) -> list[str]:
    return vm.succeed("ls -A /tmp/in").split()


@pytest.mark.parametrize("name", ["empty", "odd", "big"])
def test_a_file_arrives_whole(front: Vm, back: Vm, over: Over, name: str) -> None:
    phases = set()
    done = transfer(front, f"/tmp/{name}", back, "/tmp/in/", over, progress=lambda *told: phases.add(told[:2]))
    digest = front.succeed(f"sha256sum /tmp/{name}").split()[0]
    assert done.sha256 == digest == back.succeed(f"sha256sum /tmp/in/{name}").split()[0]
    assert done.size == int(front.succeed(f"stat -c %s /tmp/{name}"))
    assert names(back) == [name]
    assert {("source", "checksum"), ("target", "verify")} <= phases


def test_an_empty_file_has_the_checksum_of_nothing(front: Vm, back: Vm, region_way: OverRegion) -> None:
    assert transfer(front, "/tmp/empty", back, "/tmp/in", region_way).sha256 == hashlib.sha256(b"").hexdigest()


def test_one_clear_line_for_a_missing_file(front: Vm, back: Vm, over: Over) -> None:
    with pytest.raises(TransferFailed, match="front: cannot read /tmp/absent: No such file"):
        transfer(front, "/tmp/absent", back, "/tmp/in", over)
    assert names(back) == []


@pytest.mark.parametrize("name", ["with space", "two\nlines", "d\u00fcnn", "-n"])
def test_any_name_arrives_also_where_nameless_files_cannot_be_made(
        front: Vm, back: Vm, region_way: OverRegion, name: str) -> None:
    front.succeed(f"printf content > {shlex.quote('/tmp/' + name)}")
    # the root is an overlay, which has no O_TMPFILE before Linux 6.3
    back.succeed("rm -rf /srv/in && mkdir -p /srv/in")
    transfer(front, f"/tmp/{name}", back, "/srv/in", region_way)
    assert back.succeed(f"cat {shlex.quote('/srv/in/' + name)}") == "content"
    assert back.succeed("ls -A /srv/in | wc -l").strip() == str(1 + name.count("\n"))


@pytest.mark.parametrize(("source", "target", "said"), [
    ("/tmp/pipe", "/tmp/in", "front: /tmp/pipe is not a regular file"),
    ("/tmp", "/tmp/in", "front: /tmp is not a regular file"),
    ("/dev/zero", "/tmp/in", "front: /dev/zero is not a regular file"),
    ("/proc/cpuinfo", "/tmp/in", "front: /proc/cpuinfo has content but no size"),
    ("/tmp/odd", "/tmp/none/x", "back: /tmp/none is no directory"),
    ("/tmp/odd", "/dev/null", "back: /dev/null exists and is no regular file"),
    ("/tmp/odd", "/mnt/ro/x", "back: /mnt/ro is on a read-only file system"),
])
def test_what_cannot_be_sent_or_stored_is_one_clear_line(
        front: Vm, back: Vm, region_way: OverRegion, source: str, target: str, said: str) -> None:
    front.succeed("test -p /tmp/pipe || mkfifo /tmp/pipe")
    back.succeed("mkdir -p /mnt/ro && { grep -q /mnt/ro /proc/mounts || mount -t tmpfs -o ro none /mnt/ro; }")
    with pytest.raises(TransferFailed, match=re.escape(said)) as caught:
        transfer(front, source, back, target, region_way)
    assert "\n" not in str(caught.value)
    back.succeed("test -c /dev/null")
    assert names(back) == []


def test_a_disk_too_small_is_refused_at_once(front: Vm, back: Vm, over: Over) -> None:
    back.succeed("mount -t tmpfs -o size=8m small /tmp/in")
    try:
        with pytest.raises(TransferFailed, match="no space left in /tmp/in: 40000000 bytes needed"):
            transfer(front, "/tmp/big", back, "/tmp/in", over)
        assert names(back) == []
    finally:
        back.succeed("umount /tmp/in")


#: Takes all room as soon as somebody else has taken the first of it; of a higher priority, so that it is not late.
FILLER = """
import os, time
empty = os.statvfs("/tmp/in").f_bfree
print("ready", flush=True)
while os.statvfs("/tmp/in").f_bfree == empty:
    time.sleep(0.002)
with open("/tmp/in/filler", "wb", buffering=0) as file:
    try:
        while file.write(bytes(1 << 20)):
            pass
    except OSError:
        time.sleep(60)
"""


def test_a_disk_that_fills_up_half_way(front: Vm, back: Vm, over: Over) -> None:
    # the room is there when the receiver asks for it, and then it is not
    back.succeed("mount -t tmpfs -o size=60m,nr_inodes=64 small /tmp/in")
    filler = back.spawn(["chrt", "-f", "1", "python3", "-c", FILLER])
    try:
        assert next(iter(filler.lines())) == "ready"
        with pytest.raises(TransferFailed, match="no space left"):
            transfer(front, "/tmp/big", back, "/tmp/in", over)
        assert names(back) == ["filler"]
    finally:
        filler.kill()
        filler.wait(10)
        back.wait_until_succeeds("umount /tmp/in")


def kill_when_moving(victim: Vm, pattern: str) -> threading.Thread:
    """Kill a process of a VM with -9 as soon as it is there and has had a moment to move bytes."""

    def strike() -> None:
        victim.wait_until_succeeds(f"pgrep -f '{pattern}'", every=0.05)
        victim.wait_until_succeeds(f"pkill -9 -f '{pattern}'", every=0.05)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


@pytest.mark.parametrize("role", ["receive", "send"])
def test_an_end_killed_is_told_at_once(front: Vm, back: Vm, over: Over, role: str) -> None:
    thread = kill_when_moving(back if role == "receive" else front, f"[g]uest.transfer {role}")
    started = time.monotonic()
    with pytest.raises(TransferFailed):
        transfer(front, "/tmp/big", back, "/tmp/in", over, stall=60)
    assert time.monotonic() - started < 50  # not the ends' own limit of 60 s: the host saw the process die
    thread.join()
    assert names(back) == []
    back.fail("pgrep -f '[g]uest.transfer'")
    front.fail("pgrep -f '[g]uest.transfer'")
    assert transfer(front, "/tmp/odd", back, "/tmp/in", over).size == 100001  # and the next one works


@pytest.mark.parametrize("victim", ["front", "back"])
def test_a_vm_killed_half_way(victim: str) -> None:
    with Testbed(keep="never") as bed:
        front, back = bed.boot("front", "back")
        link = bed.link(front, back)
        front.succeed("head -c 60000000 /dev/zero > /tmp/big")
        moving = threading.Event()

        def progress(_side: str, phase: str, done: int, _size: int) -> None:
            if phase == "transfer" and done > MIB:
                moving.set()

        def strike() -> None:
            assert moving.wait(60)
            bed.vms[victim].crash()

        thread = threading.Thread(target=strike)
        thread.start()
        with pytest.raises(VmStopped, match=f"VM {victim}: it was killed"):
            transfer(front, "/tmp/big", back, "/tmp/copy", OverRegion(link.name), progress=progress)
        thread.join()
        if victim == "front":
            assert back.succeed("ls -A /tmp") == ""
        assert bed.service is not None
        assert bed.service.members(link.name)[victim] == (1, False)


def test_a_file_of_this_machine_must_exist(tmp_path: Path, front: Vm) -> None:
    with pytest.raises(TestbedError, match="absent"):
        front.copy_to(tmp_path / "absent", "/tmp/x")
