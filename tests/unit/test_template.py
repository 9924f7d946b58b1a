"""When a template fits, and what is said when it does not. No VM: the files are made up."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.bench.names.boot import percentile
from testbed.errors import SpecError, TemplateError
from testbed.qemu_args import Disk, Memory, Nic, VmSpec, Wiring, clone_args, clone_nic, qemu_args
from testbed.template import MANIFEST, RAM, STATE, Store, Template, identity_of, key_of, machine_of, why_cold


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    for name in ("qemu", "kernel", "initrd", "rootfs"):
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).chmod(0o755)
    return VmSpec("front", tmp_path / "kernel", tmp_path / "initrd", tmp_path / "rootfs", qemu=str(tmp_path / "qemu"))


@pytest.fixture
def made(spec: VmSpec, tmp_path: Path) -> Path:
    """A template of `spec` as the builder leaves it, but for what is in the files."""
    directory = Store(tmp_path / "store").directory(key_of(spec))
    directory.mkdir(parents=True)
    (directory / RAM).write_bytes(bytes(4096))
    (directory / STATE).write_bytes(b"state")
    (directory / MANIFEST).write_text(json.dumps({
        "identity": identity_of(spec), "ram": {"bytes": 4096, "mtime_ns": (directory / RAM).stat().st_mtime_ns},
        "state": {"bytes": 5, "sha256": hashlib.sha256(b"state").hexdigest()}}))
    return directory


def test_names_and_networks_share_a_template_and_shapes_do_not(spec: VmSpec) -> None:
    nic = Nic("tap,fd=9", "52:54:00:00:00:01")
    assert key_of(replace(spec, name="back", ip="10.0.0.1/24", nics=(nic,))) == key_of(spec)
    others = [replace(spec, cpus=2), replace(spec, memory=Memory(512)), replace(spec, accel="kvm"),
              replace(spec, region_ports=5), replace(spec, region_port_mib=64), replace(spec, cpu="qemu64"),
              replace(spec, kernel_args=("debug",)), replace(spec, tb_mib=64), replace(spec, qemu="qemu-other"),
              replace(spec, kernel=Path("/another"))]
    assert len({key_of(other) for other in [spec, *others]}) == len(others) + 1


@pytest.mark.parametrize(("fields", "reason"), [
    ({"disks": (Disk(Path("/d")),)}, "disks of its own"),
    ({"extra": ("-s",)}, r"extra QEMU options \(-s\)"),
    ({"memory": Memory(256, "memfd", share=True)}, "memory is not plain"),
    ({"nics": (Nic("user", "52:54:00:00:00:01"),) * 3}, "3 network cards"),
    ({"region_ports": 28}, "28 region ports"),
])
def test_what_cannot_be_cloned_says_why(spec: VmSpec, fields: dict[str, object], reason: str) -> None:
    assert not why_cold(spec)
    other = replace(spec, **fields)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=reason):
        key_of(other)


def test_a_sound_template_opens_and_maps_its_ram_from_a_descriptor(spec: VmSpec, made: Path) -> None:
    with Template.load(made, spec) as template:
        ram, _ = template.fds
        assert template.machine.memory == Memory(256, "file", Path(f"/proc/self/fd/{ram}"), share=False)
        state = template.open_state()
        assert os.read(state, 100) == b"state"
        os.close(state)


def touched(path: Path) -> None:
    os.utime(path, ns=(0, 0))


@pytest.mark.parametrize(("name", "harm", "reason"), [
    (RAM, lambda path: os.truncate(path, 100), "ram has 100 bytes, it was written with 4096"),
    (RAM, touched, "ram was written to after"),
    (RAM, os.unlink, "ram is missing"),
    (STATE, lambda path: os.truncate(path, 4), "state has 4 bytes, it was written with 5"),
    (STATE, lambda path: path.write_bytes(b"STATE"), "state is damaged"),
    (STATE, os.unlink, "state is missing"),
    (MANIFEST, lambda path: os.truncate(path, 20), r"template.json is damaged"),
    (MANIFEST, lambda path: path.write_text("{}"), r"template.json is damaged \('identity'\)"),
    (MANIFEST, os.unlink, "template.json is missing"),
    ("../../qemu", touched, "QEMU changed"),
    ("../../kernel", touched, "kernel changed"),
    ("../../rootfs", lambda path: path.write_bytes(b"longer than it was"), "root file system changed"),
])
def test_one_that_does_not_fit_is_refused_with_the_reason(
    spec: VmSpec, made: Path, name: str, harm: Callable[[Path], object], reason: str
) -> None:
    harm(made / name)
    with pytest.raises(TemplateError, match=reason):
        Template.load(made, spec)
    if not name.startswith(".."):
        (stored,) = Store(made.parent).stored()
        assert stored.problem


def test_harm_done_after_it_was_opened_is_noticed_too(spec: VmSpec, made: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    with Template.load(made, spec) as template:
        assert not template.misfit()
        os.truncate(made / RAM, 0)
        with pytest.raises(TemplateError, match="ram has 0 bytes"):
            template.verify()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_missing_image_is_the_callers_fault(spec: VmSpec) -> None:
    with pytest.raises(SpecError, match="no /no/kernel"):
        identity_of(replace(spec, kernel=Path("/no/kernel")))
    with pytest.raises(SpecError, match="no /no/qemu"):
        identity_of(replace(spec, qemu="/no/qemu"))


def test_pruning_keeps_what_was_used_last_and_what_is_in_use(spec: VmSpec, made: Path) -> None:
    store = Store(made.parent)
    with store.locked(made.name, shared=True):
        assert store.prune(keep=0) == []
    assert store.prune(keep=1) == []
    assert [stored.key for stored in store.prune(keep=0)] == [made.name]
    assert store.stored() == []


def test_a_clone_has_the_templates_machine_and_its_own_name_and_cards(spec: VmSpec) -> None:
    wiring = Wiring("fd=3", "fd=4", "fd=5")
    nics = (Nic("tap,fd=9", "52:54:00:00:00:01", mtu=9000), Nic("user", "52:54:00:00:00:02"))
    template = qemu_args(machine_of(spec, Path("/t/ram"), share=True), wiring)
    clone = clone_args(machine_of(spec, Path("/t/ram"), share=False), replace(spec, nics=nics), wiring)

    def devices(args: list[str]) -> list[str]:
        return [args[index + 1] for index, word in enumerate(args) if word == "-device"]

    assert devices(clone) == devices(template)
    assert "-kernel" not in clone
    assert clone[1:3] == ["-name", "front,debug-threads=on"]
    assert clone[-6:] == ["-netdev", "tap,id=net0,fd=9", "-netdev", "user,id=net1", "-incoming", "defer"]
    assert clone_nic(0, nics[0]) | {"romfile": ""} == {
        "driver": "virtio-net-pci", "id": "nic0", "netdev": "net0", "mac": nics[0].mac, "romfile": "", "bus": "hp0",
        "host_mtu": 9000}


def test_percentiles_are_values_that_were_measured() -> None:
    samples = tuple(float(n) for n in range(20, 0, -1))
    assert [percentile(samples, p) for p in (0, 50, 90, 100)] == [1, 10, 18, 20]
    assert percentile((3.0,), 90) == 3
    with pytest.raises(ValueError, match="no samples"):
        percentile((), 50)
