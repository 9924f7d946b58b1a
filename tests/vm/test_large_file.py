"""A file larger than any guest's memory: sent from a disk, landing on a disk. Minutes, so not part of every run."""

import hashlib
import os
from pathlib import Path

import pytest

from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU
from testbed.ship import Job, run

SIZE = 5 << 30
STEP = 64 << 20


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tcp", [False, True], ids=["region", "tcp"])
def test_five_gigabytes(tmp_path: Path, tcp: bool) -> None:
    digest, file = hashlib.sha256(), tmp_path / "large.bin"
    with file.open("wb") as out:
        for _ in range(SIZE // STEP):
            block = os.urandom(4096) * (STEP // 4096)
            digest.update(block)
            out.write(block)
        out.write(b"odd")  # not whole sectors: a disk is, a file need not be
        digest.update(b"odd")
    done = run(Job(file, "front", "back", tcp=tcp), Steps(quiet=True), qemu=DEFAULT_QEMU)
    assert (done.size, done.sha256) == (SIZE + 3, digest.hexdigest())
