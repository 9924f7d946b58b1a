"""Calls over the management link and what comes of them: results, faults, processes that run in the guest.

Depends on `idc.framing`; made by `testbed.agent.AgentClient`, which owns the link.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from idc import framing
from idc.framing import MAX_PAYLOAD, WINDOW

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from idc.framing import Frame
    from testbed.agent import AgentClient
    from testbed.errors import TestbedError


@dataclass(frozen=True)
class AgentInfo:
    """What the agent says in READY. `uptime` is the guest's, in seconds since its kernel started."""

    protocol: int
    boot_id: str
    uptime: float
    kernel: str
    python: str
    host: str
    pid: int


@dataclass(frozen=True)
class Result:
    """How a command ended: `exit_code` as in subprocess (minus the signal's number if a signal ended it)."""

    exit_code: int
    stdout: bytes
    stderr: bytes

    @property
    def out(self) -> str:
        """Standard output as text; bytes that are no UTF-8 are replaced."""
        return self.stdout.decode("utf-8", "replace")

    @property
    def err(self) -> str:
        """Standard error as text, likewise."""
        return self.stderr.decode("utf-8", "replace")


class AgentFault(Exception):
    """The agent refused a call. `errno` is the guest's."""

    def __init__(self, errno: int, text: str) -> None:
        super().__init__(text)
        self.errno = errno


class HostFault(Exception):
    """Something on the host's side of a transfer failed; `__cause__` is the OSError."""


class Call:
    """One channel: what has arrived and not been looked at, the credit to send, how it ended."""

    def __init__(self, client: AgentClient, channel: int) -> None:
        self.client = client
        self.channel = channel
        self.session = client.session
        self.frames: deque[tuple[int, bytes]] = deque()
        self.credit = WINDOW
        self.failure: Callable[[], TestbedError] | None = None
        self.over = False

    def arrived(self, frame: Frame) -> None:
        """In the link's thread, with the lock held."""
        if frame.kind == framing.CREDIT:
            self.credit += int(frame.json()["bytes"])
        else:
            self.frames.append((frame.kind, bytes(frame.payload)))

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Queue a frame."""
        self.client.post(framing.encode(self.session, self.channel, kind, payload))

    def send_json(self, kind: int, **fields: object) -> None:
        """Queue a frame whose payload is a JSON object."""
        self.client.post(framing.encode_json(self.session, self.channel, kind, **fields))

    def send_data(self, data: memoryview, deadline: float | None) -> None:
        """Send within the stream's credit, waiting for more as need be, but not past an ERROR that came meanwhile."""
        while data:
            self.client.wait(self, lambda: self.credit > 0 or bool(self.frames), deadline)
            if self.frames:
                return
            piece = data[: min(self.credit, MAX_PAYLOAD)]
            self.credit -= len(piece)
            self.send(framing.DATA, bytes(piece))
            data = data[len(piece) :]

    def take(self, deadline: float | None) -> tuple[int, bytes]:
        """The next frame. Raises AgentFault for ERROR, what the VM says if it ended, TimeoutError."""
        self.client.wait(self, lambda: bool(self.frames), deadline)
        kind, payload = self.frames.popleft()
        if kind == framing.ERROR:
            fault = json.loads(payload)
            raise AgentFault(fault["errno"], fault["text"])
        return kind, payload


class Process:
    """A command that runs in the guest. Outputs are kept until they are read; made by `AgentClient.spawn`."""

    def __init__(self, client: AgentClient, call: Call, argv: Sequence[str], limit: int | None) -> None:
        self.argv = tuple(argv)
        self.pid = 0
        self._client = client
        self._call = call
        self._limit = limit
        self._stdout = bytearray()
        self._stderr = bytearray()
        self._owed = 0
        self._exit_code: int | None = None
        self._lock = threading.RLock()

    def _absorb(self) -> None:
        """Deal with the frames that are there."""
        with self._lock:
            found = bool(self._call.frames)
            while self._call.frames:
                kind, payload = self._call.take(None)
                if kind == framing.STARTED:
                    self.pid = json.loads(payload)["pid"]
                elif kind == framing.EXIT:
                    self._exit_code = json.loads(payload)["code"]
                    self._client.close_call(self._call)
                elif kind == framing.STDOUT:
                    self._stdout += payload
                    self._owed += len(payload)
                elif kind == framing.STDERR:
                    self._stderr += payload
                    self._owed += len(payload)
            self._repay()
        if found:
            self._client.changed()  # one thread may write while another reads, and what it waits for is here now

    def _repay(self) -> None:
        held = len(self._stdout) + len(self._stderr)
        if self._exit_code is None and self._owed >= WINDOW // 4 and (self._limit is None or held < self._limit):
            self._call.send_json(framing.CREDIT, bytes=self._owed)
            self._owed = 0

    def _wait(self, condition: Callable[[], bool], timeout: float | None) -> None:
        """Absorb until `condition`. Raises TimeoutError, and what the VM says if it ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._absorb()
            if condition():
                return
            self._client.wait(self._call, lambda: bool(self._call.frames) or condition(), deadline)

    def poll(self) -> int | None:
        """The exit code, or None while it runs. Raises what the VM says if it ended."""
        self._absorb()
        if self._exit_code is None:
            self._client.check(self._call)
        return self._exit_code

    def wait(self, timeout: float | None = None) -> Result:
        """Wait for the end; all output not read before comes with it. Raises TimeoutError, leaving it running."""
        self._limit = None  # who waits for the end wants all of the output
        self._wait(lambda: self._exit_code is not None, timeout)
        assert self._exit_code is not None
        with self._lock:
            result = Result(self._exit_code, bytes(self._stdout), bytes(self._stderr))
            self._stdout.clear()
            self._stderr.clear()
        return result

    def read(self, timeout: float | None = None) -> tuple[bytes, bytes]:
        """Wait for output, and take what is there of both. Both empty: the command has ended, and all was read.

        Raises TimeoutError.
        """
        self._wait(lambda: bool(self._stdout or self._stderr) or self._exit_code is not None, timeout)
        with self._lock:
            pieces = bytes(self._stdout), bytes(self._stderr)
            self._stdout.clear()
            self._stderr.clear()
            self._repay()
        return pieces

    def output_so_far(self) -> tuple[bytes, bytes]:
        """Standard output and error that are here and not read yet; they stay unread."""
        self._absorb()
        return bytes(self._stdout), bytes(self._stderr)

    def lines(self, timeout: float | None = None) -> Iterator[str]:
        """Lines of standard output as they come, without their ends, until the output ends.

        `timeout` is the longest wait for one line in seconds. Raises TimeoutError.
        """
        while True:
            self._wait(lambda: b"\n" in self._stdout or self._exit_code is not None, timeout)
            with self._lock:
                line, found, rest = bytes(self._stdout).partition(b"\n")
                if not found and not line:
                    return
                self._stdout[:] = rest
                self._repay()
            yield line.decode("utf-8", "replace")

    def write(self, data: bytes, timeout: float | None = None) -> None:
        """Write to standard input (the command was spawned with `stdin=True`), at the pace the command reads it."""
        deadline = None if timeout is None else time.monotonic() + timeout
        view = memoryview(data)
        while view:
            # Its own loop beside send_data(): output arrives meanwhile, and is no reason to stop.
            self._client.wait(self._call, lambda: self._call.credit > 0 or bool(self._call.frames), deadline)
            self._absorb()
            if self._exit_code is not None:
                return  # as into a pipe that nobody reads any more, but without the signal
            piece = view[: min(self._call.credit, MAX_PAYLOAD)]
            self._call.credit -= len(piece)
            if piece:
                self._call.send(framing.DATA, bytes(piece))
            view = view[len(piece) :]

    def close_stdin(self) -> None:
        """End of file on the command's standard input."""
        if self._exit_code is None:
            self._call.send_json(framing.END, size=0)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signal the whole process group. Nothing happens if it has ended."""
        if self._exit_code is None:
            self._call.send_json(framing.KILL, signal=int(number))


def argv_of(command: str | Sequence[str]) -> list[str]:
    """The words of a command; a string is one for the guest's shell."""
    return ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
