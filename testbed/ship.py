"""`testbed transfer`: two VMs booted for one file, which may be larger than their memory.

A large file is given to the sending VM as a read-only disk and lands on a scratch disk of the receiving one, so its
size is bounded by this machine's disk only. Depends on `testbed.bed` and `testbed.transfer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.bed import MIB, Testbed
from testbed.errors import SpecError
from testbed.qemu_args import Disk, VmSpec
from testbed.transfer import OverRegion, OverTcp, Transferred, transfer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.accel import Wish
    from testbed.progress import Steps
    from testbed.vm import Vm

#: A file up to this size goes into the guests' memory, a larger one onto disks. Bytes.
IN_MEMORY = 128 * MIB
#: Room for the scratch file system's own tables.
SCRATCH_SPARE = 64 * MIB
SCRATCH = "/mnt/scratch"


@dataclass(frozen=True)
class Job:
    """What to send from where to where.

    Attributes:
        file: of this machine.
        source: name of the VM that sends it.
        target: name of the VM that receives it.
        path: where it lands there; by default a directory with room for it.
        save: where on this machine a copy of what was received goes.
        tcp: over TCP instead of shared memory.
    """

    file: Path
    source: str
    target: str
    path: str | None = None
    save: Path | None = None
    tcp: bool = False


def run(job: Job, steps: Steps, *, accel: Wish = "auto", qemu: str) -> Transferred:
    """Boot, send, verify, end everything.

    Raises:
        SpecError: the file cannot be sent, or there is no room for it here.
        TransferFailed: it did not arrive; both ends' reasons.
    """
    if not job.file.is_file():
        raise SpecError(f"{job.file} is not a file")
    if job.source == job.target:
        raise SpecError(f"--from and --to are both {job.source!r}")
    size = job.file.stat().st_size
    on_disk = size > IN_MEMORY
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(_scratch(size)) if on_disk else None
        bed = stack.enter_context(Testbed(accel=accel, qemu=qemu, notify=steps.say))
        steps.say(f"accelerator: {bed.verdict.accel} ({bed.verdict.reason})")
        memory = 256 + (3 * size >> 20 if not on_disk else 0)
        sending, receiving = (bed.spec(name, memory_mib=memory) for name in (job.source, job.target))
        if scratch is not None:
            sending, receiving = _with_disks(job, scratch, sending, receiving)
        with steps.wait(f"booting {job.source} and {job.target}"):
            source, target = bed.boot(sending, receiving, network=job.tcp)
        path = f"/tmp/{job.file.name}"
        if on_disk:
            path = "/dev/vdb"
            target.succeed(f"mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1 -m 0 /dev/vdb && mkdir -p {SCRATCH} "
                           f"&& mount /dev/vdb {SCRATCH}")
        else:
            with steps.bar(f"{job.file.name} into {job.source}", size) as bar:
                source.push(job.file, path, progress=lambda done, _: bar(done))
        landed = job.path or f"{SCRATCH if on_disk else '/tmp'}/{job.file.name}"
        over: OverRegion | OverTcp
        if job.tcp:
            assert bed.network is not None
            over = OverTcp(bed.network.members[1].address)
        else:
            over = OverRegion(bed.link(source, target).name)
        with steps.transfer(f"{job.source} -> {job.target} over {over.path}") as progress:
            done = transfer(source, path, target, landed, over, progress=progress, size=size if on_disk else None)
        if job.save is not None:
            _save(target, landed, job.save, size, steps)
        return dataclasses.replace(done, name=job.file.name)


def _with_disks(job: Job, scratch: Path, sending: VmSpec, receiving: VmSpec) -> tuple[VmSpec, VmSpec]:
    return (dataclasses.replace(sending, disks=(Disk(job.file.resolve(), readonly=True),)),
            dataclasses.replace(receiving, disks=(Disk(scratch),)))


@contextlib.contextmanager
def _scratch(size: int) -> Iterator[Path]:
    """A sparse file without a name, by a path that works while this process lives: nothing to clean up, ever."""
    directory = tempfile.gettempdir()
    needed = size + size // 32 + SCRATCH_SPARE
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise SpecError(f"no room for the received file: {needed >> 20} MiB needed in {directory}, {free >> 20} free",
                        hint="set TMPDIR to a directory with more room")
    with tempfile.TemporaryFile(dir=directory) as file:
        os.truncate(file.fileno(), -(-needed // MIB) * MIB)
        yield Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")


def _save(target: Vm, landed: str, save: Path, size: int, steps: Steps) -> None:
    with steps.bar(f"{landed} to {save}", size) as bar:
        target.pull(landed, save, progress=lambda done, _: bar(done))
