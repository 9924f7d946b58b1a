"""The management agent: runs in the guest, answers the host over a virtio-serial port.

    python3 -m guest.agent [DEVICE]

It says READY, runs commands, moves files, powers off; many calls at the same time, in one thread around
epoll. May import `idc.framing` and the standard library; the costly imports wait until READY is out, because
each of them takes tens of milliseconds in an emulated guest. The protocol is in idc/framing.py.

What a session (one host process) started, and did not detach, ends with it: when another HELLO arrives, the
process groups of the one before are killed and its half-made files removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import stat
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from idc import framing
from idc.framing import MAX_PAYLOAD, WINDOW, Frame, FrameReader

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

_PAGE: Final = 4096
# The driver hands out one page for each read, but readv() is a loop over its segments: 64 pages for one
# system call.
_READ_SEGMENTS: Final = 64
# More than this in the queue, and streams wait: what is queued is memory, and delays every other call's
# answer.
_QUEUE_LIMIT: Final = 4 * MAX_PAYLOAD
_SYSRQ: Final = "/proc/sysrq-trigger"


class Call:
    """One channel of one session. Subclasses say what frames mean; the defaults ignore them."""

    def __init__(self, agent: Agent, channel: int) -> None:
        self.agent = agent
        self.channel = channel
        self.credit = WINDOW

    def frame(self, frame: Frame) -> None:
        """The host sent something for this call."""
        if frame.kind == framing.CREDIT:
            self.credit += int(frame.json()["bytes"])
            self.pump()
        elif frame.kind == framing.CANCEL:
            self.cancel()

    def pump(self) -> None:
        """There is room in the queue, or credit: send more."""

    def cancel(self) -> None:
        """End, undoing what is half done. The host expects no answer."""
        self.agent.forget(self)


class Push(Call):
    """A file from the host: written under a temporary name beside its own, renamed when it is complete."""

    def __init__(self, agent: Agent, channel: int, path: str, mode: int, size: int) -> None:
        super().__init__(agent, channel)
        self.path = path
        self.size = size
        self.mode = mode
        self.received = 0
        self.owed = 0
        self.temporary = os.path.join(os.path.dirname(path), f".push.{os.getpid()}-{channel}")
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.fd = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def frame(self, frame: Frame) -> None:
        """File data, or its end."""
        try:
            if frame.kind == framing.DATA:
                self._write(frame.payload)
            elif frame.kind == framing.END:
                self._finish()
            else:
                super().frame(frame)
        except OSError as error:
            self.cancel()
            self.agent.send_error(self.channel, error)

    def _write(self, payload: memoryview) -> None:
        done = 0
        while done < len(payload):
            done += os.write(self.fd, payload[done:])
        self.received += done
        self.owed += done
        if self.owed >= WINDOW // 4:
            self.agent.send_json(self.channel, framing.CREDIT, bytes=self.owed)
            self.owed = 0

    def _finish(self) -> None:
        if self.received != self.size:
            raise OSError(errno.EIO, f"{self.received} bytes arrived of {self.size}", self.path)
        os.fchmod(self.fd, self.mode)
        # close() too can report that the disk is full; it comes before the rename for that reason.
        fd, self.fd = self.fd, -1
        os.close(fd)
        os.rename(self.temporary, self.path)
        self.agent.forget(self)
        self.agent.send_json(self.channel, framing.DONE, size=self.received)

    def cancel(self) -> None:
        """Remove what there is of it."""
        super().cancel()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(FileNotFoundError):  # renamed already
            os.unlink(self.temporary)


class Pull(Call):
    """A file to the host, read as the host has room for it."""

    def __init__(self, agent: Agent, channel: int, path: str) -> None:
        super().__init__(agent, channel)
        # O_NONBLOCK: a FIFO that nobody writes to would hold up this one thread, and all other calls with it.
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self.fd)
        if os.path.isdir(path):
            os.close(self.fd)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self.sent = 0
        agent.send_json(channel, framing.META, size=status.st_size, mode=status.st_mode & 0o7777)

    def pump(self) -> None:
        """Read on, as far as credit and queue allow."""
        while self.fd >= 0 and self.credit > 0 and self.agent.queued < _QUEUE_LIMIT:
            try:
                data = os.read(self.fd, min(MAX_PAYLOAD, self.credit))
            except OSError as error:
                self.cancel()
                self.agent.send_error(self.channel, error)
                return
            if not data:
                self.cancel()
                self.agent.send_json(self.channel, framing.END, size=self.sent)
                return
            self.credit -= len(data)
            self.sent += len(data)
            self.agent.send(self.channel, framing.DATA, data)

    def cancel(self) -> None:
        """Close the file."""
        super().cancel()
        os.close(self.fd)
        self.fd = -1


class Exec(Call):
    """A command in a process group of its own; both outputs streamed, exit code at the end."""

    def __init__(self, agent: Agent, channel: int, request: dict[str, Any]) -> None:
        super().__init__(agent, channel)
        import subprocess

        environment = dict(os.environ)
        environment.update(request.get("env") or {})
        self.outputs: dict[int, int] = {}  # descriptor -> kind of frame
        self.stdin: deque[bytes] = deque()
        self.stdin_open = bool(request.get("stdin"))
        self.stdin_ends = False
        self.exit_code: int | None = None
        self.process: subprocess.Popen[bytes] = subprocess.Popen(
            request["argv"],
            cwd=request.get("cwd") or "/",
            env=environment,
            stdin=subprocess.PIPE if self.stdin_open else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        self.pidfd = os.pidfd_open(self.process.pid)
        agent.watch(self.pidfd, select.EPOLLIN, self._exited)
        for stream, kind in ((self.process.stdout, framing.STDOUT), (self.process.stderr, framing.STDERR)):
            assert stream is not None
            fd = stream.fileno()
            os.set_blocking(fd, False)
            self.outputs[fd] = kind
            agent.watch(fd, select.EPOLLIN, self._readable)
        if self.process.stdin is not None:
            os.set_blocking(self.process.stdin.fileno(), False)
        agent.send_json(channel, framing.STARTED, pid=self.process.pid)

    def frame(self, frame: Frame) -> None:
        """Standard input, a signal, or credit for the outputs."""
        if frame.kind == framing.DATA:
            self.stdin.append(bytes(frame.payload))
            self._feed(0)
        elif frame.kind == framing.END:
            self.stdin_ends = True
            self._feed(0)
        elif frame.kind == framing.KILL:
            self._signal(int(frame.json()["signal"]))
        else:
            super().frame(frame)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # all of the group have ended, which is what was wanted
            os.killpg(self.process.pid, number)

    def _feed(self, _events: int) -> None:
        stream = self.process.stdin
        if stream is None or stream.closed:
            self.stdin.clear()
            return
        fd = stream.fileno()
        given = 0
        try:
            while self.stdin:
                count = os.write(fd, self.stdin[0])
                given += count
                if count == len(self.stdin[0]):
                    self.stdin.popleft()
                else:
                    self.stdin[0] = self.stdin[0][count:]
        except BlockingIOError:
            self.agent.watch(fd, select.EPOLLOUT, self._feed)
        except BrokenPipeError:
            # The command does not want its input: the rest is dropped, as a shell's pipe would.
            given += sum(map(len, self.stdin))
            self.stdin.clear()
            self.stdin_ends = True
        if given:
            self.agent.send_json(self.channel, framing.CREDIT, bytes=given)
        if not self.stdin:
            self.agent.unwatch(fd)
            if self.stdin_ends:
                stream.close()

    def pump(self) -> None:
        """Take the outputs up again."""
        # Streams that ran out of credit, or found the queue full, were taken off epoll.
        if self.credit > 0 and self.agent.queued < _QUEUE_LIMIT:
            for fd in self.outputs:
                self.agent.watch(fd, select.EPOLLIN, self._readable)
            if self.exit_code is not None:
                self._drain()

    def _readable(self, _events: int) -> None:
        for fd in list(self.outputs):
            self._read(fd)

    def _read(self, fd: int) -> bool:
        """Send one piece of this output. True if there may be more of it right now."""
        if self.credit <= 0 or self.agent.queued >= _QUEUE_LIMIT:
            self.agent.unwatch(fd)
            return False
        try:
            data = os.read(fd, min(MAX_PAYLOAD, self.credit))
        except BlockingIOError:
            return False
        if not data:
            del self.outputs[fd]
            self.agent.unwatch(fd)
            return False
        self.credit -= len(data)
        self.agent.send(self.channel, self.outputs[fd], data)
        return True

    def _exited(self, _events: int) -> None:
        self.exit_code = self.process.wait()
        self.agent.unwatch(self.pidfd)
        os.close(self.pidfd)
        self.pidfd = -1
        self._drain()

    def _drain(self) -> None:
        """After the exit: send what the pipes hold, then EXIT.

        Not until end of file: a daemon that the command left behind may hold the pipes for ever. What it
        writes later goes nowhere, and it is given no SIGPIPE: the agent keeps reading until the last writer
        closes.
        """
        for fd in list(self.outputs):
            while self._read(fd):
                pass
            if fd in self.outputs and (self.credit <= 0 or self.agent.queued >= _QUEUE_LIMIT):
                return  # pump() comes back here
        self.agent.send_json(self.channel, framing.EXIT, code=self.exit_code)
        self.agent.forget(self)
        for fd in list(self.outputs):
            self.agent.discard(fd, self.process)
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.agent.unwatch(self.process.stdin.fileno())
            self.process.stdin.close()

    def cancel(self) -> None:
        """Kill the process group and close all pipes."""
        super().cancel()
        self._signal(signal.SIGKILL)
        for fd in list(self.outputs):
            self.agent.unwatch(fd)
        if self.process.stdin is not None and not self.process.stdin.closed:
            self.agent.unwatch(self.process.stdin.fileno())
        if self.pidfd >= 0:
            # SIGKILL is on its way, so this wait is short; without it a zombie stays.
            self.agent.unwatch(self.pidfd)
            os.close(self.pidfd)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


class Agent:
    """The link, the event loop, and the calls that are open. `fd` is the opened port, in non-blocking mode."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.session = 0
        self.calls: dict[int, Call] = {}
        self.queued = 0  # bytes that wait to be written
        self._queue: deque[memoryview] = deque()
        self._reader = FrameReader()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._interest: dict[int, int] = {}
        self._discarded: dict[int, object] = {}
        self.watch(fd, select.EPOLLIN, self._port_event)

    # -- what calls use

    def send(self, channel: int, kind: int, payload: bytes) -> None:
        """Queue a frame. Streams look at `queued` first; answers need not."""
        frame = framing.encode(self.session, channel, kind, payload)
        self._queue.append(memoryview(frame))
        self.queued += len(frame)

    def send_json(self, channel: int, kind: int, **fields: object) -> None:
        """Queue a frame with a JSON object."""
        frame = framing.encode_json(self.session, channel, kind, **fields)
        self._queue.append(memoryview(frame))
        self.queued += len(frame)

    def send_error(self, channel: int, error: OSError) -> None:
        """Queue ERROR for a call that failed."""
        text = error.strerror or str(error)
        if error.filename is not None:
            text = f"{text}: {error.filename}"
        self.send_json(channel, framing.ERROR, errno=error.errno or 0, text=text)

    def forget(self, call: Call) -> None:
        """The call is over."""
        self.calls.pop(call.channel, None)

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call `handler` when one of `events` holds for `fd`."""
        if fd not in self._interest:
            self._epoll.register(fd, events)
        elif self._interest[fd] != events:
            self._epoll.modify(fd, events)
        self._interest[fd] = events
        self._handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """The opposite of `watch`; nothing happens if it was not watched."""
        if fd in self._interest:
            self._epoll.unregister(fd)
            del self._interest[fd], self._handlers[fd]

    def discard(self, fd: int, keep: object) -> None:
        """Read `fd` into nowhere until its end, and keep its owner `keep` from being collected till then."""

        def swallow(_events: int) -> None:
            try:
                if os.read(fd, MAX_PAYLOAD):
                    return
            except BlockingIOError:
                return
            self.unwatch(fd)
            del self._discarded[fd]

        self._discarded[fd] = keep
        self.watch(fd, select.EPOLLIN, swallow)

    # -- the loop

    def announce(self) -> None:
        """Say READY: to nobody in particular at the start, to the host when it said HELLO."""
        system = os.uname()
        self.send_json(
            0,
            framing.READY,
            protocol=framing.PROTOCOL,
            boot_id=_read_line("/proc/sys/kernel/random/boot_id"),
            uptime=float(_read_line("/proc/uptime").split()[0]),
            kernel=system.release,
            python=sys.version.split()[0],
            host=system.nodename,
            pid=os.getpid(),
        )

    def run(self) -> None:
        """Serve for ever. Raises OSError if the port itself fails."""
        self.announce()
        self._flush()
        while True:
            for fd, events in self._epoll.poll():
                handler = self._handlers.get(fd)  # an earlier handler of this round may have unwatched it
                if handler is not None:
                    handler(events)
            self._flush()

    def _port_event(self, events: int) -> None:
        if events & select.EPOLLIN:
            self._receive()
        elif events & select.EPOLLHUP:
            # No host is connected. Nothing announces its return but SIGIO, which would cost more than this
            # look.
            time.sleep(0.1)
        # EPOLLOUT needs nothing here: run() flushes after each round.

    def _receive(self) -> None:
        space = self._reader.space()
        segments = min(_READ_SEGMENTS, len(space) // _PAGE)
        try:
            count = os.readv(self.fd, [space[i * _PAGE : (i + 1) * _PAGE] for i in range(segments)])
        except BlockingIOError:
            return
        self._reader.filled(count)
        for frame in self._reader.frames():
            self._dispatch(frame)

    def _dispatch(self, frame: Frame) -> None:
        if frame.kind == framing.HELLO:
            if frame.session != self.session:
                self._end_session()
                self.session = frame.session
            self.announce()
        elif frame.session != self.session or self.session == 0:
            return  # from a session that is over
        elif frame.channel in self.calls:
            self.calls[frame.channel].frame(frame)
        else:
            self._open(frame)

    def _open(self, frame: Frame) -> None:
        channel = frame.channel
        try:
            if frame.kind == framing.PING:
                self.send(channel, framing.PONG, b"")
            elif frame.kind == framing.EXEC:
                self._start(channel, frame.json())
            elif frame.kind == framing.PUSH:
                request = frame.json()
                self.calls[channel] = Push(self, channel, request["path"], request["mode"], request["size"])
            elif frame.kind == framing.PULL:
                self.calls[channel] = Pull(self, channel, frame.json()["path"])
                self.calls[channel].pump()
            elif frame.kind == framing.POWEROFF:
                self._power_off()
            elif frame.kind == framing.IDENTITY:
                self._become(channel, frame.json())
            # Anything else belongs to a call that has ended here while the frame was under way.
        except OSError as error:
            self.send_error(channel, error)

    def _become(self, channel: int, request: dict[str, Any]) -> None:
        """A clone was woken: see guest/identity.py."""
        self._check_in_vm()
        from guest import identity

        identity.apply(request)
        self.announce()
        self.send_json(channel, framing.DONE)

    def _check_in_vm(self) -> None:
        # Tests run this agent over a socket, on a machine that is not to be changed or switched off.
        if not stat.S_ISCHR(os.fstat(self.fd).st_mode):
            raise OSError(errno.EPERM, "not in a virtual machine: the link is no virtio-serial port")

    def _power_off(self) -> None:
        self._check_in_vm()
        os.sync()
        with open(_SYSRQ, "w") as trigger:
            trigger.write("o")

    def _start(self, channel: int, request: dict[str, Any]) -> None:
        try:
            self.calls[channel] = Exec(self, channel, request)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in an argument
            # A shell's answer, so that "cannot start" and "failed" are one path for the caller.
            reason = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
            text = f"cannot start {request['argv'][0]!r}: {reason}\n"
            self.send_json(channel, framing.STARTED, pid=0)
            self.send(channel, framing.STDERR, text.encode())
            self.send_json(channel, framing.EXIT, code=127 if isinstance(error, FileNotFoundError) else 126)

    def _end_session(self) -> None:
        for call in list(self.calls.values()):
            call.cancel()
        # What is queued is for a host that has gone. But a frame that is half written must be finished, or
        # the reader would take the next one for the rest of it; it may be the first of the queue, which is
        # why that one stays.
        if self._queue:
            self._queue = deque([self._queue[0]])
            self.queued = len(self._queue[0])

    def _flush(self) -> None:
        while True:
            while self._queue:
                try:
                    count = os.writev(self.fd, list(self._queue)[:16])
                except BlockingIOError:
                    self.watch(self.fd, select.EPOLLIN | select.EPOLLOUT, self._port_event)
                    return
                self.queued -= count
                while count:
                    head = self._queue[0]
                    if count >= len(head):
                        count -= len(head)
                        self._queue.popleft()
                    else:
                        self._queue[0] = head[count:]
                        count = 0
            for call in list(self.calls.values()):
                call.pump()
            if not self._queue:
                break
        self.watch(self.fd, select.EPOLLIN, self._port_event)


def _read_line(path: str) -> str:
    # Without Python's layers of files: a clone's first answer waits for this.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 100).decode().strip()
    finally:
        os.close(fd)


def find_port(name: str = framing.PORT_NAME) -> str:
    """Device node of the virtio-serial port called `name`. Raises FileNotFoundError with what to try."""
    if os.path.exists(f"/dev/virtio-ports/{name}"):
        return f"/dev/virtio-ports/{name}"
    # Without udev nobody makes the link above.
    ports = "/sys/class/virtio-ports"
    if os.path.isdir(ports):
        for port in os.listdir(ports):
            with open(f"{ports}/{port}/name") as file:
                if file.read().strip() == name:
                    return f"/dev/{port}"
    raise FileNotFoundError(
        errno.ENOENT, "no such virtio-serial port; is virtio_console loaded, and did QEMU get the port?", name
    )


def main() -> None:
    """Open the port and serve. Ends only by an error, which init prints on the console before starting it again."""
    path = sys.argv[1] if len(sys.argv) > 1 else find_port()
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    Agent(fd).run()


if __name__ == "__main__":
    main()
