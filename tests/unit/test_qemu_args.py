"""QEMU arguments: a pure function of the specification."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.errors import SpecError
from testbed.qemu_args import Disk, Memory, Nic, VmSpec, Wiring, format_args, path_wiring, qemu_args

SPEC = VmSpec("front", Path("/i/vmlinuz"), Path("/i/initrd"), Path("/i/root.erofs"))
WIRING = Wiring("fd=3", "fd=4", "fd=5")


def values(option: str, args: list[str]) -> list[str]:
    return [args[index + 1] for index, word in enumerate(args) if word == option]


def test_the_machine_can_do_vfio_in_the_guest_and_ends_on_a_panic() -> None:
    args = qemu_args(SPEC, WIRING)
    assert values("-machine", args) == ["q35,kernel-irqchip=split,memory-backend=ram"]
    assert "intel-iommu" in values("-device", args)
    assert "-no-reboot" in args
    assert "panic=-1" in values("-append", args)[0].split()
    assert "idc.name=front" in values("-append", args)[0].split()
    assert "pci=no_e820" in values("-append", args)[0].split()


def test_a_lone_emulated_cpu_keeps_its_memory_barriers() -> None:
    assert values("-smp", qemu_args(SPEC, WIRING)) == ["cpus=1,maxcpus=2"]
    assert values("-smp", qemu_args(replace(SPEC, cpus=2), WIRING)) == ["cpus=2"]
    assert values("-smp", qemu_args(replace(SPEC, accel="kvm"), WIRING)) == ["cpus=1"]


def test_accelerators_bring_their_cpu_model() -> None:
    tcg, kvm = qemu_args(SPEC, WIRING), qemu_args(replace(SPEC, accel="kvm"), WIRING)
    assert values("-cpu", tcg) == ["max,-erms,-fsrm"]
    assert values("-cpu", kvm) == ["host"]
    assert values("-accel", kvm) == ["kvm"]
    assert values("-cpu", qemu_args(replace(SPEC, cpu="qemu64"), WIRING)) == ["qemu64"]


def test_each_region_port_has_room_and_a_number_of_its_own() -> None:
    ports = [
        d
        for d in values("-device", qemu_args(replace(SPEC, region_ports=3, region_port_mib=64), WIRING))
        if d.startswith("pcie-root-port")
    ]
    assert ports == [f"pcie-root-port,id=rp{n},chassis={n + 1},slot={n + 1},pref64-reserve=64M" for n in range(3)]


def test_the_root_file_system_is_the_first_disk_and_shared() -> None:
    args = qemu_args(replace(SPEC, disks=(Disk(Path("/d/a,b.raw")),)), WIRING)
    root, extra = values("-drive", args)
    assert "file=/i/root.erofs" in root
    assert "readonly=on,file.locking=off" in root
    assert "file=/d/a,,b.raw" in extra
    assert "readonly=off" in extra


def test_nics_name_their_netdev_and_offer_their_mtu() -> None:
    args = qemu_args(replace(SPEC, nics=(Nic("tap,fd=9", "52:54:00:77:00:01", mtu=9000),), ip="10.77.0.1/24"), WIRING)
    assert values("-netdev", args) == ["tap,id=net0,fd=9"]
    assert any("netdev=net0" in d and "host_mtu=9000" in d for d in values("-device", args))
    assert "idc.ip=10.77.0.1/24" in values("-append", args)[0]


def test_ram_is_where_it_was_asked_for() -> None:
    memory = Memory(512, "file", Path("/dev/shm/x"), share=True)
    (ram,) = [o for o in values("-object", qemu_args(replace(SPEC, memory=memory), WIRING)) if "id=ram" in o]
    assert ram == "memory-backend-file,id=ram,size=512M,share=on,mem-path=/dev/shm/x"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Front"},
        {"name": "a b"},
        {"name": "-x"},
        {"name": "x" * 33},
        {"cpus": 0},
        {"region_ports": 29},
        {"region_port_mib": 100},
        {"memory": Memory(8)},
        {"memory": Memory(256, "file")},
        {"kernel_args": ("a b",)},
    ],
)
def test_nonsense_is_refused_with_a_sentence(change: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        replace(SPEC, **change)  # type: ignore[arg-type]


def test_a_dry_run_prints_one_option_a_line_and_a_shell_reads_it_back() -> None:
    args = qemu_args(SPEC, path_wiring("/run/x", "front"))
    text = format_args(args)
    assert shlex.split(text.replace("\\\n", " ")) == args
    lines = text.splitlines()
    assert lines[0].strip(" \\") == args[0]
    assert sum(word.startswith("-") for word in args) == len(lines) - 1
