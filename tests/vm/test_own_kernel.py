"""A user's own kernel, image and QEMU options, and the gdb stub."""

import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Self

import pytest

from images import Image
from images.archive import file, make_cpio
from testbed.kernel import BUILD_TREE_KERNEL
from testbed.run import Run
from testbed.vm import Vm

from .conftest import SpecMaker


@pytest.fixture(scope="module")
def tree(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a build tree looks like to us: the distribution's compressed kernel where `make bzImage` leaves one."""
    tree: Path = tmp_path_factory.mktemp("linux")
    kernel = tree / BUILD_TREE_KERNEL
    kernel.parent.mkdir(parents=True)
    member = f"./boot/vmlinuz-{image.manifest['kernel_release']}"
    with kernel.open("wb") as out, subprocess.Popen(["dpkg-deb", "--fsys-tarfile", image.kernel_deb],
                                                    stdout=subprocess.PIPE) as package:
        subprocess.run(["tar", "-xO", member], stdin=package.stdout, stdout=out, check=True)
    return tree


def test_a_build_tree_and_an_own_image_boot(
    spec: SpecMaker, run: Run, tree: Path, image: Image, tmp_path: Path
) -> None:
    own = {kind: shutil.copyfile(path, tmp_path / kind) for kind, path in
           (("initrd", image.initrd), ("rootfs", image.rootfs))}
    extra = ("-smbios", "type=1,serial=of-my-own")
    with Vm.boot(spec("own", kernel=tree, **own, extra=extra, kernel_args=("of.my=own",)), run) as vm:
        assert vm.spec.kernel == tree / BUILD_TREE_KERNEL
        assert vm.info.kernel == image.manifest["kernel_release"]
        assert "of.my=own" in vm.succeed("cat /proc/cmdline")
        assert vm.succeed("cat /sys/class/dmi/id/product_serial") == "of-my-own\n"
        command = Path(f"/proc/{vm.pid}/cmdline").read_bytes().split(b"\0")
        assert str(tmp_path / "rootfs") in command[command.index(b"-drive") + 1].decode()


def test_modules_of_another_kernel_hold_nothing_up(spec: SpecMaker, run: Run, image: Image, tmp_path: Path) -> None:
    """A kernel with all drivers built in refuses those in the initramfs, and boots all the same."""
    order = "".join(f"{name}.ko\n" for name in ("foreign", *image.manifest["boot_modules"]))
    more = make_cpio([file("modules/foreign.ko", b"\x7fELF"), file("modules/order", order.encode())])
    (tmp_path / "initrd").write_bytes(image.initrd.read_bytes() + more)
    with Vm.boot(spec("foreign", initrd=tmp_path / "initrd"), run) as vm:
        assert "did not take foreign; it must have them built in" in vm.log.read_text()


class Gdb:
    """As much of gdb's remote protocol as asks a question: $text#checksum, each acknowledged by +."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(30)
        self._sock.connect(str(path))
        self._come = b""

    def send(self, text: str) -> None:
        self._sock.sendall(f"${text}#{sum(text.encode()) % 256:02x}".encode())

    def packet(self) -> str:
        while (found := re.match(rb"\+*\$([^#]*)#..", self._come)) is None:
            piece = self._sock.recv(4096)
            assert piece, f"QEMU closed the connection after {self._come!r}"
            self._come += piece
        self._come = self._come[found.end() :]
        self._sock.sendall(b"+")
        return found[1].decode()

    def wait_stopped(self) -> None:
        """Ask why it stands still. A guest that ran until we came says of itself that it was interrupted (T02)."""
        self.send("?")
        while not (answer := self.packet()).startswith("T05"):
            assert answer.startswith("T02"), answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()


def test_gdb_stops_reads_and_lets_go(spec: SpecMaker, run: Run) -> None:
    with Vm.boot(spec("debugged", gdb="on"), run) as vm:
        assert vm.gdb is not None
        with Gdb(vm.gdb) as gdb:
            gdb.wait_stopped()
            assert vm.qmp("query-status")["running"] is False
            gdb.send("g")
            assert len(gdb.packet()) > 2 * 8 * 16  # sixteen general registers of eight bytes, in hex, and more
            gdb.send("c")
            assert vm.succeed("echo on again") == "on again\n"
        assert vm.succeed("echo alone again") == "alone again\n"
    assert not vm.gdb.exists()


def test_the_guest_waits_for_gdb(spec: SpecMaker, run: Run) -> None:
    vm = Vm(spec("waiting", gdb="wait"), run)
    vm.start()
    try:
        assert vm.qmp("query-status")["status"] == "prelaunch"
        assert vm.gdb is not None
        with Gdb(vm.gdb) as gdb:
            gdb.wait_stopped()
            gdb.send("c")
            assert vm.wait_ready(90).host == "waiting"
    finally:
        vm.close()
