"""What a VM reaches of others' regions, seen from inside: nothing; and after a revocation, just what is promised."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from host.region import RegionSpec
from host.revocation import Worth
from idc.layout import ChannelSpec, Kind, Rights
from testbed import cli, cli_up, isolation, registry
from testbed.bed import Testbed, plug, plugged
from testbed.errors import QmpFailed, SpecError
from testbed.supervisor import Supervisor
from testbed.topology import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.vm import Vm

SIZE = 1 << 22
AT = 1 << 20
LIMIT = 120.0
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

WORDS = """
import sys
from idc.buffers import PagePool, process_memory
from idc.endpoint import Client, Endpoint, Resources, State
from idc.remote import Access, Exports, Refusal, Regions, Remote
from idc.transport.address import open_port

class Words(Client):
    def __init__(self):
        self.heard = []

    def message(self, endpoint, message):
        self.heard.append(bytes(message.body))
        message.complete()

port, words = open_port("ivshmem:lent/service"), Words()
memory = port.regions[0].memory
endpoint = Endpoint(port, words, Resources(remote=Remote(Exports(regions=Regions(*port.regions)))))

def until(condition):
    while not condition():
        endpoint.pump(1.0)

def say(word):
    done = []
    endpoint.submit_message(word, done.append)
    until(lambda: done)

def hear(count):
    until(lambda: len(words.heard) == count)

until(lambda: endpoint.state is State.CONNECTED)
"""

# Lends a buffer, takes it back, and shows what is in it once the other has had its way.
LEND = WORDS + """
pages = PagePool.of(port.regions[0]).allocate(4096)
_, at = pages.type.where(pages)
memory[at:at + 48] = bytes.fromhex(sys.argv[1])
registration = endpoint.register(pages, Access.READ)
say(registration.reference())
hear(1)
done = []
registration.unregister(done.append)
until(lambda: done)
say(b"%d" % at)
hear(2)
print(done[0].result.value, bytes(memory[at:at + 4]).hex())
"""

# Uses it, and again once it is taken back: by its reference, by a new one, and through the mapping.
BORROW = WORDS + """
def receive(remote):
    here, done = process_memory(bytearray(48)), []
    remote.receive_from(here, done.append)
    until(lambda: done)
    return f"{Refusal(done[0].error).name}" if done[0].error else bytes(here.base).hex()

hear(1)
remote = endpoint.remote(words.heard[0])
print(receive(remote), remote.route.value, remote.refusal.value)
say(b"used")
hear(2)
at = int(words.heard[1])
print(receive(remote), receive(endpoint.remote(words.heard[0])), bytes(memory[at:at + 48]).hex())
memory[at:at + 4] = b"soft"
say(b"wrote")
"""


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        bed.boot("front", "back", "third")
        yield bed


@pytest.fixture(autouse=True)
def ports_given_back(bed: Testbed) -> Iterator[None]:
    yield
    for name, region in list(bed.regions.items()):
        for vm in bed.vms.values():
            if plugged(vm, region):
                bed.unplug(vm, region, timeout=LIMIT)
        bed.drop(name)


def python(vm: Vm, program: str, *words: str) -> str:
    return vm.succeed(["python3", "-c", program, *words], timeout=LIMIT).strip()


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
    front.succeed("until test -e /tmp/held; do sleep 0.05; done", timeout=LIMIT)
    done = bed.revoke("left", "front", Worth.ABANDONED)
    assert (done.held, done.holders) == (Worth.ABANDONED, ("front",))
    assert done.fresh is not None
    front.succeed("touch /tmp/revoked")
    result = holder.wait(LIMIT)
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


def test_after_a_soft_one_only_the_library_refuses(bed: Testbed) -> None:
    channel = ChannelSpec("service", Kind.MESSAGE, "front", "back", 128 * 512, 512)
    bed.region(RegionSpec("lent", SIZE, dict.fromkeys(("front", "back"), Rights.RW), [channel]))
    owner = bed.vms["front"].spawn(["python3", "-c", LEND, SECRET.hex()])
    used, refused = python(bed.vms["back"], BORROW).splitlines()
    assert used.split() == [SECRET.hex(), "direct", "soft"]
    # it is refused by the reference that it had, and by the same one given anew; and can read all, and write
    assert refused.split() == ["WITHDRAWN", "STALE", SECRET.hex()]
    told = owner.wait(LIMIT)
    assert told.out.split() == ["ok", b"soft".hex()], told.err


def test_a_guest_that_does_not_let_go_keeps_a_dead_mapping(bed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(bed, "kept", "front", "back")
    front = bed.vms["front"]
    front.succeed("rm -f /tmp/held /tmp/revoked")
    holder = front.spawn(["python3", "-c", HOLD, "kept"])
    front.succeed("until test -e /tmp/held; do sleep 0.05; done", timeout=LIMIT)
    done = bed.revoke("kept", "front", patience=1.0)
    assert done.held is Worth.ABANDONED
    assert done.refusals
    assert done.refusals[0].startswith("hard: ")
    assert "kept" in isolation.dead(bed)["front"]
    supervisor = Supervisor(bed, parse({"name": "here", "vms": {}}))
    monkeypatch.setattr(registry, "running", lambda: ["here"])
    monkeypatch.setattr(cli_up, "_status", lambda _: supervisor.status())
    try:
        shown = CliRunner().invoke(cli.build("ps"), ["ps"]).output
    finally:
        supervisor.hang_up()
    held = ", ".join(isolation.dead(bed)["front"])
    assert f"here: VM front holds {len(isolation.dead(bed)['front'])} of at most 2 dead mappings: {held}" in shown
    front.succeed("touch /tmp/revoked")
    assert holder.wait(LIMIT).exit_code == 0
    # Asked before, its kernel lets go as soon as nobody uses the device.
    deadline = time.monotonic() + LIMIT
    while "kept" in isolation.dead(bed).get("front", ()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_who_cannot_be_given_the_fresh_region_is_named(bed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(bed, "moved", "back", "third")
    back, third = bed.vms["back"], bed.vms["third"]

    def refuse(vm: Vm, _region: object) -> None:
        raise QmpFailed("no room", vm=vm.name)

    with monkeypatch.context() as patched:
        patched.setattr(isolation, "plug", refuse)
        with pytest.raises(SpecError, match=r"region 'moved' is taken from back, abandoned; but third could not be "
                                            r"given 'moved.1' in its place: .*no room"):
            bed.revoke("moved", "back", Worth.ABANDONED)
    fresh = bed.regions["moved.1"]
    assert not plugged(third, fresh)
    assert "moved" not in bed.regions
    plug(third, fresh)
    assert python(third, READ, "moved.1") == bytes(52).hex()
    assert "iv-moved" in back.devices
    back.unplug("iv-moved")
