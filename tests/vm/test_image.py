"""What is in the image, seen from inside a VM: our packages, the tools, the modules, init."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from images import ensure, list_images
from testbed.run import Run
from testbed.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from images import Image

    from .conftest import SpecMaker


@pytest.fixture(scope="module")
def vm(spec: SpecMaker) -> Iterator[Vm]:
    """One VM for all tests of this file."""
    with Run(keep="never") as run, Vm(spec("image"), run) as machine:
        yield machine


def test_a_second_call_finds_it(image: Image) -> None:
    said: list[str] = []
    assert ensure(progress=said.append) == image
    assert said == []
    assert image in list_images()


def test_small_enough(image: Image) -> None:
    assert image.rootfs.stat().st_size < 200 << 20


def test_no_systemd_and_no_host_keys(vm: Vm, image: Image) -> None:
    names = {name for name, _ in image.manifest["packages"]["root"]}
    assert "systemd" not in names
    assert vm.succeed("ls /etc/ssh /usr/lib | grep -cE 'ssh_host|^systemd' || true").strip() == "0"


def test_our_packages_fit_the_guests_python(vm: Vm) -> None:
    assert vm.succeed("python3 -c 'import idc._core, guest.agent, ssl, hashlib, ctypes, asyncio; print(1)'") == "1\n"


def test_python_is_compiled(vm: Vm) -> None:
    where = "/usr/lib/python3/dist-packages/guest/__pycache__/agent.cpython-*.pyc"
    # byte 4 of a .pyc: 1 means by hash, and not to be checked against the source
    assert vm.succeed(f"od -An -tu1 -j4 -N1 {where}").strip() == "1"


@pytest.mark.parametrize(
    "command",
    [
        "ip -V",
        "sshd -T -h /dev/null 2>&1 | grep -q . ; test -x /usr/lib/openssh/sftp-server",
        "iperf3 --version",
        "sockperf --version",
        "fio --version",
        "nbd-client -V",
        "modprobe -V",
        "mke2fs -V",
        "ps -V",
        "busybox true",
        "mount --version",
    ],
)
def test_tools_run(vm: Vm, command: str) -> None:
    vm.succeed(command)


def test_modules_load(vm: Vm, image: Image) -> None:
    vm.succeed(
        "modprobe -a "
        + " ".join(
            ["nbd", "tun", "9p", "9pnet_fd", "9pnet_virtio", "bridge", "veth", "vhci-hcd", "ext4", "fuse", "loop"]
        )
    )
    loaded = vm.succeed("cut -d' ' -f1 /proc/modules").split()
    assert {"vfio_pci", "vfio_iommu_type1", "virtio_net", "overlay"} <= set(loaded)
    assert set(loaded) <= set(image.manifest["modules"])


def test_mounts(vm: Vm) -> None:
    kinds = dict(line.split()[1:3] for line in vm.succeed("cat /proc/mounts").splitlines())
    assert kinds["/"] == "overlay"
    assert {kinds[path] for path in ("/tmp", "/run", "/dev/shm")} == {"tmpfs"}
    assert kinds["/dev/pts"] == "devpts"
    vm.succeed("touch /usr/can-write && rm /usr/can-write")


def test_name_and_loopback(vm: Vm) -> None:
    assert vm.succeed("uname -n") == "image\n"
    assert "inet 127.0.0.1/8" in vm.succeed("ip address show dev lo")


def test_orphans_are_reaped(vm: Vm) -> None:
    vm.succeed("sh -c '(sleep 0.1 &) ; exit 0'; sleep 0.5; ! ps -eo stat= | grep -q '^Z'")


def test_ssh_server_starts_on_request_with_a_key_of_its_own(vm: Vm) -> None:
    vm.succeed("! pidof sshd && test ! -e /etc/ssh/ssh_host_ed25519_key")
    vm.succeed("/usr/lib/idc-testbed/sshd && /usr/lib/idc-testbed/sshd")
    assert len(vm.succeed("pidof sshd").split()) == 1
    assert "256" in vm.succeed("ssh-keygen -l -f /etc/ssh/ssh_host_ed25519_key.pub")
