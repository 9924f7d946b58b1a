"""Runs in a VM: python3 block_fsx.py FILE SECONDS SEED. Random reads, writes, truncates and holes of a file, checked.

Everything is compared with a copy in memory, now and then after the kernel has dropped its own of the file.
"""

import ctypes
import os
import random
import sys
import time

MOST = 2 << 20
LONGEST = 100_000
PUNCH_HOLE, KEEP_SIZE = 2, 1
libc = ctypes.CDLL(None, use_errno=True)


def punch(fd: int, offset: int, length: int) -> None:
    if libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


def main() -> None:
    path, seconds, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    chance, model, count = random.Random(seed), bytearray(), 0
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline or count < 50:
        count += 1
        what = chance.choice(("read", "read", "write", "write", "write", "truncate", "punch", "sync", "drop"))
        offset = chance.randrange(MOST - LONGEST)
        length = chance.randrange(1, LONGEST)
        if what == "read":
            assert os.pread(fd, length, offset) == model[offset:offset + length], (count, offset, length)
        elif what == "write":
            data = chance.randbytes(length)
            assert os.pwrite(fd, data, offset) == length
            model.extend(bytes(max(0, offset + length - len(model))))
            model[offset:offset + length] = data
        elif what == "truncate":
            os.ftruncate(fd, offset)
            model = model[:offset] + bytes(max(0, offset - len(model)))
        elif what == "punch":
            punch(fd, offset, length)
            end = min(offset + length, len(model))
            if end > offset:
                model[offset:end] = bytes(end - offset)
        elif what == "sync":
            os.fsync(fd)
        elif chance.random() < 0.2:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            assert os.pread(fd, MOST, 0) == model, count
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    assert os.pread(fd, MOST, 0) == model
    sys.stdout.write(f"{count}\n")


if __name__ == "__main__":
    main()
