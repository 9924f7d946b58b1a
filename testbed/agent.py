"""The host's end of the management link: calls to the guest's agent, from any thread.

Depends on `idc.framing` and `testbed.errors`. One thread per VM moves frames; callers wait for their own
call. The protocol is in idc/framing.py, the other end in guest/agent.py.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from idc import framing
from idc.framing import MAX_PAYLOAD, WINDOW, Frame, FrameReader
from testbed.calls import AgentFault, AgentInfo, Call, HostFault, Process, Result
from testbed.errors import TestbedError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence
    from io import FileIO
    from pathlib import Path

PING_AFTER = 5.0
"""Seconds of silence during a call after which the agent is asked whether it lives."""
HANG_LIMIT = 30.0
"""Seconds without an answer to that, QEMU running, that mean a hang."""
SPAWN_BUFFER = 16 * 1024 * 1024
"""Bytes of unread output after which a spawned process is held up, as by a full pipe."""


class AgentClient:
    """Calls to one agent. Every method may be called from any thread.

    `lost` makes the exception for callers of a link that ended, from a text; `hung` the one for an agent that
    does not answer. `running` says whether the guest's CPUs run, so that a paused VM is not called hung.
    Methods raise TimeoutError when a limit given in seconds has passed.

    Attributes:
        environment: what every command finds in its environment, unless the call says otherwise.
    """

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        *,
        lost: Callable[[str], TestbedError],
        hung: Callable[[str], TestbedError],
        running: Callable[[], bool],
        on_ready: Callable[[AgentInfo], None],
    ) -> None:
        self.info: AgentInfo | None = None
        self.environment: dict[str, str] = {}
        self.session = 0
        self.hang_limit = HANG_LIMIT
        self._lost = lost
        self._hung = hung
        self._running = running
        self._on_ready = on_ready
        self._sock = sock
        self._sock.setblocking(False)
        self._changed = threading.Condition()
        self._calls: dict[int, Call] = {}
        self._next_channel = 0
        self._out: deque[memoryview] = deque()
        self._reader = FrameReader()
        self._last_heard = time.monotonic()
        self._end: Callable[[], TestbedError] | None = None
        self._poison: Callable[[], TestbedError] | None = None
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(sock, selectors.EVENT_READ)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        self._new_session()
        self._thread = threading.Thread(target=self._serve, name=f"agent {name}", daemon=True)
        self._thread.start()

    # -- the link

    def _new_session(self) -> None:
        """Start afresh: what is open belongs to an agent that is gone. With the lock held, or before the thread."""
        self.session = secrets.randbelow(2**32 - 1) + 1
        self._out.append(memoryview(framing.encode_json(self.session, 0, framing.HELLO, protocol=framing.PROTOCOL)))

    def post(self, frame: bytes) -> None:
        """Queue a frame. What fills the queue is bounded by the streams' credit."""
        with self._changed:
            self._post_locked(frame)

    def _post_locked(self, frame: bytes) -> None:
        if self._end is None:
            self._out.append(memoryview(frame))
            self._wake()

    def _wake(self) -> None:
        """Have the thread look again. With the lock held, because close() takes the descriptor away."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _serve(self) -> None:
        try:
            while self._end is None:
                with self._changed:
                    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
                self._selector.modify(self._sock, events)
                for key, mask in self._selector.select():
                    if key.fd == self._wake_fd:
                        os.eventfd_read(self._wake_fd)
                        continue
                    if mask & selectors.EVENT_WRITE:
                        self._write()
                    if mask & selectors.EVENT_READ and not self._read():
                        self.end(lambda: self._lost("the link to its agent ended"))
        except OSError as error:
            text = f"the link to its agent failed: {error.strerror}"
            self.end(lambda: self._lost(text))
        except (ValueError, TypeError, KeyError) as error:  # else this thread would end, and its callers wait for ever
            text = f"its agent said what makes no sense ({type(error).__name__}: {error})"
            self.end(lambda: self._lost(text))

    def _write(self) -> None:
        with self._changed:
            while self._out:
                try:
                    count = self._sock.send(self._out[0])
                except BlockingIOError:
                    return
                if count == len(self._out[0]):
                    self._out.popleft()
                else:
                    self._out[0] = self._out[0][count:]

    def _read(self) -> bool:
        try:
            count = self._sock.recv_into(self._reader.space())
        except BlockingIOError:
            return True
        if count == 0:
            return False
        self._reader.filled(count)
        ready: AgentInfo | None = None
        with self._changed:
            self._last_heard = time.monotonic()
            for frame in self._reader.frames():
                if frame.kind == framing.READY:
                    ready = self._ready(frame) or ready
                elif frame.session == self.session and frame.channel in self._calls:
                    self._calls[frame.channel].arrived(frame)
            self._changed.notify_all()
        if ready is not None:
            self._on_ready(ready)
        return True

    def _ready(self, frame: Frame) -> AgentInfo | None:
        """An agent announces itself (session 0), or answers our HELLO."""
        info = AgentInfo(**frame.json())
        if info.protocol != framing.PROTOCOL:
            raise ValueError(f"it speaks protocol {info.protocol}, this is {framing.PROTOCOL}; rebuild its image")
        if frame.session == 0:
            if self.info is not None:
                # Not the one that we have been talking to.
                self._restart(f"its agent started again (process {info.pid}, before {self.info.pid})")
            else:
                # The HELLO of this session may have gone to nobody.
                hello = framing.encode_json(self.session, 0, framing.HELLO, protocol=framing.PROTOCOL)
                self._out.append(memoryview(hello))
            return None
        if frame.session != self.session:
            return None
        first = self.info is None
        self.info = info
        return info if first else None

    def _restart(self, text: str) -> None:
        for call in self._calls.values():
            call.failure = lambda: self._lost(text)
        self._calls.clear()
        self.info = None
        self._new_session()

    def port_closed(self) -> None:
        """QEMU says that the guest closed the port (VSERPORT_CHANGE): its agent is gone, perhaps for a moment only."""
        with self._changed:
            if self.info is None:
                return
            self._restart("its agent closed the port")
            self._changed.notify_all()
            self._wake()

    def poison(self, failure: Callable[[], TestbedError] | None) -> None:
        """Fail every call, now and later, with what `failure` makes; None lifts it. The link itself goes on."""
        with self._changed:
            self._poison = failure
            self._changed.notify_all()

    def end(self, failure: Callable[[], TestbedError]) -> None:
        """Nothing more will come: every caller, now and later, gets what `failure` makes. The first reason stays."""
        with self._changed:
            if self._end is None:
                self._end = failure
            self._changed.notify_all()
            self._wake()

    def close(self) -> None:
        """End the link and its thread."""
        self.end(lambda: self._lost("the link to its agent was closed"))
        self._thread.join()
        with self._changed:
            if self._wake_fd >= 0:
                self._selector.close()
                self._sock.close()
                os.close(self._wake_fd)
                self._wake_fd = -1

    # -- calls

    def _failed(self, call: Call | None) -> Callable[[], TestbedError] | None:
        """What makes the exception, if the link, the guest, or the call has failed."""
        if call is not None and call.failure is not None:
            return call.failure
        return self._end or self._poison

    def changed(self) -> None:
        """Have every caller that waits look at its condition again."""
        with self._changed:
            self._changed.notify_all()

    def check(self, call: Call | None = None) -> None:
        """Raise if the link, the guest, or the call has failed."""
        with self._changed:
            failure = self._failed(call)
        if failure is not None:
            raise failure()

    def wait(self, call: Call | None, condition: Callable[[], bool], deadline: float | None) -> None:
        """Wait for `condition`, evaluated with the lock held.

        Raises TimeoutError at the deadline, the VM's own exception when it ended, and the one for a hang when
        the agent has been silent for PING_AFTER seconds and does not answer a ping within `hang_limit` more.
        """
        while True:
            # Exceptions are made without the lock: that takes time, and other locks.
            failure, hung = self._wait_locked(call, condition, deadline)
            if failure is not None:
                raise failure()
            if not hung:
                return
            if self._running():
                raise self._hung(f"its agent has said nothing for {time.monotonic() - self._last_heard:.0f} s")

    def _wait_locked(
        self, call: Call | None, condition: Callable[[], bool], deadline: float | None
    ) -> tuple[Callable[[], Exception] | None, bool]:
        """Returns what went wrong, and whether the agent seems to hang."""
        pinged: float | None = None
        with self._changed:
            while not condition():
                failure = self._failed(call)
                if failure is not None:
                    return failure, False
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return TimeoutError, False
                if pinged is not None and self._last_heard > pinged:
                    pinged = None
                elif pinged is None and self.info is not None and now - self._last_heard > PING_AFTER:
                    self._post_locked(framing.encode(self.session, 0, framing.PING))
                    pinged = now
                elif pinged is not None and now - pinged > self.hang_limit:
                    return None, True
                self._changed.wait(1.0 if deadline is None else min(1.0, deadline - now))
        return None, False

    def _open_call(self, deadline: float | None) -> Call:
        # A frame posted while no agent listens might be dropped with the port's buffers.
        self.wait(None, lambda: self.info is not None, deadline)
        with self._changed:
            self._next_channel += 1
            call = Call(self, self._next_channel)
            self._calls[call.channel] = call
            return call

    def close_call(self, call: Call) -> None:
        """Frames of this call that still come are dropped."""
        with self._changed:
            self._calls.pop(call.channel, None)

    def wait_ready(self, timeout: float | None) -> AgentInfo:
        """Wait for READY. Raises TimeoutError, and what the VM says if it ended."""
        self.wait(None, lambda: self.info is not None, _deadline(timeout))
        assert self.info is not None
        return self.info

    def ping(self, timeout: float | None = 10.0) -> float:
        """Round trip through the agent in seconds. Raises TimeoutError."""
        began = time.monotonic()
        deadline = _deadline(timeout)
        call = self._open_call(deadline)
        try:
            call.send(framing.PING)
            call.take(deadline)
        finally:
            self.close_call(call)
        return time.monotonic() - began

    def spawn(
        self,
        argv: Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        limit: int | None = SPAWN_BUFFER,
        timeout: float | None = None,
    ) -> Process:
        """Start a command in a process group of its own and return at once.

        A command that cannot be started ends with exit code 127 or 126 and a reason on standard error, as in
        a shell. More than `limit` bytes of unread output hold the command up; None keeps everything.
        `timeout` is for an agent that is not there at the moment.
        """
        call = self._open_call(_deadline(timeout))
        call.send_json(framing.EXEC, argv=list(argv), cwd=cwd, env=self.environment | dict(env or {}), stdin=stdin)
        return Process(self, call, argv, limit)

    def cancel(self, process: Process) -> None:
        """Kill the process group and forget the call; whoever still waits for the process gets a TestbedError."""
        process._call.send(framing.CANCEL)
        with self._changed:
            process._call.failure = lambda: TestbedError(f"{process.argv[0]} was cancelled")
            self._changed.notify_all()
        self.close_call(process._call)

    def execute(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Run a command to its end. Raises TimeoutError after `timeout` seconds, having killed its process group."""
        deadline = _deadline(timeout)
        process = self.spawn(argv, cwd=cwd, env=env, stdin=bool(stdin), limit=None, timeout=timeout)
        try:
            if stdin:
                process.write(stdin, timeout)
                process.close_stdin()
            return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except BaseException:
            self.cancel(process)
            raise

    def push(
        self,
        source: Path,
        target: str,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Copy a host's file into the guest, mode included; returns its size in bytes.

        The final name appears when all of it is there. `progress` is called with bytes sent and the size.
        Raises AgentFault (the guest: no such directory, disk full), HostFault, TimeoutError.
        """
        deadline = _deadline(timeout)
        try:
            file = source.open("rb", buffering=0)
        except OSError as error:
            raise HostFault(f"cannot read {source}: {error.strerror}") from error
        call = self._open_call(deadline)
        finished = False
        try:
            with file:
                status = os.fstat(file.fileno())
                call.send_json(framing.PUSH, path=target, mode=status.st_mode & 0o7777, size=status.st_size)
                sent = self._push_data(call, file, status.st_size, deadline, progress)
            call.send_json(framing.END, size=sent)
            call.take(deadline)
            finished = True
            return sent
        except AgentFault:
            finished = True  # the other end has tidied up already
            raise
        finally:
            if not finished:
                call.send(framing.CANCEL)
            self.close_call(call)

    def _push_data(
        self,
        call: Call,
        file: FileIO,
        size: int,
        deadline: float | None,
        progress: Callable[[int, int], None] | None,
    ) -> int:
        sent = 0
        # Not past `size`: a log that grows meanwhile would never end.
        while sent < size and not call.frames:
            try:
                data = file.read(min(MAX_PAYLOAD, size - sent))
            except OSError as error:
                raise HostFault(f"cannot read {file.name}: {error.strerror}") from error
            if not data:
                raise HostFault(f"{file.name} became shorter while it was read: {sent} bytes of {size}")
            call.send_data(memoryview(data), deadline)
            sent += len(data)
            if progress is not None:
                progress(sent, size)
        return sent

    def pull(
        self,
        source: str,
        target: Path,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Copy a guest's file to the host, mode included; returns its size in bytes.

        The final name appears when all of it is there. Raises AgentFault (no such file), HostFault (disk
        full, `target` is a directory or a device), TimeoutError.
        """
        deadline = _deadline(timeout)
        if target.exists() and not target.is_file():  # a device would be replaced by a file
            raise HostFault(f"cannot write {target}: it is there and is no regular file")
        temporary = target.parent / f".pull.{os.getpid()}-{secrets.token_hex(4)}"
        call = self._open_call(deadline)
        finished = False
        try:
            call.send_json(framing.PULL, path=source)
            meta = json.loads(call.take(deadline)[1])
            with temporary.open("xb", buffering=0) as file:
                os.fchmod(file.fileno(), 0o600)
                size = self._pull_data(call, file.fileno(), meta["size"], deadline, progress)
                os.fchmod(file.fileno(), meta["mode"])
            temporary.rename(target)
            finished = True
            return size
        except AgentFault:
            finished = True
            raise
        except TimeoutError:
            raise
        except OSError as error:
            raise HostFault(f"cannot write {target}: {error.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)
            if not finished:
                call.send(framing.CANCEL)
            self.close_call(call)

    def _pull_data(
        self, call: Call, fd: int, size: int, deadline: float | None, progress: Callable[[int, int], None] | None
    ) -> int:
        received = owed = 0
        while True:
            kind, payload = call.take(deadline)
            if kind == framing.END:
                return received
            view = memoryview(payload)
            while view:
                view = view[os.write(fd, view) :]
            received += len(payload)
            owed += len(payload)
            if owed >= WINDOW // 4:
                call.send_json(framing.CREDIT, bytes=owed)
                owed = 0
            if progress is not None:
                progress(received, size)

    def identify(self, *, name: str, entropy: bytes, boot_id: str, machine_id: str,
                 timeout: float | None = None) -> AgentInfo:  # fmt: skip
        """Have a clone's guest become a machine of its own; the fields are those of guest/identity.py.

        The guest's clock is set to this machine's. Returns what the agent says of itself afterwards. Raises AgentFault,
        TimeoutError.
        """
        deadline = _deadline(timeout)
        call = self._open_call(deadline)
        try:
            call.send_json(framing.IDENTITY, name=name, entropy=entropy.hex(), boot_id=boot_id, machine_id=machine_id,
                           time_ns=time.time_ns())  # fmt: skip
            call.take(deadline)
        finally:
            self.close_call(call)
        assert self.info is not None
        return self.info

    def poweroff(self) -> None:
        """Have the guest sync and power off. Nothing answers; QEMU's end does."""
        self.post(framing.encode(self.session, 0, framing.POWEROFF))


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout
