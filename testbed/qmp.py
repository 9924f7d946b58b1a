"""QMP for synchronous callers: the qemu.qmp library on one event-loop thread for the whole process.

Depends on qemu.qmp. Knows nothing of VMs: failures are raised as `QmpError`, which `testbed.vm` turns into
its own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

from qemu.qmp import EventListener, ExecInterruptedError, QMPClient, QMPError
from qemu.qmp.error import ProtocolError
from qemu.qmp.qmp_client import ExecuteError

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

T = TypeVar("T")
Event = dict[str, Any]

_log = logging.getLogger(__name__)
# The library logs each end of a connection as an error with a traceback; we report those ourselves, once.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

_CONNECT_SECONDS = 30.0
_EVENTS_KEPT = 1000


class QmpError(Exception):
    """A command was refused, interrupted, or not answered in time.

    `error_class` is QEMU's (GenericError, DeviceNotFound) if it answered, else empty.
    """

    def __init__(self, message: str, error_class: str = "") -> None:
        super().__init__(message)
        self.error_class = error_class


class EventLoop:
    """The thread with the event loop; made at first use, ends with the process."""

    _instance: EventLoop | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="qmp loop", daemon=True).start()

    @classmethod
    def get(cls) -> EventLoop:
        """The process's one."""
        with cls._lock:
            if cls._instance is None:
                cls._instance = cls()
            return cls._instance

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start `work` on the loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def watch_fd(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop, once, when `fd` becomes readable. It must not block."""

        def ready() -> None:
            self.loop.remove_reader(fd)
            callback()

        self.loop.call_soon_threadsafe(self.loop.add_reader, fd, ready)


class Qmp:
    """One connection, over the connected socket `sock`. `on_event` is called on the loop and must not block."""

    def __init__(self, sock: socket.socket, name: str, on_event: Callable[[Event], None]) -> None:
        self._loop = EventLoop.get()
        self._client = QMPClient(name)
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._on_event = on_event
        self._events: list[Event] = []
        self._changed = threading.Condition()
        self._open: dict[str, tuple[str, float]] = {}
        self._closed = False
        self._over = False
        self.connected_at: float | None = None
        """When the connection stood (time.monotonic)."""
        self._connected = self._loop.submit(self._connect(sock))

    async def _connect(self, sock: socket.socket) -> None:
        await self._client.connect(sock)
        self.connected_at = time.monotonic()
        self._reader = asyncio.ensure_future(self._read_events())

    async def _read_events(self) -> None:
        async for message in self._listener:
            event = dict(message)
            with self._changed:
                self._events.append(event)
                del self._events[:-_EVENTS_KEPT]
                self._changed.notify_all()
            self._on_event(event)

    def execute(self, command: str, arguments: dict[str, object] | None = None, *, timeout: float = 20.0) -> Any:  # noqa: ANN401 - JSON, of any shape
        """Run a command, return its answer. `timeout` in seconds. Raises QmpError.

        A command that ran out of time may still take effect: QEMU does one after the other, and some
        (device_add of an ivshmem device) wait for a third party. The next error then names it.
        """
        return self._run(command, self._client.execute(command, arguments), timeout)

    def send_fd(self, name: str, fd: int, *, timeout: float = 20.0) -> None:
        """Give QEMU a duplicate of `fd` under `name` (getfd). Raises QmpError."""

        async def give() -> object:
            self._client.send_fd_scm(fd)
            return await self._client.execute("getfd", {"fdname": name})

        self._run("getfd", give(), timeout)

    def _run(self, command: str, work: Coroutine[Any, Any, T], timeout: float) -> T:
        deadline = time.monotonic() + timeout
        key = f"{command}-{time.monotonic_ns()}"
        started = False
        try:
            # Not an await of the connection: that would put the command on the loop before it is wanted.
            self._connected.result(min(timeout, _CONNECT_SECONDS))
            future = self._loop.submit(work)
            started = True
            self._open[key] = (command, time.monotonic())
            future.add_done_callback(lambda _: self._open.pop(key, None))
            # Not cancelled when time is up: the answer, when it comes, must find its place in the library.
            return future.result(max(0.0, deadline - time.monotonic()))
        except concurrent.futures.TimeoutError:
            raise QmpError(f"QMP {command}: no answer in {timeout:g} s{self._blockers(key)}") from None
        except ExecuteError as error:
            raise QmpError(f"QMP {command}: {error}", error.error_class) from error
        except (ExecInterruptedError, QMPError, ProtocolError, ConnectionError, EOFError) as error:
            raise QmpError(f"QMP {command}: the connection is gone ({error or type(error).__name__})") from error
        finally:
            if not started:
                work.close()

    def _blockers(self, mine: str) -> str:
        """Names of other commands that QEMU has not answered, with how long it has had them."""
        now = time.monotonic()
        pending = [value for key, value in list(self._open.items()) if key != mine]
        others = ", ".join(f"{name} for {now - since:.1f} s" for name, since in pending)
        return f"; QEMU is still at {others}" if others else ""

    def wait_event(self, wanted: Callable[[Event], bool], *, since: int = 0, timeout: float) -> Event:
        """The first event after mark `since` that `wanted` accepts. Raises QmpError after `timeout` seconds."""
        found: Event | None = None

        def look() -> bool:
            nonlocal found
            found = next((event for event in self._events[since:] if wanted(event)), None)
            return found is not None or self._closed or self._over

        with self._changed:
            self._changed.wait_for(look, timeout)
        if found is None:
            gone = self._closed or self._over
            raise QmpError("QMP: the connection is gone" if gone else f"QMP: no such event in {timeout:g} s")
        return found

    def ended(self) -> None:
        """QEMU is gone: nobody need wait for an event any more."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def mark(self) -> int:
        """A position in the events, to wait for later ones."""
        with self._changed:
            return len(self._events)

    def events(self) -> list[Event]:
        """All events so far, the newest thousand."""
        with self._changed:
            return list(self._events)

    def close(self) -> None:
        """Disconnect. Callers that wait get QmpError."""
        if self._closed:
            return
        self._closed = True
        with self._changed:
            self._changed.notify_all()

        async def disconnect() -> None:
            try:
                if self._connected.done() and self._connected.exception() is None:
                    self._reader.cancel()
                    await self._client.disconnect()
            except (QMPError, EOFError, OSError) as error:
                _log.debug("QMP ended: %s", error)

        try:
            self._loop.submit(disconnect()).result(5.0)
        except concurrent.futures.TimeoutError:
            _log.warning("QMP: the library did not disconnect in 5 s")
