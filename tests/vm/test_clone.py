"""Clones of a warm template: ready, themselves, apart from each other and from the template."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from images import Image
from testbed import network
from testbed.accel import Verdict
from testbed.bed import MIB, Testbed
from testbed.clone import Clone
from testbed.errors import BootFailed, SpecError, TemplateError
from testbed.run import Run
from testbed.template import RAM, STATE, Store, Template, key_of
from testbed.template_build import obtain
from testbed.transfer import OverRegion, transfer
from testbed.vm import Vm, start_all

from .conftest import SpecMaker

DRAW = """
import os, random, uuid, sys
print(os.getrandom(32).hex(), open("/dev/urandom", "rb").read(32).hex(), open("/dev/random", "rb").read(32).hex(),
      random.getrandbits(256), uuid.uuid4(), uuid.uuid1(), hash("x"))
"""


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def template(spec: SpecMaker) -> Iterator[Template]:
    """The template of the default machine, unharmed by whatever the tests do with its clones."""
    with obtain(spec("any")) as template:
        before = digest(template.directory / RAM)
        yield template
        assert digest(template.directory / RAM) == before, "a clone wrote into the template's RAM"
        template.verify()


@pytest.fixture(scope="module")
def pair(template: Template, spec: SpecMaker) -> Iterator[tuple[Vm, Vm]]:
    """Two clones for all tests that do them no harm."""
    with Run(keep="never") as run:
        one, two = start_all([Clone(template, spec(name), run) for name in ("one", "two")])
        with one, two:
            yield one, two


def test_they_are_ready_sooner_than_a_boot(template: Template, pair: tuple[Vm, Vm]) -> None:
    for vm in pair:
        assert vm.boot_times is not None
        assert vm.boot_times.ready < template.manifest["seconds"]["boot"] / 2
        assert vm.succeed("echo here") == "here\n"


def test_names_and_ids_are_their_own(pair: tuple[Vm, Vm]) -> None:
    for vm in pair:
        assert vm.info.host == vm.name == vm.succeed("hostname").strip()
        assert vm.info.boot_id == vm.succeed("cat /proc/sys/kernel/random/boot_id").strip()
        assert len(vm.succeed("cat /etc/machine-id")) == 33
        assert vm.succeed("ls /etc/ssh | grep -c ssh_host || true") == "0\n"
    one, two = pair
    assert one.info.boot_id != two.info.boot_id
    assert one.succeed("cat /etc/machine-id") != two.succeed("cat /etc/machine-id")


def test_the_clock_is_the_hosts(pair: tuple[Vm, Vm]) -> None:
    for vm in pair:
        before = time.time()
        guest = float(vm.succeed("date +%s.%N"))
        # Between the two looks of the host, give or take what the identity took to arrive.
        assert before - 1 < guest < time.time() + 1


def test_no_random_number_is_drawn_twice(template: Template, spec: SpecMaker, run: Run) -> None:
    # In fresh clones, at the first opportunity: all of them woke with the same pool and the same generators.
    clones = start_all([Clone(template, spec(f"r{n}"), run) for n in range(3)])
    processes = [clone.spawn(["python3", "-c", DRAW]) for clone in clones]
    drawn = [word for process in processes for word in process.wait(60).out.split()]
    for clone in clones:
        clone.close()
    assert len(drawn) == 3 * 7
    assert len(set(drawn)) == len(drawn), f"drawn twice: {sorted(drawn)}"


def test_the_kernel_is_told_of_the_new_generation_as_well(pair: tuple[Vm, Vm]) -> None:
    for vm in pair:
        vm.wait_until_succeeds("dmesg | grep -q 'crng reseeded due to virtual machine fork'")


def test_ssh_keys_are_made_after_the_clone(pair: tuple[Vm, Vm]) -> None:
    keys = {vm.succeed("/usr/lib/idc-testbed/sshd; cat /etc/ssh/ssh_host_ed25519_key.pub").split()[1] for vm in pair}
    assert len(keys) == 2


def test_memory_is_private(pair: tuple[Vm, Vm]) -> None:
    one, two = pair
    one.succeed("dd if=/dev/urandom of=/tmp/mine bs=1M count=20 2>&1")
    two.fail("test -e /tmp/mine")


def test_an_idle_one_has_no_more_than_30_mb_of_its_own(template: Template, spec: SpecMaker, run: Run) -> None:
    with Clone(template, spec("idle"), run) as clone:
        assert clone.spec.memory.mib == 256
        fields = dict(line.split(":") for line in Path(f"/proc/{clone.pid}/smaps_rollup").read_text().splitlines()[1:])
    assert int(fields["AnonHugePages"].split()[0]) == 0
    assert int(fields["Private_Dirty"].split()[0]) * 1024 <= 30_000_000


def test_two_clones_share_a_region_and_a_network(verdict: Verdict, image: Image, tmp_path: Path) -> None:
    source = tmp_path / "data"
    source.write_bytes(os.urandom(3 * MIB + 5))
    with Testbed(accel=verdict.accel, image=image, boot="warm", keep="never") as bed:
        front, back = bed.boot("front", "back", network=True)
        assert isinstance(front, Clone)
        link = bed.link(front, back)
        front.copy_to(source, "/tmp/data")
        done = transfer(front, "/tmp/data", back, "/tmp/copy", OverRegion(link.name))
        assert (done.size, done.sha256) == (3 * MIB + 5, digest(source))
        assert bed.network is not None
        macs = [vm.succeed("cat /sys/class/net/eth0/address").strip() for vm in (front, back)]
        assert macs == [member.nic.mac for member in bed.network.members]
        server = back.spawn(["iperf3", "-s", "-1"])
        back.wait_until_succeeds("ss -ltn | grep -q :5201")
        front.succeed(f"iperf3 -c {bed.network.members[1].address} -n 1M")
        assert server.wait(60).exit_code == 0
        with pytest.raises(SpecError, match=r"512 MiB does not fit into VM front: .* 256 MiB"):
            bed.link(front, back, name="large", size=512 * MIB)
        assert front.succeed("echo well") == "well\n"


def test_sockets_connect_clones_where_there_are_no_taps(template: Template, spec: SpecMaker, run: Run) -> None:
    with network.make(2, wish="stream") as net:
        clones = [Clone(template, spec(f"n{n}", nics=(m.nic,), ip=m.ip), run) for n, m in enumerate(net.members)]
        one, two = start_all(list[Vm](clones))
    with one, two:
        one.succeed(f"busybox ping -c 1 -w 20 {net.members[1].address}")


def test_a_crash_of_a_clone_harms_nobody(template: Template, spec: SpecMaker, run: Run) -> None:
    with Clone(template, spec("doomed"), run) as doomed:
        doomed.succeed("dd if=/dev/zero of=/tmp/much bs=1M count=50 2>&1")
        doomed.crash()
    with Clone(template, spec("next"), run) as following:
        assert following.succeed("test ! -e /tmp/much && echo clean") == "clean\n"


def test_ten_side_by_side(template: Template, spec: SpecMaker, run: Run) -> None:
    clones = start_all([Clone(template, spec(f"c{n}"), run) for n in range(10)])
    assert [clone.succeed("hostname").strip() for clone in clones] == [f"c{n}" for n in range(10)]
    assert len({clone.info.boot_id for clone in clones}) == 10
    for clone in clones:
        clone.close()


def test_what_cannot_be_cloned_boots_and_says_so(
    verdict: Verdict, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    started: list[Vm] = []

    def start(vms: list[Vm], _timeout: float) -> list[Vm]:
        started.extend(vms)
        return vms

    monkeypatch.setattr("testbed.bed.start_all", start)
    with Testbed(accel=verdict.accel, image=image, keep="never", notify=said.append) as bed:
        bed.boot(bed.spec("debugged", extra=("-s",)))
        assert type(started[0]) is Vm
        assert said == ["VM debugged boots, for it cannot be cloned: it has extra QEMU options (-s)"]
    with (
        Testbed(accel=verdict.accel, image=image, boot="warm", keep="never") as bed,
        pytest.raises(SpecError, match="cannot be cloned: it has extra"),
    ):
        bed.boot(bed.spec("debugged", extra=("-s",)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, template: Template) -> Store:
    """A cache of these tests' own, to do harm in: a copy of the template, times included."""
    store = Store(tmp_path_factory.mktemp("store"))
    copy = store.directory(template.directory.name)
    copy.mkdir(parents=True)
    for path in template.directory.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
        os.utime(copy / path.name, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    return store


def test_a_state_that_qemu_does_not_take_ends_the_clone_with_the_reason(
    store: Store, spec: SpecMaker, run: Run, template: Template
) -> None:
    """Damage that no checksum tells, because whoever did it wrote the checksum too."""
    directory = store.directory(template.directory.name)
    before = {name: (directory / name).read_bytes() for name in (STATE, "template.json")}
    manifest = json.loads(before["template.json"])
    half = before[STATE][: len(before[STATE]) // 2]
    (directory / STATE).write_bytes(half)
    manifest["state"] = {"bytes": len(half), "sha256": hashlib.sha256(half).hexdigest()}
    (directory / "template.json").write_text(json.dumps(manifest))
    with Template.load(directory, spec("halved")) as halved:
        began = time.monotonic()
        reason = r"did not wake from template [\s\S]*load of migration failed"
        with pytest.raises(BootFailed, match=reason), Clone(halved, spec("halved"), run):
            pass
        assert time.monotonic() - began < 20, "nobody noticed that QEMU had ended"
    for name, data in before.items():
        (directory / name).write_bytes(data)


def test_a_truncated_template_is_built_again_with_the_reason(store: Store, spec: SpecMaker, run: Run) -> None:
    wanted = spec("again")
    directory = store.directory(key_of(wanted))
    said: list[str] = []
    with obtain(wanted, store=store, notify=said.append) as sound:
        assert said == []
        os.truncate(directory / RAM, 1 * MIB)
        clone = Clone(sound, wanted, run)
        with pytest.raises(TemplateError, match="does not fit any more: ram has 1048576 bytes"):
            clone.start()
    with obtain(wanted, store=store, notify=said.append) as rebuilt:
        assert len(said) == 1
        assert "is built again: ram has 1048576 bytes, it was written with" in said[0]
        with Clone(rebuilt, wanted, run) as vm:
            assert vm.succeed("hostname") == "again\n"
    assert sorted(path.name for path in directory.iterdir()) == [RAM, STATE, "template.json"]
    assert list((store.root / "tmp").iterdir()) == []


def test_a_full_disk_is_told_before_the_boot(
    tmp_path: Path, spec: SpecMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * MIB))
    with pytest.raises(TemplateError) as caught:
        obtain(spec("any"), store=store)
    told = f"could not be built: 300 MiB needed, 20 MiB free: {store.root}"
    assert caught.value.message.endswith(told)
    assert caught.value.hint.endswith("`testbed snapshot prune` makes room")
    assert store.stored() == []
    assert list((store.root / "tmp").iterdir()) == []


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, spec: SpecMaker) -> None:
    broken = spec("broken", kernel_args=("rdinit=/no/such/init", "init=/no/such/init"))
    store = Store(tmp_path / "store")
    with pytest.raises(TemplateError, match="could not be built: did not boot") as caught:
        obtain(broken, store=store)
    assert "\n" not in caught.value.message
    assert store.stored() == []
    assert list((store.root / "tmp").iterdir()) == []
