"""Block devices between VMs, by stock tools: ext4, fio, e2fsck; ends and a whole VM killed meanwhile."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from host.devices import DeviceError
from idc.device.states import State
from testbed.bed import Testbed
from testbed.calls import Process
from testbed.devices import LOG
from testbed.qemu_args import Disk

CONNECTED = (State.CONNECTED, State.CONNECTED)
FSX = (Path(__file__).parent / "block_fsx.py").read_bytes()
DRIVERS = "$(pgrep -P $(pgrep -o -f 'python3 -m guest.drivers'))"
KILL = f"kill -9 {DRIVERS}"
WAIT = 240.0


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(broker=True) as bed:
        bed.boot("front", "back")
        try:
            yield bed
        except BaseException:
            for name, vm in bed.vms.items():
                sys.stderr.write(f"--- {name}\n{vm.execute(f'tail -n 40 {LOG}; dmesg | tail -n 20').out}\n")
            raise


@contextmanager
def device(bed: Testbed, size: str = "64M", number: str = "0", **options: object) -> Iterator[str]:
    """A device with a fresh image; the path of its node."""
    image = f"/var/tmp/disk{number}.img"
    bed.vms["back"].succeed(f"rm -f {image} && truncate -s {size} {image}")
    seen = bed.devices.attach("block", "front", "back", {"image": image, **options}, number=number, wait=WAIT)
    try:
        assert seen.states == CONNECTED
        yield f"/dev/nbd{number}"
    finally:
        bed.vms["front"].execute(f"umount /dev/nbd{number}")
        bed.devices.detach(seen.name, wait=60)
        bed.vms["back"].execute(f"rm -f {image}")


def verify(node: str, size: str, seed: int) -> list[str]:
    """fio that writes blocks of random lengths at random places, and reads each again."""
    return ["fio", "--name=verify", f"--filename={node}", "--rw=randwrite", "--bsrange=512-131072", "--iodepth=16",
            "--ioengine=libaio", "--direct=1", f"--size={size}", f"--randseed={seed}", "--verify=crc32c",
            "--do_verify=1", "--verify_fatal=1", "--norandommap=0", "--fsync=64", "--allow_file_create=0"]


def ended(process: Process, what: str) -> str:
    result = process.wait(WAIT)
    assert result.exit_code == 0, f"{what}: {result.out}\n{result.err}"
    return result.out


def test_a_file_system_with_a_tree(bed: Testbed) -> None:
    front, back = bed.vms["front"], bed.vms["back"]
    with device(bed) as node:
        for step in (f"mkfs.ext4 -q {node} && mount {node} /mnt", "cp -a /usr/lib/python3.11 /mnt/tree && umount /mnt",
                     f"mount {node} /mnt && diff -r --no-dereference /usr/lib/python3.11 /mnt/tree",
                     "rm -r /mnt/tree/encodings && fstrim /mnt && umount /mnt", f"e2fsck -f -n {node}"):
            front.succeed(step, timeout=WAIT)
        assert "[none]" in front.succeed(f"cat /sys/block/{Path(node).name}/queue/scheduler")
        locked = front.succeed(f"grep VmLck /proc/{DRIVERS}/status").split()
        assert int(locked[1]) > 1000
        assert int(back.succeed("stat -c %b /var/tmp/disk0.img")) * 512 < 60 << 20  # what was trimmed is given back
        with pytest.raises(DeviceError, match="is locked by device block-0 of front"):
            bed.devices.attach("block", "front", "back", {"image": "/var/tmp/disk0.img"}, number="1", wait=5)


def churn(bed: Testbed, seconds: int, kill_every: float) -> int:
    """A file under fsx on one device and fio on another, while the back end is killed; how often it was."""
    front, back, kills, over = bed.vms["front"], bed.vms["back"], 0, threading.Event()
    with device(bed, "48M", timeout=600.0) as node, \
            device(bed, "16M", "1", connections=2, timeout=600.0, poll=3000) as second:
        front.succeed(f"mkfs.ext4 -q {node} && mount -o discard {node} /mnt", timeout=WAIT)
        assert front.execute("cat > /run/fsx.py", stdin=FSX).exit_code == 0
        fsx = front.spawn(["python3", "/run/fsx.py", "/mnt/file", str(seconds), str(seconds)])
        fio = front.spawn(verify(second, "16M", 1))
        while fsx.poll() is None:
            over.wait(kill_every)
            for each in (node, second):  # answered only once both are served again: a slow machine takes its time
                front.succeed(f"dd if={each} of=/dev/null bs=4096 count=1 iflag=direct", timeout=WAIT)
            kills += back.execute(KILL).exit_code == 0
        assert int(ended(fsx, "fsx")) >= 50
        ended(fio, "fio")
        front.succeed(f"umount /mnt && e2fsck -f -n {node}", timeout=WAIT)
    return kills


def test_a_minute_of_fsx_and_fio_while_the_back_end_is_killed(bed: Testbed) -> None:
    assert churn(bed, 60, 6.0) >= 2


@pytest.mark.soak
def test_ten_minutes_of_fsx_and_fio_while_the_back_end_is_killed(bed: Testbed) -> None:
    assert churn(bed, 600, 6.0) >= 50


def test_the_front_end_killed_under_load_is_replaced(bed: Testbed) -> None:
    """The kernel is given new sockets, and sends again what the dead process had."""
    front = bed.vms["front"]
    with device(bed, "16M", timeout=600.0) as node:
        fio = front.spawn(verify(node, "16M", 2))
        for _ in range(2):
            front.wait_until_succeeds(KILL)
            before = front.succeed(f"grep -c 'block-0: /dev/nbd0' {LOG} || true")
            front.wait_until_succeeds(f"test $(grep -c 'block-0: /dev/nbd0' {LOG}) -gt {before.strip()}", timeout=WAIT)
        ended(fio, "fio")


def test_whoever_writes_much_is_not_interrupted_for_each_piece(bed: Testbed) -> None:
    """As long as there is one processor for both; a program that waits for a single block has the pump at once."""
    front = bed.vms["front"]
    batch = f"for p in {DRIVERS}; do cut -d' ' -f41 /proc/$p/task/*/stat; done | grep -c '^3$' || true"  # SCHED_BATCH
    assert front.succeed("nproc").strip() == "1"
    with device(bed) as node:
        for _ in range(2):
            front.succeed(f"dd if=/dev/zero of={node} bs=1M count=16 oflag=direct")
            assert front.succeed(batch).strip() == "1"
            front.succeed(f"dd if={node} of=/dev/null bs=4k count=4 iflag=direct")
            assert front.succeed(batch).strip() == "0"
        front.succeed(f"dd if={node} of=/dev/null bs=1M count=4 iflag=direct")
        told = json.loads(front.succeed("sleep 1.2; cat /run/idc/block-0.front.back.json"))["queues"][0]
        assert told["holds"] > 0
        assert told["unheld"] == 0
        assert told["doorbells"] > 0


def test_a_full_disk_at_the_back_end_is_an_error_and_then_is_none(bed: Testbed) -> None:
    front, back = bed.vms["front"], bed.vms["back"]
    back.succeed("mkdir -p /run/small && mount -t tmpfs -o size=4m tmpfs /run/small",
                 "truncate -s 16M /run/small/image")
    seen = bed.devices.attach("block", "front", "back", {"image": "/run/small/image"}, wait=WAIT)
    try:
        front.fail("dd if=/dev/urandom of=/dev/nbd0 bs=1M count=8 oflag=direct")
        back.wait_until_succeeds(f"grep -q 'image /run/small/image: No space left on device' {LOG}")
        back.succeed("mount -o remount,size=32m /run/small")
        front.succeed("dd if=/dev/urandom of=/dev/nbd0 bs=1M count=8 oflag=direct", "blkdiscard /dev/nbd0")
        assert int(back.succeed("stat -c %b /run/small/image")) == 0
    finally:
        bed.devices.detach(seen.name, wait=60)
        back.succeed("umount /run/small")


WRITER = b"""
import os, sys
fds = [os.open(path, os.O_RDWR) for path in sys.argv[1:]]
for number in range(1, 1 << 20):
    for which, fd in enumerate(fds):
        block = number.to_bytes(8, "little") * 512
        os.pwrite(fd, block, number % 512 * 4096)
        os.fsync(fd)
        print(which, number, flush=True)
"""
READER = """
import sys
from pathlib import Path
from idc._core import ffi
from idc.block.image import Image, Spec
from idc.block.protocol import Op
for path, base in (("/srv/plain", None), ("/srv/over", Path("/srv/base"))):
    image = Image(Spec(Path(path), base), "test")
    memory = bytearray(4096)
    image.attach(ffi.from_buffer("uint8_t *", memory), 0, 4096)
    for block in range(512):
        assert image.request(Op.READ, block * 4096, 4096) == 0
        numbers = {bytes(memory[at:at + 8]) for at in range(0, 4096, 8)}
        print(int.from_bytes(numbers.pop(), "little") if len(numbers) == 1 else -1)
    image.detach()
    image.close()
"""


def test_a_back_end_vm_that_dies_has_all_that_was_flushed(tmp_path: Path) -> None:
    """An image and an overlay on a disk that survives; every number whose fsync has returned is there."""
    file = tmp_path / "disk"
    with file.open("wb") as disk:
        disk.truncate(128 << 20)
    with Testbed(broker=True) as bed:
        front, back = bed.boot("front", bed.spec("back", disks=(Disk(file),)))
        back.succeed("modprobe ext4; mkfs.ext4 -q /dev/vdb && mount /dev/vdb /srv",
                     "truncate -s 8M /srv/plain /srv/base && sync", timeout=WAIT)
        bed.devices.attach("block", "front", "back", {"image": "/srv/plain"}, wait=WAIT)
        bed.devices.attach("block", "front", "back", {"image": "/srv/over", "base": "/srv/base"}, number="1", wait=WAIT)
        assert front.execute("cat > /run/writer.py", stdin=WRITER).exit_code == 0
        front.spawn("exec python3 /run/writer.py /dev/nbd0 /dev/nbd1 >/run/acknowledged")
        front.wait_until_succeeds("test $(wc -l < /run/acknowledged) -gt 60", timeout=WAIT)
        back.crash()
        lines = [line.split() for line in front.succeed("cat /run/acknowledged").splitlines()]
        acknowledged = [max(int(number) for which, number in lines if which == device) for device in "01"]
    with Testbed() as bed:
        (back,) = bed.boot(bed.spec("again", disks=(Disk(file),)))
        back.succeed("modprobe ext4; mount /dev/vdb /srv", timeout=WAIT)
        found = [int(word) for word in back.succeed(["python3", "-c", READER], timeout=WAIT).split()]
        back.succeed("umount /srv && e2fsck -f -n /dev/vdb", timeout=WAIT)
    for which in range(2):
        numbers = found[which * 512:(which + 1) * 512]
        for number in range(max(1, acknowledged[which] - 500), acknowledged[which] + 1):
            assert numbers[number % 512] >= number, (which, number)
