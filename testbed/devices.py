"""Devices between the VMs and host processes of a testbed: plugging, drivers in the guests, classes of third parties.

    devices = Devices(bed)
    seen = devices.attach("echo", "front", "back", {"times": 2})
    devices.detach(seen.name)

What is attached is kept in the registry; nothing of it in here. Depends on testbed.bed and host.devices.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import sys
import tarfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from host import control_region
from host.devices import Controller
from idc.device.classes import GROUP, find
from idc.device.driver import SOCKETS
from idc.registry import VARIABLE, Registry
from idc.transport.address import open_port
from testbed.bed import check_fits, plug, plugged
from testbed.errors import QmpFailed, SpecError, TestbedError

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Mapping, Sequence

    from host.devices import Seen
    from host.region import RegionSpec
    from idc.device.keys import Name
    from testbed.bed import Testbed
    from testbed.calls import Process
    from testbed.vm import Vm

#: Where a VM finds classes that are not in its image, and what its drivers log.
CLASSES: Final = "/run/idc-devices"
LOG: Final = "/run/idc-devices/log"
#: Seconds that a VM has to let go of a region; where a device is detached by force.
_UNPLUG_SECONDS: Final = 30.0
_FORCED_SECONDS: Final = 5.0
#: The host as a domain, with drivers of its own: what its user has of a VM. No VM can have that name.
OWN: Final = "host.user"
#: Packages that are in every image.
_THERE: Final = ("idc", "guest")


class BedPlugger:
    """See `host.devices.plugger.Plugger`. A member that is no VM of the testbed is a host process, which joins by
    itself; a VM that is dead holds nothing.
    """

    def __init__(self, bed: Testbed) -> None:
        self._bed = bed

    def domains(self) -> Sequence[str]:
        """See `Plugger`."""
        prefix = control_region.PREFIX
        return [name.removeprefix(prefix) for name in self._bed.regions if name.startswith(prefix)]

    def plug(self, spec: RegionSpec) -> None:
        """See `Plugger`."""
        vms = self._vms(spec.members)
        for vm in vms:
            check_fits(vm, spec.name, spec.size)
        region = self._bed.region(spec, plug_in=False)
        try:
            for vm in vms:
                plug(vm, region)
        except BaseException:
            with contextlib.suppress(TestbedError):  # the first failure says more
                self.unplug(spec.name)
            raise

    def unplug(self, name: str, *, force: bool = False) -> tuple[str, ...]:
        """See `Plugger`."""
        region = self._bed.regions.get(name)
        if region is None:
            return ()
        kept = []
        for vm in self._vms(member.name for member in region.header.members):
            if vm.alive and plugged(vm, region):
                try:
                    self._bed.unplug(vm, region, timeout=_FORCED_SECONDS if force else _UNPLUG_SECONDS)
                except QmpFailed:
                    if not force:
                        raise
                    kept.append(vm.name)
        self._bed.drop(name)
        return tuple(kept)

    def _vms(self, names: Iterator[str] | Mapping[str, object]) -> list[Vm]:
        return [self._bed.vms[name] for name in names if name in self._bed.vms]


class Devices:
    """All of it for one testbed. Its methods may be called by any thread, one at a time.

    Raises, besides what each says, as `host.devices.Controller`; and SpecError for a testbed without a registry.
    """

    def __init__(self, bed: Testbed) -> None:
        self._bed = bed
        self._lock = threading.RLock()
        self._drivers: dict[str, Process] = {}
        self._shipped: set[tuple[str, str]] = set()
        self._own: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def controller(self) -> Iterator[Controller]:
        """A controller with a link of its own to the registry."""
        with self._lock, Registry(open_port(self._bed.registry_address)) as registry:
            yield Controller(registry, BedPlugger(self._bed))

    def attach(self, kind: str, front: str, back: str, options: Mapping[str, object] | None = None, *,
               texts: Mapping[str, str] | None = None, number: str = "", wait: float | None = 30.0) -> Seen:
        """See `Controller.attach`. Starts the drivers of those ends that are VMs, if they do not run there.

        Where a VM has no free port, the links that no device uses are unplugged first.
        """
        with self.controller() as controller:
            controller.check(kind, front, back, options, texts)
            for domain in (front, back):
                if domain in self._bed.vms:
                    self.prepare(domain, kind)
            try:
                return controller.attach(kind, front, back, options, texts=texts, number=number, wait=wait)
            except SpecError:
                if not controller.drop_spares():
                    raise
            return controller.attach(kind, front, back, options, texts=texts, number=number, wait=wait)

    def detach(self, name: Name, *, wait: float = 30.0, keep_link: bool = False,
               force: bool = False) -> tuple[str, ...]:
        """See `Controller.detach`."""
        with self.controller() as controller:
            return controller.detach(name, wait=wait, keep_link=keep_link, force=force)

    def mend(self) -> list[str]:
        """Start the drivers again in those VMs in which they ended though nobody asked; names of the VMs.

        Not while a device is being attached or detached: that may take long, and whoever mends has more to do.
        """
        if not self._lock.acquire(blocking=False):
            return []
        try:
            ended = [domain for domain, running in self._drivers.items()
                     if running.poll() is not None and domain in self._bed.vms and self._bed.vms[domain].alive]
            for domain in ended:
                self.prepare(domain)
            return ended
        finally:
            self._lock.release()

    def returned(self, domain: str) -> None:
        """A VM was booted again: it has nothing of what it was given, and gets what devices need."""
        with self._lock:
            kinds = sorted(kind for name, kind in self._shipped if name == domain)
            self._shipped -= {(domain, kind) for kind in kinds}
            if self._drivers.pop(domain, None) is not None:
                self.prepare(domain, *kinds)

    def list(self) -> list[Seen]:
        """All that are attached."""
        with self.controller() as controller:
            return controller.devices()

    def console(self, vm: str, *, wait: float = 30.0) -> Path:
        """The socket of a console device between the host and a VM, which is attached unless it is already.

        Raises as `attach`, and SpecError for a name that no VM has.
        """
        if vm not in self._bed.vms:
            raise SpecError(f"there is no VM {vm!r}")
        with self._lock:
            sockets = self.own()
            found = [seen.name for seen in self.list()
                     if (seen.name.kind, seen.name.front, seen.record.back) == ("console", OWN, vm)]
            if found:
                self.prepare(vm, "console")
            else:
                found = [self.attach("console", OWN, vm, wait=wait).name]
            return sockets / f"console-{found[0].number}"

    def own(self) -> Path:
        """Make the host a domain with drivers, unless it is one already; where the sockets of its front ends are."""
        with self._lock:
            if control_region.PREFIX + OWN not in self._bed.regions:
                self._bed.control(OWN)
            sockets = self._bed.run.path("own")
            if self._own is None or self._own.poll() is not None:
                address = self._bed.environment(OWN)[VARIABLE]
                with self._bed.run.path("own.log").open("ab") as log:
                    self._own = self._bed.run.popen(
                        [sys.executable, "-P", "-m", "guest.drivers", "--registry", address, "--sockets", str(sockets)],
                        stdout=log, stderr=log)
            return sockets

    def prepare(self, domain: str, *kinds: str) -> None:
        """Bring device classes into a VM, and start its drivers unless they run. Raises VmError."""
        vm = self._bed.vms[domain]
        with self._lock:
            for kind in kinds:
                if (domain, kind) not in self._shipped:
                    vm.succeed(["mkdir", "-p", CLASSES])
                    result = vm.execute(["tar", "-x", "-C", CLASSES], stdin=pack(kind))
                    if result.exit_code:
                        raise SpecError(f"device class {kind!r} cannot be brought into VM {domain}: {result.err}")
                    modules = find(kind).modules
                    if modules:
                        vm.succeed(["modprobe", "-a", *modules])
                    self._shipped.add((domain, kind))
            running = self._drivers.get(domain)
            if running is None or running.poll() is not None:
                command = f"exec python3 -m guest.drivers --path {CLASSES} --sockets {SOCKETS} >>{LOG} 2>&1"
                self._drivers[domain] = vm.spawn(command)


def shown(seen: Seen) -> dict[str, Any]:
    """A device as plain data: both ends with their steps, the newest first."""
    ends = {role: [{"state": step.state.value, "since": step.since, "why": step.why} for step in steps]
            for role, steps in (("front", seen.front), ("back", seen.back))}
    return {"class": seen.name.kind, "number": seen.name.number, "frontend": seen.name.front,
            "backend": seen.record.back, "region": seen.record.link, "options": dict(seen.record.options), "ends": ends}


def pack(kind: str) -> bytes:
    """A tar file of what a guest needs for a class: its entry point, and its code unless that is in every image.

    Raises SpecError if the code is no file of Python.
    """
    entry = next(entry for entry in importlib.metadata.entry_points(group=GROUP) if entry.name == kind)
    top = entry.module.partition(".")[0]
    metadata = f"idc_device_{kind.replace('-', '_')}-0.dist-info"
    files = {f"{metadata}/entry_points.txt": f"[{GROUP}]\n{kind} = {entry.value}\n".encode(),
             f"{metadata}/METADATA": f"Metadata-Version: 2.1\nName: idc-device-{kind}\nVersion: 0\n".encode()}
    if top not in _THERE:
        spec = importlib.util.find_spec(top)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            raise SpecError(f"device class {kind!r}: {top} is no package or module of Python files")
        origin = Path(spec.origin)
        sources = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        base = origin.parent.parent if origin.name == "__init__.py" else origin.parent
        files |= {str(source.relative_to(base)): source.read_bytes() for source in sources}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()
