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
from testbed.qemu_args import Disk, VmSpec, check_name
from testbed.transfer import OverRegion, OverTcp, Transferred, file_size, transfer

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


def check(job: Job) -> int:
    """What can be known to be wrong before anything is booted. Returns the file's bytes, raises SpecError."""
    check_name(job.source)
    check_name(job.target)
    if job.source == job.target:
        raise SpecError(f"--from and --to are both {job.source!r}")
    if job.save is not None:
        if job.save.is_dir():
            raise SpecError(f"--save {job.save} is a directory", hint="name the file")
        if not os.access(job.save.parent, os.W_OK | os.X_OK):
            raise SpecError(f"--save {job.save}: {job.save.parent} is no directory that this user may write in")
    return file_size(job.file)


def specs(bed: Testbed, job: Job, size: int, scratch: Path | None) -> tuple[VmSpec, VmSpec]:
    """The sending and the receiving VM. A file above IN_MEMORY is a disk of the one, `scratch` one of the other."""
    on_disk = size > IN_MEMORY
    # A power of two: each other size would need a template of its own.
    memory = 1 << (255 + (0 if on_disk else 3 * size >> 20)).bit_length()
    sending, receiving = (bed.spec(name, memory_mib=memory) for name in (job.source, job.target))
    if not on_disk:
        return sending, receiving
    assert scratch is not None
    return (dataclasses.replace(sending, disks=(Disk(job.file.resolve(), readonly=True),)),
            dataclasses.replace(receiving, disks=(Disk(scratch),)))


def run(job: Job, steps: Steps, *, accel: Wish = "auto", qemu: str) -> Transferred:
    """Boot, send, verify, end everything.

    Raises:
        SpecError: the file cannot be sent, or there is no room for it here.
        TransferFailed: it did not arrive; both ends' reasons.
    """
    size = check(job)
    on_disk = size > IN_MEMORY
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(_scratch(size)) if on_disk else None
        bed = stack.enter_context(Testbed(accel=accel, qemu=qemu, notify=steps.say))
        steps.say(f"accelerator: {bed.verdict.accel} ({bed.verdict.reason})")
        sending, receiving = specs(bed, job, size, scratch)
        with steps.wait(f"booting {job.source} and {job.target}"):
            source, target = bed.boot(sending, receiving, network=job.tcp)
        path = f"/tmp/{job.file.name}"
        if on_disk:
            path = "/dev/vdb"
            target.succeed(f"mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=1 -m 0 /dev/vdb && mkdir -p {SCRATCH} "
                           f"&& mount /dev/vdb {SCRATCH}")
        else:
            with steps.bar(f"{job.file.name} into {job.source}", size) as bar:
                source.copy_to(job.file, path, progress=lambda done, _: bar(done))
        landed = job.path or (SCRATCH if on_disk else "/tmp")
        if target.execute(["test", "-d", landed]).exit_code == 0:
            landed = f"{landed.rstrip('/')}/{job.file.name}"  # a disk does not know its file's name
        over: OverRegion | OverTcp
        if job.tcp:
            assert bed.network is not None
            over = OverTcp(bed.network.members[1].address)
        else:
            over = OverRegion(bed.link(source, target, name="link").name)
        with steps.transfer(f"{job.source} -> {job.target} over {over.path}") as progress:
            done = transfer(source, path, target, landed, over, progress=progress, size=size if on_disk else None)
        if job.save is not None:
            _save(target, landed, job.save, size, steps)
        return dataclasses.replace(done, name=job.file.name)


@contextlib.contextmanager
def _scratch(size: int) -> Iterator[Path]:
    """A sparse file without a name, by a path that works while this process lives: nothing to clean up, ever."""
    try:
        directory = tempfile.gettempdir()
    except OSError as error:  # Python tries several, TMPDIR first
        raise SpecError("no room for the received file: no temporary directory can be written",
                        hint="set TMPDIR to one that can") from error
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
        target.copy_from(landed, save, progress=lambda done, _: bar(done))
