"""What a figure is worth nothing without: machine, kernels, QEMU, versions. Depends on `testbed.bed`."""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.bench.places import guest_mapping, places_for_each

if TYPE_CHECKING:
    from testbed.bed import Testbed

ROOT = Path(__file__).resolve().parents[2]
#: Where a new file of these kinds is a change, though git does not know it yet: a benchmark is one file.
SOURCES = ("guest", "host", "idc", "images", "testbed")
SUFFIXES = (".py", ".c", ".h")
_STAT, _CPUS = Path("/proc/stat"), Path("/sys/devices/system/cpu")


def of_host() -> dict[str, Any]:
    """This machine and this tree."""
    return {"system": platform.platform(), "kernel": platform.release(), "machine": platform.machine(),
            "cpu": cpu_model(), "cpus": len(os.sched_getaffinity(0)), "memory_mib": _memory_mib(),
            "load_before": os.getloadavg()[0], "hypervisor": _hypervisor(),
            "pinning": _pinning(), "siblings": siblings(), "python": platform.python_version(),
            "host_id": _host_id(), **commit()}  # fmt: skip


class Meanwhile:
    """What others did to this machine from now on, until `facts()`."""

    def __init__(self) -> None:
        self._before = _stolen()

    def facts(self) -> dict[str, Any]:
        """`load_after`, the run's own load in it; and `steal`, the share of all processors' time, 0 to 1, that a
        hypervisor below had them do something else (/proc/stat, proc(5))."""
        stolen, total = (after - before for after, before in zip(_stolen(), self._before, strict=True))
        return {"load_after": os.getloadavg()[0], "steal": round(stolen / total, 4) if total > 0 else 0.0}


def _stolen() -> tuple[int, int]:
    """Ticks stolen, and all ticks. Those of guests are in those of users."""
    fields = _STAT.read_text().splitlines()[0].split()[1:9]
    return int(fields[7]), sum(map(int, fields))


def siblings() -> dict[str, str]:
    """The hardware threads that share a core with each end's CPU, itself among them, as the kernel lists them ("0,4").
    Empty where nothing is pinned or the kernel does not tell."""
    found = {}
    for end, cpu in zip(("near", "far"), places_for_each(), strict=True):
        path = _CPUS / f"cpu{cpu}/topology/thread_siblings_list"
        if cpu is not None and path.is_file():
            found[end] = path.read_text().strip()
    return found


def of_testbed(bed: Testbed) -> dict[str, Any]:
    """QEMU, guest, network, mapping."""
    vm = next(iter(bed.vms.values()))
    facts: dict[str, Any] = {"qemu": _qemu_version(vm.spec.qemu), "guest_kernel": vm.info.kernel,
                             "guest_python": vm.info.python, "guest_cpu": vm.spec.cpu_model,
                             "mapping": f"VFIO, BAR 2, {guest_mapping(vm)} in the guest"}  # fmt: skip
    if bed.network is not None:
        member = bed.network.members[0]
        facts |= {"network": bed.network.description, "netdev": re.sub(r"fd=\d+", "fd=N", member.nic.netdev),
                  "vhost": bed.network.vhost, "mtu": member.nic.mtu, "offloads": _offloads(bed)}
    return facts


def commit() -> dict[str, Any]:
    """Commit of this tree, and whether it holds changes, new sources too; "" where it is no clone."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True,
                                 text=True, check=False)
        new = subprocess.run([*git, "ls-files", "--others", "--exclude-standard", "--", *SOURCES], capture_output=True,
                             text=True, check=False)
    except FileNotFoundError:
        return {"commit": "", "dirty": False}
    dirty = bool(changed.stdout.strip()) or any(line.endswith(SUFFIXES) for line in new.stdout.splitlines())
    return {"commit": name.stdout.strip() if name.returncode == 0 else "", "dirty": dirty}


def cpu_model() -> str:
    """Of this machine."""
    found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1) if found else platform.machine()


def _hypervisor() -> bool:
    """Whether this machine is a virtual one itself."""
    return re.search(r"^flags\s*:.*\bhypervisor\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None


def _host_id() -> str:
    """Tells two machines of one kind apart, and names neither; "" where the system has no id of its own.

    As machine-id(5) wants it: the id itself is nobody else's business, so it is hashed with what asks.
    """
    try:
        own = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return hmac.new(own.encode(), b"idc-testbed", hashlib.sha256).hexdigest()[:12] if own else ""


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def _pinning() -> str:
    near, far = places_for_each()
    if near is None:
        return "none"
    cores = siblings()
    shared = ", one core's two threads" if cores and cores["near"] == cores.get("far") else ""
    return f"near end on CPU {near}, far end on CPU {far}{shared}; QEMU's other threads anywhere"


def _qemu_version(qemu: str) -> str:
    return subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _offloads(bed: Testbed) -> str:
    """What the guest's interface came to agree on."""
    vm = next(iter(bed.vms.values()))
    features = vm.succeed("cat /sys/class/net/e*/device/features").strip()
    names = {0: "csum", 1: "guest_csum", 3: "mtu", 7: "guest_tso4", 11: "host_tso4", 15: "mrg_rxbuf"}
    return ", ".join(name for bit, name in names.items() if features[bit : bit + 1] == "1")
