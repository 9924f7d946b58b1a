"""The example module of docs/: built for the guest's kernel, loaded, talking to a host process by memory and bell."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import images
from host.ivshmem import client
from host.region import Region, RegionSpec
from idc.layout import MAGIC, Rights
from testbed.bed import Testbed
from testbed.vm import Vm

EXAMPLE = Path(__file__).parents[2] / "docs" / "module-example"
GIVE = "python3 -m guest.give own idc_example"

# Numbers as in idc_example.h: _IO('I', n), and _IOR for the first.
TALK = """
import fcntl, mmap, os, select, struct, sys
fd = os.open("/dev/ivshmem0", os.O_RDWR)
info = bytearray(16)
fcntl.ioctl(fd, 2 << 30 | 16 << 16 | ord("I") << 8, info)
me, vectors, size = struct.unpack("=IIQ", info)
RING, TAKE = (ord("I") << 8 | n for n in (1, 2))
poller = select.poll()
poller.register(fd, select.POLLIN)
fcntl.ioctl(fd, TAKE, 1)                           # what the host rang when it joined
os.pwrite(fd, b"from the module", 8192)
fcntl.ioctl(fd, RING, 1 << 16 | 1)                 # member 1, vector 1
while not fcntl.ioctl(fd, TAKE, 2):
    assert poller.poll(20000), "the host did not ring"
    fcntl.ioctl(fd, TAKE, 1), fcntl.ioctl(fd, TAKE, 0)
assert os.pread(fd, 13, 12288) == b"from the host"
with mmap.mmap(fd, size) as memory:
    assert memory[12288:12301] == b"from the host"
    memory[8192:8199] = b"by mmap"
assert os.pread(fd, 10, size) == b""
try:
    fcntl.ioctl(fd, TAKE, vectors)
except OSError as error:
    assert error.errno == 22
fcntl.ioctl(fd, RING, 1 << 16 | 2)
print(me, vectors, size)
"""

# Holds the file, a mapping and a poll while the device goes.
HOLD = """
import mmap, os, select
fd = os.open("/dev/ivshmem0", os.O_RDWR)
memory = mmap.mmap(fd, 4096)
print(memory[0], flush=True)
poller = select.poll()
poller.register(fd, select.POLLIN)
while not poller.poll(20000)[0][1] & select.POLLHUP:
    pass
try:
    os.pread(fd, 1, 0)
except OSError as error:
    print(error.errno, flush=True)
memory[0]                                          # SIGBUS: the memory is gone
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        module = images.build_module(EXAMPLE, bed.image)
        (vm,) = bed.boot("own")
        vm.copy_to(module, "/tmp/idc_example.ko")
        vm.succeed("insmod /tmp/idc_example.ko")
        yield bed


@pytest.fixture(scope="module")
def vm(bed: Testbed) -> Vm:
    return bed.vms["own"]


@pytest.fixture
def region(bed: Testbed, vm: Vm) -> Iterator[Region]:
    region = bed.region(RegionSpec("own", 1 << 20, {"own": Rights.RW, "host": Rights.RW}, vectors=4))
    yield region
    if vm.alive:
        bed.unplug(vm, region)
    assert bed.service is not None
    bed.service.drop("own")


def test_it_takes_nothing_by_itself(vm: Vm, region: Region) -> None:
    vm.succeed("test ! -e /dev/ivshmem0 && grep -q ^idc_example /proc/modules")
    assert region.name in vm.succeed("python3 -m guest.ivshmem")


def test_memory_and_doorbells_both_ways(vm: Vm, region: Region) -> None:
    with client.connect(region.socket("host")) as host:
        address = vm.wait_until_succeeds(GIVE).strip()
        host.wait(1, 0)
        talk = vm.spawn(["python3", "-c", TALK])
        assert host.wait(1, 60) == 1
        assert host.memory[8192:8207] == b"from the module"
        host.memory[12288:12301] = b"from the host"
        host.ring(0, 2)
        result = talk.wait(60)
        assert (result.exit_code, result.err) == (0, "")
        assert result.out.split() == ["0", "4", str(1 << 20)]
        assert host.wait(2, 60) == 1
        assert host.memory[8192:8199] == b"by mmap"
    # and back to VFIO, where the library finds it again
    vm.succeed(f"python3 -m guest.give {address} vfio-pci")
    vm.succeed("test ! -e /dev/ivshmem0")
    assert "carries 'own'" in vm.succeed("python3 -m guest.ivshmem")


@pytest.mark.usefixtures("region")
def test_a_device_that_goes_while_it_is_used(vm: Vm) -> None:
    address = vm.wait_until_succeeds(GIVE).strip()
    hold = vm.spawn(["python3", "-c", HOLD])
    lines = hold.lines()
    assert next(lines) == str(MAGIC[0])
    assert f"{address} belongs to the driver idc_example" in vm.execute("python3 -m guest.give x idc_example").err
    vm.succeed(f"echo {address} > /sys/bus/pci/drivers/idc_example/unbind")
    assert next(lines) == "19"  # ENODEV
    assert hold.wait(20).exit_code == -7  # SIGBUS
    vm.succeed("rmmod idc_example && insmod /tmp/idc_example.ko")


@pytest.mark.usefixtures("region")
def test_what_cannot_be_given_says_why(vm: Vm) -> None:
    refused = (("nobody idc_example", "no region 'nobody' to give away"), ("own nothing", "insmod it first"))
    for command, words in refused:
        result = vm.execute(f"python3 -m guest.give {command}")
        assert result.exit_code == 1
        assert words in result.err


def test_a_directory_without_a_module_is_refused(tmp_path: Path, bed: Testbed) -> None:
    with pytest.raises(images.ImageError, match="neither Kbuild nor Makefile"):
        images.build_module(tmp_path, bed.image)


def test_the_compilers_words_reach_the_user(tmp_path: Path, bed: Testbed) -> None:
    (tmp_path / "Kbuild").write_text("obj-m := broken.o\n")
    (tmp_path / "broken.c").write_text("int broken(void) { return missing; }\n")
    with pytest.raises(images.ProgramError, match="'missing' undeclared"):
        images.build_module(tmp_path, bed.image)
