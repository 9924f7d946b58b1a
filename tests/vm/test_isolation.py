"""What a VM reaches of others' regions, seen from inside: nothing; and after a revocation, just what is promised."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from host.region import RegionSpec
from host.revocation import Worth
from idc.layout import Rights
from testbed.bed import Testbed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.vm import Vm

SIZE = 1 << 22
AT = 1 << 20
SECRET = bytes.fromhex("5ec2e7") * 16

# Every BAR of every device, as the kernel shows them to root.
DUMP = """
import mmap, pathlib, sys
wanted, found, seen = [bytes.fromhex(word) for word in sys.argv[1:]], set(), 0
for file in sorted(pathlib.Path("/sys/bus/pci/devices").glob("*/resource[0-9]")):
    driver = file.parent / "driver"
    if driver.exists() and driver.resolve().name == "vfio-pci":
        (driver / "unbind").write_text(file.parent.name)  # which has it disabled
    enable = file.parent / "enable"
    if enable.read_text().strip() == "0":
        enable.write_text("1")
    size = file.stat().st_size
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as bar:
            data = bytes(bar)
    except OSError:
        continue  # ports, which hold no memory
    seen += size
    found |= {word.hex() for word in wanted if word in data}
print(seen, *sorted(found))
"""

HOLD = f"""
import pathlib, sys, time
from guest.ivshmem import open_region
with open_region(sys.argv[1]) as region:
    region.memory[{AT}:{AT + 4}] = b"mine"
    pathlib.Path("/tmp/held").touch()
    while not pathlib.Path("/tmp/revoked").exists():
        time.sleep(0.05)
    print(bytes(region.memory[{AT - 48}:{AT + 4}]).hex())
    region.memory[{AT}:{AT + 4}] = b"late"
    print(bytes(region.memory[{AT}:{AT + 4}]).hex())
"""

WRITE = f"""
import sys
from guest.ivshmem import open_region
with open_region(sys.argv[1]) as region:
    region.memory[{AT - 48}:{AT}] = bytes.fromhex(sys.argv[2])
"""

READ = f"""
import sys
from guest.ivshmem import open_region
with open_region(sys.argv[1]) as region:
    print(bytes(region.memory[{AT - 48}:{AT + 4}]).hex())
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        bed.boot("front", "back", "third")
        yield bed


def python(vm: Vm, program: str, *words: str) -> str:
    return vm.succeed(["python3", "-c", program, *words], timeout=60).strip()


def pair(bed: Testbed, name: str, *members: str) -> None:
    bed.region(RegionSpec(name, SIZE, dict.fromkeys(members, Rights.RW)))


def test_a_third_vm_finds_nothing_of_a_pair_in_any_bar(bed: Testbed) -> None:
    pair(bed, "secret", "front", "back")
    pair(bed, "own", "back", "third")
    own = bytes(reversed(SECRET))
    python(bed.vms["front"], WRITE, "secret", SECRET.hex())
    python(bed.vms["back"], WRITE, "own", own.hex())
    seen, *found = python(bed.vms["third"], DUMP, SECRET.hex(), own.hex()).split()
    assert int(seen) >= SIZE
    assert found == [own.hex()]  # so it looks where something is to be found
    assert SECRET.hex() in python(bed.vms["front"], DUMP, SECRET.hex(), own.hex()).split()


def test_an_abandoned_mapping_is_empty_and_leads_to_nobody(bed: Testbed) -> None:
    pair(bed, "left", "front", "back")
    front, back = bed.vms["front"], bed.vms["back"]
    python(back, WRITE, "left", SECRET.hex())
    holder = front.spawn(["python3", "-c", HOLD, "left"])
    front.succeed("until test -e /tmp/held; do sleep 0.05; done", timeout=30)
    done = bed.revoke("left", "front", Worth.ABANDONED)
    assert (done.held, done.holders) == (Worth.ABANDONED, ("front",))
    assert done.fresh is not None
    front.succeed("touch /tmp/revoked")
    result = holder.wait(30)
    assert result.exit_code == 0, result.err
    # it reads zeros, its own last word too; it can write, and read that back
    assert result.out.split() == [bytes(52).hex(), b"late".hex()]
    assert python(back, READ, done.fresh.name) == (SECRET + b"mine").hex()
    kept = (SECRET + b"mine").hex()
    assert kept not in python(front, DUMP, kept).split()


def test_after_a_hard_one_there_is_no_device(bed: Testbed) -> None:
    pair(bed, "gone", "front", "back")
    front = bed.vms["front"]
    before = front.succeed("ls /sys/bus/pci/devices").split()
    done = bed.revoke("gone", "front", Worth.HARD)
    assert (done.held, done.fresh) == (Worth.HARD, None)
    assert len(front.succeed("ls /sys/bus/pci/devices").split()) == len(before) - 1
    assert "gone" not in front.succeed("python3 -m guest.ivshmem")
