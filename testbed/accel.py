"""Which accelerator works here, proved by booting a guest with it; remembered with what the proof rests on.

Depends on `testbed.run` (the probe's QEMU must not outlive anybody), `testbed.errors` and `images` (its cache, its
cpio). /dev/kvm can exist, open, answer its version, and yet not run a stock kernel: seen under a nested para-virtual
KVM, which reports "emulation failure" after a minute at full load. So the probe boots the very kernel that the guests
use, with an initramfs of one small program, until that program has spoken from user space.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import hashlib
import json
import logging
import os
import pwd
import selectors
import shutil
import stat
import struct
import subprocess
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import images
from images import archive
from testbed.errors import AccelUnavailable, SpecError
from testbed.qemu_args import DEFAULT_QEMU, Accel
from testbed.run import Run

Wish = Literal["auto", "kvm", "tcg"]
PROBE_SECONDS = 5.0
"""The longest a probe may take. A working KVM needs less than one, so this is no close call."""
_DEVICE = Path("/dev/kvm")
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12  # the only one since Linux 2.6.22
_MARKER = b"idc-probe: user space runs\n"
_FORMAT = 1

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What to run guests with, and why: `reason` is one line for people, `evidence` what it was based on.

    `seconds` is what finding out took; `cached` says that it was found out by an earlier process.
    """

    accel: Accel
    reason: str
    evidence: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False

    def __str__(self) -> str:
        return f"{self.accel}: {self.reason}"


def choose(
    wish: Wish,
    kernel: Path,
    *,
    qemu: str = DEFAULT_QEMU,
    cpu: str = "host",
    cache: Path | None = None,
    limit: float = PROBE_SECONDS,
    device: Path = _DEVICE,
) -> Verdict:
    """The accelerator for guests that run `kernel`.

    "auto" proves KVM, or says TCG and why; "kvm" proves it or raises AccelUnavailable with the reason; "tcg" asks
    nothing. `cache` is a directory, None for the user's own. `limit` in seconds bounds the probe.
    """
    if wish == "tcg":
        return Verdict("tcg", "asked for", {"wish": "tcg"})
    verdict = _prove(kernel, qemu, cpu, cache or images.default_directory() / "accel", limit, device)
    _log.info("accelerator %s (%s), evidence %s", verdict, "cached" if verdict.cached else "probed", verdict.evidence)
    if wish == "kvm" and verdict.accel != "kvm":
        raise AccelUnavailable(f"KVM cannot be used: {verdict.reason}", hint="--accel auto takes TCG where KVM fails")
    return verdict


def known(kernel: Path, *, qemu: str = DEFAULT_QEMU, cpu: str = "host", device: Path = _DEVICE) -> Verdict | None:
    """The verdict for guests that run `kernel` if it is known without a boot, else None. Raises SpecError: no QEMU."""
    program = shutil.which(qemu)
    if program is None:
        raise SpecError(f"there is no {qemu}", hint="apt install qemu-system-x86")
    evidence = _evidence(kernel, Path(program), cpu, device)
    refusal = _device_refusal(device)
    if refusal:
        return Verdict("tcg", refusal, evidence)
    return _recall(images.default_directory() / "accel" / _file_name(evidence), evidence)


def _file_name(evidence: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, evidence], sort_keys=True).encode()).hexdigest()[:24] + ".json"


def _prove(kernel: Path, qemu: str, cpu: str, cache: Path, limit: float, device: Path) -> Verdict:
    began = time.monotonic()
    program = shutil.which(qemu)
    if program is None:
        raise SpecError(f"there is no {qemu}", hint="apt install qemu-system-x86")
    refusal = _device_refusal(device)
    evidence = _evidence(kernel, Path(program), cpu, device)
    if refusal:
        # Quick to find out, and quick to be mended: not worth remembering.
        return Verdict("tcg", refusal, evidence, time.monotonic() - began)
    file = cache / _file_name(evidence)
    remembered = _recall(file, evidence)
    if remembered is not None:
        return remembered
    failure = _probe(program, kernel, cpu, limit)
    seconds = time.monotonic() - began
    if failure:
        verdict = Verdict("tcg", f"{device} opens, but {failure}", evidence, seconds)
    else:
        verdict = Verdict("kvm", f"a probe guest reached user space in {seconds:.1f} s", evidence, seconds)
    _remember(file, verdict)
    return verdict


def _device_refusal(device: Path) -> str:
    """Why KVM is out of the question without a boot; empty if it is not."""
    try:
        status = device.stat()
    except PermissionError:
        return f"no permission to look at {device}"
    except FileNotFoundError:
        return f"no {device} (no virtualization in this machine, or module kvm is not loaded)"
    if not stat.S_ISCHR(status.st_mode):
        return f"{device} is not a device"
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        owner, group = _name(pwd.getpwuid, status.st_uid), _name(grp.getgrgid, status.st_gid)
        remedy = f"sudo adduser {_name(pwd.getpwuid, os.getuid())} {group}, then log in again"
        if status.st_gid == 0 or status.st_mode & 0o060 != 0o060:  # membership would be too much, or not help
            remedy = f"sudo chgrp kvm {device} && sudo chmod g+rw {device} gives it to group kvm"
        return f"no permission for {device}, which is {owner}:{group} {stat.filemode(status.st_mode)} ({remedy})"
    except OSError as error:
        return f"{device} does not open: {error.strerror}"
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return f"{device} is not KVM: {error.strerror}"
    finally:
        os.close(fd)
    return "" if version == _KVM_API_VERSION else f"{device} speaks version {version}, not {_KVM_API_VERSION}"


def _name(lookup: object, number: int) -> str:
    """A user's or group's name, or its number where it has none."""
    assert callable(lookup)
    try:
        return str(lookup(number)[0])
    except KeyError:
        return str(number)


def _evidence(kernel: Path, qemu: Path, cpu: str, device: Path) -> dict[str, str]:
    """All that the outcome of a probe may depend on."""
    host = os.uname()
    status = qemu.stat()
    evidence = {
        "host": f"{host.release} {host.version}",
        "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "qemu": f"{qemu} {status.st_size} bytes {status.st_mtime_ns}",
        "kernel": _digest(kernel),
        "cpu": cpu,
        "user": f"{os.getuid()} {sorted(os.getgroups())}",
        "device": "none",
    }
    with contextlib.suppress(FileNotFoundError):
        kvm = device.stat()
        evidence["device"] = f"{kvm.st_rdev:#x} {stat.filemode(kvm.st_mode)} {kvm.st_uid}:{kvm.st_gid}"
    return evidence


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise SpecError(f"there is no kernel {path}") from error


def _recall(path: Path, evidence: dict[str, str]) -> Verdict | None:
    try:
        verdict = Verdict(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        _log.warning("%s is unreadable (%s); probing again", path, error)
        return None
    return replace(verdict, cached=True) if verdict.evidence == evidence else None


def _remember(path: Path, verdict: Verdict) -> None:
    """Write it down for the next process. Not being able to costs the next one its probe, and is no failure of this."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(verdict), indent=1))
        temporary.rename(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk leaves an empty file
            temporary.unlink()
        _log.warning("the verdict on KVM is not remembered: %s: %s", error.filename, error.strerror)


def probe_args(qemu: str, kernel: Path, initrd: Path, cpu: str) -> list[str]:
    """QEMU's arguments for the probe: the machine that the guests get, without their devices."""
    return [
        qemu, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", "q35,kernel-irqchip=split", "-accel", "kvm", "-cpu", cpu, "-m", "192M",
        "-device", "intel-iommu", "-chardev", "stdio,id=out,signal=off", "-serial", "chardev:out",
        "-kernel", str(kernel), "-initrd", str(initrd), "-append", "console=ttyS0 quiet panic=-1",
    ]  # fmt: skip


def _probe(qemu: str, kernel: Path, cpu: str, limit: float) -> str:
    """Boot the probe guest. Returns why it failed, or an empty string."""
    with Run(keep="never") as run:
        initrd = run.path("probe.cpio")
        initrd.write_bytes(probe_initrd())
        process = run.popen(probe_args(qemu, kernel, initrd, cpu), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            return _listen(process, limit)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def _listen(process: subprocess.Popen[bytes], limit: float) -> str:
    assert process.stdout is not None
    said = b""
    deadline = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while _MARKER.strip() not in said:
            if b"emulation failure" in said:
                return 'KVM cannot run a stock kernel ("emulation failure")'
            if not selector.select(max(0.0, deadline - time.monotonic())):
                words = f' ("{_last_line(said)}")' if said.strip() else ""
                return f"a stock kernel did not reach user space under it in {limit:g} s{words}"
            piece = os.read(process.stdout.fileno(), 65536)
            if not piece:
                code = process.wait()
                return f'QEMU ended with {code} while probing it ("{_last_line(said)}")'
            said += piece
    return ""


def _last_line(said: bytes) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1].decode("utf-8", "replace")[:200] if lines else "it said nothing"


def probe_initrd() -> bytes:
    """An initramfs in cpio's "newc" form with one file, /init: says that it runs, and powers the machine off."""
    return archive.make_cpio([archive.file("init", _probe_program(), 0o755)])


def _probe_program() -> bytes:
    """A static x86-64 program of some 200 bytes; written out here because the host may have no compiler."""
    head, base = 64 + 56, 0x400000
    text = _MARKER

    def code(message_at: int) -> bytes:
        return b"".join(
            (
                b"\xbf" + struct.pack("<I", 1),  # mov edi, 1 (standard output)
                b"\xbe" + struct.pack("<I", message_at),  # mov esi, message
                b"\xba" + struct.pack("<I", len(text)),  # mov edx, length
                b"\xb8" + struct.pack("<I", 1) + b"\x0f\x05",  # write(2)
                b"\xbf" + struct.pack("<I", 0xFEE1DEAD),  # reboot(2): the two magic numbers,
                b"\xbe" + struct.pack("<I", 672274793),
                b"\xba" + struct.pack("<I", 0x4321FEDC),  # power off
                b"\xb8" + struct.pack("<I", 169) + b"\x0f\x05",
                b"\xeb\xfe",  # should that fail: stay here, process 1 must not end
            )
        )

    program = code(base + head + len(code(0)))
    size = head + len(program) + len(text)
    elf = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + head, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return elf + segment + program + text
