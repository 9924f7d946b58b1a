"""Runs programs: replayable commands in the log, and none outlives the build. May import images.errors."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING

from images.errors import SEARCH_PATH, ImageError, ProgramError, find_program

#: Stands between the builder and a program. When the builder is killed, the kernel tells this shell (setpriv below),
#: and it tells the whole process group: mmdebstrap told alone would first finish what its children are at, a minute's
#: work. It also opens the inputs: dup2 between fork and exec is not safe beside other threads, and this can be pasted.
_GUARD = """\
trap 'trap "" TERM; kill -TERM 0' TERM
"$@" {inputs} &
child=$!
wait $child
status=$?
while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
exit $status
"""

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


class Runner:
    """Runs programs for one build, from several threads; `cancel` ends them all.

    Every program inherits the descriptor `lock`: who outlives us goes on holding the cache until it has ended.
    """

    def __init__(self, lock: int | None = None) -> None:
        self._inherited = () if lock is None else (lock,)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._cancelled = False

    def cancel(self) -> None:
        """End what runs and refuse what would start. Returns when all of it has ended."""
        with self._lock:
            self._cancelled = True
            running = list(self._running)
            for process in running:
                if process.poll() is None:
                    # its own session, so Ctrl-C did not reach it; TERM lets mmdebstrap remove its tree
                    os.killpg(process.pid, signal.SIGTERM)
        for process in running:
            process.wait()

    def run(
        self,
        what: str,
        command: Sequence[str | Path],
        log: Path,
        *,
        stdout: Path | None = None,
        inputs: Mapping[int, Path] | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> str:
        """Run a program to its end and return its standard output, or write that to the file `stdout` (then "").

        Standard error is appended to `log`, after the command itself. `inputs` opens files at descriptor numbers of
        the program (3 to 9), so that one in another user namespace can read what only we may open. `environment` is
        added to ours. The program is ended when this thread or process ends, however that comes about.
        Raises ProgramError, or MissingProgramError.
        """
        words = [find_program(str(command[0])), *map(str, command[1:])]
        opened = [f"{number}<{shlex.quote(str(path))}" for number, path in (inputs or {}).items()]
        settings = [f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()]
        target = [f">{shlex.quote(str(stdout))}"] if stdout else []
        shown = " ".join([*settings, shlex.join(words), *opened, *target])
        guard = _GUARD.format(inputs=" ".join(opened))
        start = [find_program("setpriv"), "--pdeathsig", "TERM", "--", find_program("sh"), "-c", guard, "sh", *words]
        with ExitStack() as stack:
            errors = stack.enter_context(log.open("ab"))
            errors.write(f"+ {shown}\n".encode())
            errors.flush()
            since = errors.tell()
            output = stack.enter_context(stdout.open("wb")) if stdout else subprocess.PIPE
            with self._lock:
                if self._cancelled:
                    raise ImageError(f"{what}: cancelled")
                process = subprocess.Popen(
                    start, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=directory,
                    env={**os.environ, "PATH": SEARCH_PATH, "LC_ALL": "C.UTF-8", **(environment or {})},
                    start_new_session=True, pass_fds=self._inherited)  # fmt: skip
                self._running.add(process)
            try:
                text, _ = process.communicate()
            except BaseException:
                self.cancel()
                raise
            finally:
                with self._lock:
                    self._running.discard(process)
        if process.returncode != 0:
            raise ProgramError(what, shown, _status(process.returncode), log, since)
        return text.decode(errors="replace") if text else ""


def _status(code: int) -> int:
    """Exit code, or minus the signal's number: a shell reports a signal as 128 + n."""
    return 128 - code if code - 128 in set(signal.Signals) else code
