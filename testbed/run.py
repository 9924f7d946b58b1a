"""A run: one directory, one id, and everything that was started under them, ended together.

Depends on `testbed.keeper`, `testbed.pages` and `testbed.errors`. A run's directory holds the sockets and logs of
its VMs. Every process of the run has the id in its environment (IDC_TESTBED_RUN), and that is how all of them are
found again, whoever is left to look: `Run.close`, the keeper process if the owner died, or the next `Run` of
this user if the keeper died too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, Self

from testbed import keeper
from testbed.errors import RunError
from testbed.pages import small_pages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

Keep = Literal["failed", "always", "never"]
"""When the directory with the logs stays: after a failure, always, or never."""

SOCKET_PATH_MAX = 107
"""Longest path of a Unix socket in bytes (sun_path holds 108 with the final zero)."""
_KEPT_RUNS = 20
_KEEPER_EXIT_SECONDS = 15.0
_starting = threading.Lock()  # else a process could start with what is set for another one


def default_base() -> Path:
    """Where runs live: $XDG_RUNTIME_DIR/idc-testbed, else /tmp/idc-testbed-UID. Short, for the sockets' sake."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and os.access(runtime, os.W_OK):
        return Path(runtime, "idc-testbed")
    return Path(f"/tmp/idc-testbed-{os.getuid()}")


class Run:
    """One run. Use it as a context manager: an exception makes it a failed one, Ctrl-C does not.

    `directory` has mode 0700. `keep` says whether it stays after the end; sockets never do. Several runs,
    also of several processes, live side by side. Raises RunError if the directory cannot be made safely.
    """

    def __init__(self, *, keep: Keep = "failed", base: Path | None = None) -> None:
        self.keep = keep
        self.id = secrets.token_hex(4)
        self.base = base or default_base()
        self.kept = False
        self._closed = False
        self._children: list[subprocess.Popen[bytes]] = []
        self._make_base()
        with locked(self.base):
            _sweep(self.base)
            self.directory = self.base / self.id
            self.directory.mkdir(mode=0o700)
            lock = os.open(self.directory / keeper.LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The lock is held by whoever has this open file: from now on the keeper, and it alone, so that the
        # lock falls with it.
        try:
            self._keeper = self._start_keeper(lock)
        finally:
            os.close(lock)

    def _make_base(self) -> None:
        try:
            self.base.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.base.lstat()
        except OSError as error:
            raise RunError(f"cannot make the directory {self.base}: {error.strerror}") from error
        # /tmp is everybody's: somebody else may have made the directory, or a link, before us.
        if self.base.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise RunError(
                f"{self.base} is not a directory of this user's alone", hint="remove it, or set XDG_RUNTIME_DIR"
            )

    def _start_keeper(self, lock: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            # -I -S: no site packages, nothing from the environment; the keeper is one file of the standard
            # library's.
            [sys.executable, "-I", "-S", keeper.__file__, self.id, str(self.directory), self.keep, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(lock,),
            cwd="/",
            # A session of its own: Ctrl-C goes to the terminal's foreground group, and the keeper must
            # outlive that.
            start_new_session=True,
        )

    @property
    def env(self) -> dict[str, str]:
        """Environment for any process of this run."""
        return {**os.environ, keeper.ENV_NAME: self.id}

    def path(self, name: str) -> Path:
        """A path in the run's directory, checked to be short enough for a socket. Raises RunError if it is not."""
        path = self.directory / name
        if len(os.fsencode(path)) > SOCKET_PATH_MAX:
            raise RunError(
                f"{path} is too long for a socket ({SOCKET_PATH_MAX} bytes)",
                hint="set XDG_RUNTIME_DIR to a shorter one",
            )
        return path

    def popen(
        self,
        argv: Sequence[str],
        *,
        stdin: IO[bytes] | int = subprocess.DEVNULL,
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
        huge_pages: bool = True,
    ) -> subprocess.Popen[bytes]:
        """Start a process of this run: marked with the id, away from the terminal's Ctrl-C, by default with no
        standard input.

        `huge_pages` false keeps the kernel from giving it transparent huge pages.
        """
        if self._closed:
            raise RunError(f"run {self.id} is closed; {argv[0]} was not started")
        with _starting, contextlib.nullcontext() if huge_pages else small_pages():
            process = subprocess.Popen(
                list(argv),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=tuple(pass_fds),
                env=self.env,
                cwd=cwd,
                start_new_session=True,
            )
        self._children.append(process)
        return process

    def processes(self) -> list[int]:
        """Ids of the processes that carry this run's mark now."""
        return keeper.find(self.id)

    def close(self, *, failed: bool = False) -> None:
        """End every process of the run, then remove the directory unless it is to be kept. Again: nothing.

        Raises RunError if a process could not be ended.
        """
        if self._closed:
            return
        self._closed = True
        wanted = self.keep == "always" or (self.keep == "failed" and failed)
        self.kept = wanted and any(self.directory.glob("*.log"))  # a run that started nothing has nothing to read
        survivors = keeper.end_all(self.id)
        for child in self._children:
            child.poll()  # no zombie stays behind
        assert self._keeper.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a keeper that was killed has nothing to be told
            self._keeper.stdin.write(keeper.KEEP_WORD if self.kept else keeper.REMOVE_WORD)
            self._keeper.stdin.close()
        try:
            code = self._keeper.wait(_KEEPER_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()
            code = self._keeper.wait()
        if code != 0:
            keeper.clear_directory(str(self.directory), keep=self.kept)
        if survivors:
            raise RunError(f"run {self.id}: processes {survivors} could not be ended", hint="see `ps -o stat,wchan`")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None and issubclass(kind, Exception))


@contextlib.contextmanager
def locked(base: Path) -> Iterator[None]:
    """Only one process at a time makes or sweeps runs, so that a sweep never sees a directory without its lock."""
    fd = os.open(base / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def keeper_lives(directory: Path) -> bool:
    """Whether somebody still looks after that run: its keeper holds the lock as long as it lives."""
    try:
        fd = os.open(directory / keeper.LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # it was killed while it removed the directory
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _sweep(base: Path) -> None:
    """Clear away runs whose keeper is gone, and all but the newest kept ones."""
    kept: list[tuple[float, Path]] = []
    for directory in base.iterdir():
        if directory.name.startswith(".") or not directory.is_dir():
            continue
        if (directory / keeper.KEPT_NAME).exists():
            kept.append((directory.stat().st_mtime, directory))
            continue
        if keeper_lives(directory):
            continue
        keeper.end_all(directory.name)
        keeper.clear_directory(str(directory), keep=False)
    for _, directory in sorted(kept)[:-_KEPT_RUNS]:
        keeper.clear_directory(str(directory), keep=False)
