"""A QEMU with an ivshmem device and no guest: the test plays the guest through the qtest protocol.

It configures the device over 0xcf8/0xcfc as firmware would. Interrupts arrive without a processor: each MSI-X
vector is programmed to write its number into a word of RAM, so a doorbell that arrived can be read there.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Self

from region_support import DEADLINE

from host.region import DoorbellAttachment, PlainAttachment

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

QEMU = "qemu-system-x86_64"
SLOT = 4
BAR0, BAR1, BAR2 = 0xFE00_0000, 0xFE00_1000, 0xE000_0000
IV_POSITION, DOORBELL = 8, 12
RAM_WORDS = 0x20_0000  # vector v writes RANG + v to RAM_WORDS + 4 * v
RANG = 0x5EED_0000


def doorbell_options(socket_path: Path, vectors: int) -> list[str]:
    """QEMU options for an ivshmem-doorbell in the slot this driver looks at."""
    return [
        "-chardev", f"socket,path={socket_path},id=iv",
        "-device", f"ivshmem-doorbell,chardev=iv,vectors={vectors},addr={SLOT}",
    ]  # fmt: skip


def plain_options(memory: Path, size: int) -> list[str]:
    """QEMU options for a read-only ivshmem-plain in that slot."""
    backend = f"memory-backend-file,id=iv,mem-path={memory},share=on,readonly=on,size={size}"
    return ["-object", backend, "-device", f"ivshmem-plain,memdev=iv,addr={SLOT}"]


def options_for(attachment: DoorbellAttachment | PlainAttachment) -> list[str]:
    """QEMU options that plug what `Region.attachment` says."""
    if isinstance(attachment, DoorbellAttachment):
        return doorbell_options(attachment.socket, attachment.vectors)
    return plain_options(attachment.memory, attachment.size)


class Machine:
    """A stopped QEMU with one ivshmem device, its BARs mapped. Context manager: killed at the end."""

    def __init__(self, directory: Path, name: str, options: Sequence[str], vectors: int = 0) -> None:
        self._log = directory / f"{name}.log"
        path = directory / f"{name}.qtest"
        qemu = shutil.which(QEMU)
        assert qemu is not None, f"{QEMU} is missing: install qemu-system-x86"
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(str(path))
            listener.listen()
            listener.settimeout(DEADLINE)
            self.process = subprocess.Popen(
                [qemu, "-M", "q35", "-accel", "tcg", "-S", "-m", "16", "-display", "none", "-nodefaults",
                 "-qtest", f"unix:{path}", "-qtest-log", "/dev/null", *options],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
            try:
                self._sock, _ = listener.accept()
            except BaseException:
                self.kill_process()
                raise
            finally:
                path.unlink()
        self._sock.settimeout(DEADLINE)
        self._file = self._sock.makefile("rw", encoding="ascii")
        self._configure(vectors)

    def _configure(self, vectors: int) -> None:
        assert self.config_read(0) == 0x1110_1AF4, f"no ivshmem device in the slot; {self._log.read_text()}"
        for register, value in ((0x10, BAR0), (0x14, BAR1), (0x18, BAR2), (0x1C, 0)):
            self.config_write(register, value)
        self.config_write(4, 0x6)  # memory space, bus master (without which no MSI goes out)
        for vector in range(vectors):
            entry = BAR1 + 16 * vector
            for offset, value in ((0, RAM_WORDS + 4 * vector), (4, 0), (8, RANG + vector), (12, 0)):
                self.write(entry + offset, value)
        if vectors:
            capability = self._msix_capability()
            self.config_write(capability, self.config_read(capability) | 1 << 31)  # enable, all unmasked

    def _msix_capability(self) -> int:
        at = self.config_read(0x34) & 0xFF
        while at:
            value = self.config_read(at)
            if value & 0xFF == 0x11:
                return at
            at = value >> 8 & 0xFF
        raise AssertionError("the device has no MSI-X capability")

    def command(self, text: str) -> str:
        """One qtest command; its answer without the OK."""
        self._file.write(text + "\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            assert line, f"QEMU ended: {self._log.read_text()}"
            if line.startswith("OK"):
                return line[2:].strip()
            assert line.startswith("IRQ"), line

    def config_read(self, register: int) -> int:
        """A u32 of the device's configuration space."""
        self.command(f"outl 0xcf8 {0x8000_0000 | SLOT << 11 | register:#x}")
        return int(self.command("inl 0xcfc"), 16)

    def config_write(self, register: int, value: int) -> None:
        """Write a u32 to the device's configuration space."""
        self.command(f"outl 0xcf8 {0x8000_0000 | SLOT << 11 | register:#x}")
        self.command(f"outl 0xcfc {value:#x}")

    def read(self, address: int) -> int:
        """A u32 of guest-physical memory."""
        return int(self.command(f"readl {address:#x}"), 16)

    def write(self, address: int, value: int) -> None:
        """Write a u32 to guest-physical memory."""
        self.command(f"writel {address:#x} {value:#x}")

    @property
    def id(self) -> int:
        """What the device's IVPosition register says."""
        return self.read(BAR0 + IV_POSITION)

    def ring(self, peer: int, vector: int) -> None:
        """Write the doorbell register."""
        self.write(BAR0 + DOORBELL, peer << 16 | vector)

    def rang(self, vector: int) -> bool:
        """Whether that vector's interrupt arrived since the last time this said so."""
        if self.read(RAM_WORDS + 4 * vector) != RANG + vector:
            return False
        self.write(RAM_WORDS + 4 * vector, 0)
        return True

    def wait_rang(self, vector: int) -> None:
        """Wait for an interrupt. It can only be looked for: no processor runs that it could wake."""
        deadline = time.monotonic() + DEADLINE
        while not self.rang(vector):
            assert time.monotonic() < deadline, f"vector {vector} was not rung within {DEADLINE:g} s"
            time.sleep(0.002)

    def shared_read(self, offset: int) -> int:
        """A u32 of the region through BAR 2."""
        return self.read(BAR2 + offset)

    def shared_write(self, offset: int, value: int) -> None:
        """Write a u32 to the region through BAR 2."""
        self.write(BAR2 + offset, value)

    def kill(self) -> None:
        """SIGKILL."""
        self._file.close()
        self._sock.close()
        self.kill_process()

    def kill_process(self) -> None:
        """SIGKILL the process and reap it."""
        self.process.kill()
        self.process.wait()

    @property
    def running(self) -> bool:
        """Whether QEMU still lives."""
        return self.process.poll() is None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
