"""Clears up after a run, however its owner ended: a process of its own, and the functions it shares with the
owner.

    python3 -I -S keeper.py RUN_ID DIRECTORY KEEP OWNER_PID

Standard library only and nothing of this project's, because it runs without site packages, and must work when
all else failed. It waits for the end of its standard input, a pipe from the owner, or for the owner's death,
whichever is first (a forked child of the owner may hold the pipe open for long). Then it ends all processes
with the run's id in their environment and removes the directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import stat
import sys
import time

ENV_NAME = "IDC_TESTBED_RUN"
"""Environment variable that marks a process as one of a run's; its value is the run's id."""
LOCK_NAME = "keeper.lock"
KEPT_NAME = "KEPT"
"""Marks a directory whose run is over and whose logs stay."""
KEEP_WORD = b"keep\n"
REMOVE_WORD = b"remove\n"
_EXEC_LOOKS, _EXEC_PAUSE = 10, 0.001
_TERM_SECONDS = 1.0
_KILL_SECONDS = 10.0


def marked(pid: int, run_id: str) -> bool:
    """Whether the process carries the run's mark. False if it is gone, or another user's."""
    try:
        for _ in range(_EXEC_LOOKS):
            with open(f"/proc/{pid}/environ", "rb") as file:
                environment = file.read()
            if environment:
                return f"{ENV_NAME}={run_id}".encode() in environment.split(b"\0")
            # For an instant within execve(2), and its caller already goes on, a process has no environment. One
            # that never has any costs these few looks; kernel threads and zombies have no program either.
            os.readlink(f"/proc/{pid}/exe")
            time.sleep(_EXEC_PAUSE)
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        pass
    return False


def find(run_id: str) -> list[int]:
    """Processes with the run's mark, this one excepted. Zombies have no environment any more, so they are not found."""
    me = os.getpid()
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if pid != me and marked(pid, run_id)]


def _signal(pid: int, run_id: str, number: int) -> None:
    """Signal the process if it still is the one that was found: its id may have been used again since."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if marked(pid, run_id):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def end_all(run_id: str) -> list[int]:
    """End every process of the run, politely for a second, then by force. Returns those that live on after 10
    s more.

    Looks again until none is found, because a process may fork between the look and the signal.
    """
    began = time.monotonic()
    asked: set[int] = set()
    while pids := find(run_id):
        waited = time.monotonic() - began
        if waited > _TERM_SECONDS + _KILL_SECONDS:
            return pids
        for pid in pids:
            if waited > _TERM_SECONDS:
                _signal(pid, run_id, signal.SIGKILL)
            elif pid not in asked:
                asked.add(pid)
                _signal(pid, run_id, signal.SIGTERM)
        time.sleep(0.02)
    return []


def clear_directory(directory: str, *, keep: bool) -> None:
    """Remove the run's directory; or, with `keep`, only its sockets and the lock, and mark it as kept."""
    if not keep:
        # The owner and the keeper may both be at it; what is gone is gone.
        shutil.rmtree(directory, ignore_errors=True)
        if os.path.exists(directory):
            raise OSError(errno.ENOTEMPTY, "could not be removed", directory)
        return
    for entry in os.scandir(directory):
        mode = entry.stat(follow_symlinks=False).st_mode
        if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode) or entry.name == LOCK_NAME:
            os.unlink(entry.path)
    with open(os.path.join(directory, KEPT_NAME), "w") as file:
        file.write("the run is over; delete this directory when you have read it\n")


def _owner_word(owner: int) -> bytes:
    """Wait for the owner's last word, or its end. Empty if it ended without one."""
    poll = select.poll()
    poll.register(0, select.POLLIN | select.POLLHUP)
    try:
        pidfd = os.pidfd_open(owner)
    except ProcessLookupError:
        pidfd = -1
    else:
        poll.register(pidfd, select.POLLIN)
    word = b""
    while True:
        # An owner that is gone before we look at it leaves only the pipe to wait for; its end is then there
        # already, unless a child holds it, which a second's limit is for.
        ready = poll.poll(1000 if pidfd < 0 else None)
        if any(fd == 0 for fd, _ in ready):
            piece = os.read(0, 100)
            if piece:
                word += piece
                continue
        return word


def main() -> int:
    """The keeper process. Exit code 0 if all processes ended and the directory is as it should be."""
    run_id, directory, policy, owner = sys.argv[1:5]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        # Whoever sends these to everything means the run, and the run ends when its owner does.
        signal.signal(number, signal.SIG_IGN)
    word = _owner_word(int(owner))
    survivors = end_all(run_id)
    # No last word: the owner was killed. Its logs are kept only if they always are.
    clear_directory(directory, keep=word == KEEP_WORD or (not word and policy == "always"))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
