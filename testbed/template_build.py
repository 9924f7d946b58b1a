"""Builds templates, and gives out those that fit: `obtain(spec)`.

A template is booted like any VM but with its RAM in a file, told to be itself once (which loads into its memory all
that a clone needs then), stopped, and its devices' state migrated to a file with the RAM left out. It is built below
`templates/tmp` under a lock and renamed. Depends on `testbed.template`, `testbed.vm` and `testbed.run`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from testbed.clone import identify
from testbed.errors import TemplateError, TestbedError, VmError
from testbed.qemu_args import qemu_args
from testbed.run import Run
from testbed.template import (
    MANIFEST,
    NAME,
    RAM,
    STATE,
    WIRING,
    Store,
    Template,
    identity_of,
    key_of,
    machine_of,
)
from testbed.vm import Vm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from testbed.qemu_args import VmSpec

KEPT = 8
"""Templates that stay when another one is built; each takes about 200 MB of disk."""
MIB = 1 << 20
ROOM = 300 * MIB
"""Room on the cache's disk, in bytes, without which none is built."""
_SETTLE_SECONDS = 10.0
_QUIET = 0.15
_SAVE_SECONDS = 60.0
_WARM = (
    # What a clone is likely to run first, into the memory that all share: measured, the first shell in a clone takes
    # half of the time, the first Python a third.
    ["/bin/sh", "-c", "ip address; sha256sum /etc/hosts"],
    ["python3", "-c", "import guest.transfer, guest.ivshmem, guest.measure"],
    # There are none, unless an image brings some: they would be those of every clone.
    ["/bin/sh", "-c", "rm -f /etc/ssh/ssh_host_*"],
)


def _quiet(_: str) -> None:
    """Tell nobody."""


def obtain(spec: VmSpec, *, store: Store | None = None, notify: Callable[[str], None] = _quiet) -> Template:
    """The template that `spec` is cloned from, built if there is none and rebuilt if it does not fit. Close it.

    `notify` is told of a build, and why. Raises SpecError if no template can serve `spec`, TemplateError if it cannot
    be built.
    """
    store = store or Store()
    key = key_of(spec)
    directory = store.directory(key)
    if (directory / MANIFEST).exists():
        with store.locked(key, shared=True):
            try:
                return _opened(directory, spec)
            except TemplateError:
                pass  # looked at again with the lock held alone, and said then
    with store.locked(key, wait=False) as held:
        if held:
            return _open_or_build(key, spec, store, notify)
    notify(f"template {key} is being built by another process; waiting for it")
    with store.locked(key):
        return _open_or_build(key, spec, store, notify)


def _opened(directory: Path, spec: VmSpec) -> Template:
    template = Template.load(directory, spec)
    # Pruning keeps what was used last.
    os.utime(directory / MANIFEST)
    return template


def _open_or_build(key: str, spec: VmSpec, store: Store, notify: Callable[[str], None]) -> Template:
    """With the lock held: whoever held it before may have built it."""
    directory = store.directory(key)
    if directory.exists():
        try:
            return _opened(directory, spec)
        except TemplateError as error:
            notify(f"template {key} is built again: {error.message}")
            store.remove(key)
    else:
        notify(f"building template {key} ({describe(spec)}): one boot, then every such VM is a clone")
    build(key, spec, store)
    template = _opened(directory, spec)
    store.prune(keep=KEPT)
    return template


def describe(spec: VmSpec) -> str:
    """The machine's shape in a few words."""
    return f"{spec.memory.mib} MiB, {spec.cpus} CPU{'s' if spec.cpus > 1 else ''}, {spec.accel}"


def build(key: str, spec: VmSpec, store: Store) -> None:
    """Boot, stop and save a template, and put it in place. The caller holds its lock. Raises TemplateError."""
    work = store.temporary(key)
    shutil.rmtree(work, ignore_errors=True)  # of a build that was killed
    try:
        work.mkdir(mode=0o700, parents=True)
        # Asked first: QEMU gets SIGBUS, and can say nothing, when its RAM's file finds no room.
        room = shutil.disk_usage(work).free
        if room < ROOM:
            raise OSError(errno.ENOSPC, f"{ROOM // MIB} MiB needed, {room // MIB} MiB free", str(store.root))
        identity = identity_of(spec)  # before the boot: what changes meanwhile makes it unfit
        machine = machine_of(spec, work / RAM, share=True)
        began = time.monotonic()
        with Run() as run, Vm.boot(machine, run) as vm:
            booted = time.monotonic() - began
            for command in _WARM:
                vm.succeed(command)
            identify(vm, NAME)  # last: what the agent still holds of a command, every clone would have to let go
            settle(vm)
            save(vm, work / STATE)
        manifest = _manifest(spec, machine, identity, work)
        manifest["seconds"] = {"boot": round(booted, 2), "all": round(time.monotonic() - began, 2)}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1))
        work.rename(store.directory(key))
    except OSError as error:
        raise TemplateError(f"template {key} could not be built: {error.strerror}: {error.filename}",
                            hint="if the cache's disk is full, `testbed snapshot prune` makes room") from error
    except TestbedError as error:
        log = f" (log: {error.log})" if isinstance(error, VmError) else ""
        raise TemplateError(f"template {key} could not be built: {error.message}{log}", hint=error.hint) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _manifest(spec: VmSpec, machine: VmSpec, identity: dict[str, str], work: Path) -> dict[str, Any]:
    state, ram = (work / STATE).read_bytes(), work / RAM
    # On the disk before it has its name: else a power cut could leave RAM of the right size and time with holes. And
    # pages that are still to be written would count as every clone's own.
    with ram.open("rb") as file:
        os.fsync(file.fileno())
    status = ram.stat()
    return {
        "built": datetime.now(UTC).isoformat(timespec="seconds"), "shape": describe(spec), "identity": identity,
        "state": {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()},
        "ram": {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns},
        "argv": qemu_args(machine, WIRING),
    }  # fmt: skip


def settle(vm: Vm) -> None:
    """Wait until the guest idles, else each clone would do again what was left of the boot. It may never do so."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while time.monotonic() < deadline:
        before = cpu_seconds(vm.pid)
        time.sleep(_QUIET)  # the length of the measurement
        if cpu_seconds(vm.pid) - before < 0.1 * _QUIET:
            return


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used, in seconds, to the nanosecond. Raises OSError: there is none such."""
    return time.clock_gettime(~pid << 3 | 2)  # its clock's id: clock_getcpuclockid(3), CPUCLOCK_SCHED of the kernel


def save(vm: Vm, path: Path) -> None:
    """Stop the VM and write the state of its devices to `path`, without its RAM. It cannot go on after that."""
    vm.pause()
    capabilities = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
    vm.qmp("migrate-set-capabilities", {"capabilities": capabilities})
    with path.open("wb") as file:
        vm.send_fd("state", file.fileno())
        vm.migrate("migrate", "fd:state", _SAVE_SECONDS)
    vm.crash()
