"""Templates: what a clone is made from, when one fits, where they lie. Starts nothing; testbed/template_build.py does.

A template is a booted VM that was stopped: a file with its RAM, which all clones map copy-on-write, and a file with the
state of its devices. One for each machine shape (all that QEMU's command line says), below the cache directory:

    templates/KEY/ram  state  template.json      templates/KEY.lock      templates/tmp/KEY  being built

KEY is a hash of the shape. What else must be as it was (the QEMU binary, kernel, image, this machine's processor) is
recorded in template.json and compared each time, so that a template that no longer fits is refused with the reason.
Depends on `images.cache`, `testbed.errors` and `testbed.qemu_args`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from images.cache import default_directory
from testbed.errors import SpecError, TemplateError
from testbed.qemu_args import ROOT_PORTS, Memory, VmSpec, Wiring, qemu_args

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

FORMAT = 1
"""Raised when templates are built differently: those of before no longer fit."""
HOT_PORTS = 2
"""Network cards that a clone can have: each needs a root port that the template has already."""
NAME = "template"
RAM, STATE, MANIFEST = "ram", "state", "template.json"
WIRING = Wiring("console", "agent", "qmp")  # where the sockets are makes no difference


def why_cold(spec: VmSpec) -> str:
    """Why no template can serve this VM, in a few words; empty if one can."""
    if spec.disks:
        return "it has disks of its own"
    if spec.extra:
        return f"it has extra QEMU options ({' '.join(spec.extra)})"
    if spec.gdb != "off":
        return "gdb is to look at it from the start"
    if spec.memory != Memory(spec.memory.mib):
        return "its memory is not plain"
    if len(spec.nics) > HOT_PORTS:
        return f"it has {len(spec.nics)} network cards, a clone can have {HOT_PORTS}"
    if spec.region_ports + HOT_PORTS > ROOT_PORTS:
        return f"its {spec.region_ports} region ports leave no room for a clone's network cards"
    return ""


def machine_of(spec: VmSpec, ram: Path, *, share: bool) -> VmSpec:
    """The machine that `spec` shares with its template and all other clones, over the RAM file `ram`.

    Raises SpecError if no template can serve it.
    """
    if reason := why_cold(spec):
        raise SpecError(f"VM {spec.name} cannot be cloned: {reason}", hint="boot it cold")
    memory = Memory(spec.memory.mib, "file", ram, share)
    return dataclasses.replace(spec, name=NAME, nics=(), ip="", pin=(), hot_ports=HOT_PORTS, memory=memory)


def key_of(spec: VmSpec) -> str:
    """Hash of the machine's shape: 16 hexadecimal digits. Raises SpecError if no template can serve it."""
    args = qemu_args(machine_of(spec, Path(RAM), share=True), WIRING)
    return hashlib.sha256(json.dumps(args).encode()).hexdigest()[:16]


def identity_of(spec: VmSpec) -> dict[str, str]:
    """What the shape does not tell and must be the same: files by path, size and time, the processor, KVM's kernel.

    Raises SpecError if a file is missing.
    """
    program = shutil.which(spec.qemu)
    if program is None:
        raise SpecError(f"there is no {spec.qemu}", hint="apt install qemu-system-x86")
    identity = {"format": str(FORMAT), "QEMU": _file_identity(Path(program).resolve()), "processor": _processor()}
    if spec.accel == "kvm":
        identity["host kernel"] = " ".join((os.uname().release, os.uname().version))
    for what, path in (("kernel", spec.kernel), ("initramfs", spec.initrd), ("root file system", spec.rootfs)):
        if path is not None:
            identity[what] = _file_identity(path)
    return identity


def _file_identity(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise SpecError(f"there is no {path}: {error.strerror}") from error
    return f"{path}, {status.st_size} bytes, {status.st_mtime_ns}"


def _processor() -> str:
    # TCG's guests see the host's TSC, KVM's its CPU: the state of one machine is no good on another.
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def misfit(manifest: dict[str, Any], identity: dict[str, str], ram: os.stat_result, state: bytes) -> str:
    """Why a template cannot be used, in one line; empty if it can. Pure.

    The RAM is too large to be read each time: its size and time tell whether anybody wrote to it.
    """
    recorded: dict[str, str] = manifest["identity"]
    for what in sorted({*recorded, *identity}):
        if recorded.get(what) != identity.get(what):
            return f"{what} changed ({recorded.get(what, 'none')}; now {identity.get(what, 'none')})"
    if len(state) != manifest["state"]["bytes"]:
        return f"{STATE} has {len(state)} bytes, it was written with {manifest['state']['bytes']}"
    if hashlib.sha256(state).hexdigest() != manifest["state"]["sha256"]:
        return f"{STATE} is damaged: its checksum is another"
    if ram.st_size != manifest["ram"]["bytes"]:
        return f"{RAM} has {ram.st_size} bytes, it was written with {manifest['ram']['bytes']}"
    if ram.st_mtime_ns != manifest["ram"]["mtime_ns"]:
        return f"{RAM} was written to after the template was built"
    return ""


class Template:
    """A template that fits, opened: its files stay usable though it be rebuilt or pruned meanwhile. Close it.

    Attributes:
        machine: what QEMU must be started with, RAM mapped copy-on-write from a descriptor that it must inherit.
        manifest: template.json.
        directory: where it lies.
    """

    def __init__(self, directory: Path, spec: VmSpec, manifest: dict[str, Any], ram: int, state: int) -> None:
        self.directory = directory
        self.manifest = manifest
        self.fds = (ram, state)
        self._spec = spec
        self.machine = machine_of(spec, Path(f"/proc/self/fd/{ram}"), share=False)

    @classmethod
    def load(cls, directory: Path, spec: VmSpec) -> Self:
        """Open and verify. Raises TemplateError with the reason it cannot be used, SpecError if `spec` is at fault."""
        with contextlib.ExitStack() as stack:
            fds = []
            try:
                manifest = json.loads((directory / MANIFEST).read_text())
                for name, flags in ((RAM, os.O_RDWR), (STATE, os.O_RDONLY)):
                    fds.append(os.open(directory / name, flags | os.O_CLOEXEC))
                    stack.callback(os.close, fds[-1])
                template = cls(directory, spec, manifest, *fds)
                if reason := template.misfit():
                    raise TemplateError(reason)
            except FileNotFoundError as error:
                raise TemplateError(f"{Path(error.filename).name} is missing") from error
            except OSError as error:
                raise TemplateError(f"{error.filename}: {error.strerror}") from error
            except (ValueError, KeyError, TypeError) as error:
                raise TemplateError(f"{MANIFEST} is damaged ({error})") from error
            stack.pop_all()
        return template

    def misfit(self) -> str:
        """Why it can no longer be used, in one line; empty if it can. Milliseconds: asked before each clone."""
        ram, state = self.fds
        status = os.fstat(state)
        return misfit(self.manifest, identity_of(self._spec), os.fstat(ram), os.pread(state, status.st_size, 0))

    def verify(self) -> None:
        """Raise TemplateError if it can no longer be used."""
        if reason := self.misfit():
            raise TemplateError(f"template {self.directory.name} does not fit any more: {reason}",
                                hint="it is built again when it is next asked for")  # fmt: skip

    def open_state(self) -> int:
        """A new descriptor of the state file at its start, for one clone; the caller closes it."""
        return os.open(f"/proc/self/fd/{self.fds[1]}", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of the files. Clones that run have their own. Again: nothing."""
        for fd in self.fds:
            os.close(fd)
        self.fds = ()  # type: ignore[assignment]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Stored:
    """A template as it lies in the cache: `problem` is why its files are no good, empty if they look well."""

    key: str
    directory: Path
    manifest: dict[str, Any]
    used: float
    bytes: int
    problem: str


@dataclass(frozen=True)
class Store:
    """The directory with all templates; by default `templates` in the image cache."""

    root: Path = dataclasses.field(default_factory=lambda: default_directory() / "templates")

    def directory(self, key: str) -> Path:
        """Where the template with this key is, or will be."""
        return self.root / key

    def temporary(self, key: str) -> Path:
        """Where it is built."""
        return self.root / "tmp" / key

    @contextlib.contextmanager
    def locked(self, key: str, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
        """Hold one template, shared for reading. Yields False if it is held elsewhere and `wait` is False."""
        try:
            (self.root / "tmp").mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.root / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TemplateError(f"the cache directory {self.root} cannot be used: {error.strerror} ({error.filename})",
                                hint="set IDC_TESTBED_CACHE to one that can") from error  # fmt: skip
        try:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(fd)

    def stored(self) -> list[Stored]:
        """All templates, the one used last first."""
        found = [self._stored(path) for path in self.root.glob("*/") if path.name != "tmp"]
        return sorted(found, key=lambda stored: -stored.used)

    def _stored(self, directory: Path) -> Stored:
        used, size, problem = 0.0, 0, ""
        manifest: dict[str, Any] = {}
        try:
            size = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
            used = (directory / MANIFEST).stat().st_mtime
            manifest = json.loads((directory / MANIFEST).read_text())
            state = (directory / STATE).read_bytes()
            problem = misfit(manifest, manifest["identity"], (directory / RAM).stat(), state)
        except FileNotFoundError as error:
            problem = f"{Path(error.filename).name} is missing"
        except (ValueError, KeyError, TypeError) as error:
            problem = f"{MANIFEST} is damaged ({error})"
        return Stored(directory.name, directory, manifest, used, size, problem)

    def remove(self, key: str) -> None:
        """Remove a template; the caller holds its lock. Clones that run keep what they have open."""
        doomed = self.temporary(f"{key}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.directory(key).rename(doomed)
            shutil.rmtree(doomed)

    def prune(self, *, keep: int) -> list[Stored]:
        """Remove all but the `keep` used last, and those being built or opened right now. Returns what was removed."""
        removed = []
        for stored in self.stored()[keep:]:
            with self.locked(stored.key, wait=False) as held:
                if held:
                    self.remove(stored.key)
                    removed.append(stored)
        return removed
