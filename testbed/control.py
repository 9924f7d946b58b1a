"""The other commands' end of a running testbed: start one, find one, ask it things.

May depend on the standard library, `host.wire`, `testbed.registry`, `testbed.topology` and `testbed.errors`; light,
because every short command loads it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from host import wire
from host.errors import HostError
from testbed import registry
from testbed.errors import TestbedError, VmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from testbed.registry import Entry
    from testbed.topology import Topology

    Hear = Callable[[dict[str, Any]], None]

DOWN_SECONDS = 60.0


class Refused(TestbedError):
    """A testbed could not do what it was asked; `kind` is the exception's name there. One line.

    `console` holds the last lines of the VM's console, if the failure was a VM's.
    """

    def __init__(self, message: str, *, kind: str, hint: str = "", console: Sequence[str] = ()) -> None:
        super().__init__(message, hint=hint)
        self.kind = kind
        self.console = tuple(console)

    def __str__(self) -> str:
        return one_line(self)


class SupervisorGone(TestbedError):
    """The testbed's own process ended while it was asked something."""


def one_line(error: Exception) -> str:
    """What, where, and what to try, in one line."""
    if not isinstance(error, TestbedError):
        return str(error)
    text = " ".join(error.message.split())
    if isinstance(error, VmError):
        text = f"VM {error.vm}: {text}" + (f" (log: {error.log})" if error.log else "")
    return text + (f"; try: {' '.join(error.hint.split())}" if error.hint else "")


def _refused(told: dict[str, Any]) -> Refused:
    message = f"internal error: {told['kind']}: {told['message']}" if told.get("internal") else str(told["message"])
    if told.get("vm"):
        message = f"VM {told['vm']}: {message}"
    if told.get("log"):
        message += f" (log: {told['log']})"
    return Refused(message, kind=told["kind"], hint=told.get("hint", ""), console=told.get("console", ()))


def _ignore(_: dict[str, Any]) -> None:
    """A reply on the way that nobody wants."""


class Control:
    """A connection to a running testbed. A context manager; leaving it ends a command that still runs through it."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        try:
            self.sock = registry.connect(entry.socket)
        except OSError as error:
            raise SupervisorGone(f"testbed {entry.name!r} does not answer ({error.strerror or error})",
                                 hint=f"testbed down --force {entry.name}") from error

    def call(self, op: str, fields: Mapping[str, object] | None = None, *, fds: Sequence[int] = (),
             hear: Hear = _ignore) -> dict[str, Any]:
        """Ask, and wait for the last reply. `hear` gets those before it. Raises Refused, SupervisorGone."""
        reply, given = self.call_fds(op, fields, fds=fds, hear=hear)
        wire.close_all(given)
        return reply

    def call_fds(self, op: str, fields: Mapping[str, object] | None = None, *, fds: Sequence[int] = (),
                 hear: Hear = _ignore) -> tuple[dict[str, Any], list[int]]:
        """The same, with the descriptors that came with the last reply, which are the caller's."""
        self.post({"op": op, **(fields or {})}, fds)
        return self.await_reply(hear)

    def post(self, message: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Send without waiting for the answer."""
        try:
            wire.send_message(self.sock, dict(message), fds)
        except OSError as error:
            raise self._gone() from error

    def await_reply(self, hear: Hear = _ignore) -> tuple[dict[str, Any], list[int]]:
        """The last reply to what was posted."""
        return await_reply(self.sock, hear, self._gone)

    def _gone(self) -> SupervisorGone:
        return SupervisorGone(f"the process of testbed {self.entry.name!r} ended meanwhile; its VMs end with it",
                              hint=f"its log, if it was kept: {self.entry.directory}/supervisor.log")

    def close(self) -> None:
        """Hang up."""
        self.sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def await_reply(sock: socket.socket, hear: Hear,
                gone: Callable[[], TestbedError]) -> tuple[dict[str, Any], list[int]]:
    """Read replies until the last. Raises Refused, and what `gone` makes at the end of the connection."""
    while True:
        try:
            received = wire.receive_message(sock)
        except (ConnectionError, HostError) as error:
            raise gone() from error
        if received is None:
            raise gone()
        reply, fds = received
        if "ok" not in reply:
            hear(reply)
        elif reply["ok"]:
            return reply, fds
        else:
            wire.close_all(fds)
            raise _refused(reply["error"])


def start(topology: Topology, hear: Hear = _ignore) -> dict[str, Any]:
    """Start a testbed that outlives this process, and wait until it is ready; its status.

    `hear` gets {"say": line} for steps that take their time. Interrupted, or failing, it leaves nothing.
    Raises Refused, NameTaken, SupervisorGone.
    """
    registry.check_free(topology.name)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as stderr:
        with theirs:
            process = subprocess.Popen(
                # -P: nothing of the current directory is imported
                [sys.executable, "-P", "-m", "testbed.supervisor", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr, cwd="/",
                start_new_session=True,
            )  # fmt: skip
        try:
            wire.send_message(ours, {"topology": topology.model_dump_json(exclude_none=True)})
            reply, _ = await_reply(ours, hear, lambda: _stillborn(process, stderr))
        except BaseException:
            ours.close()  # which tells it to end, if it does not do so anyway
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DOWN_SECONDS)
            raise
        return reply


def _stillborn(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> SupervisorGone:
    code = process.wait()
    stderr.seek(0)
    lines = stderr.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
    return SupervisorGone(f"the testbed's own process ended with {code}: {lines[-1] if lines else 'it said nothing'}",
                          hint="testbed doctor")


@dataclass(frozen=True)
class Ended:
    """A testbed that was ended: its name, and where its logs stay (empty: they do not)."""

    name: str
    kept: str


def down(entry: Entry, *, force: bool = False) -> Ended:
    """End a testbed, and wait until nothing is left of it; `force` kills its process and leaves the rest to the keeper.

    Raises Refused, SupervisorGone.
    """
    if force:
        with contextlib.suppress(ProcessLookupError):
            os.kill(entry.pid, signal.SIGKILL)
        _wait_gone(entry)
        return Ended(entry.name, "")
    with Control(entry) as control:
        control.sock.settimeout(DOWN_SECONDS)
        try:
            reply = control.call("down")
        except TimeoutError as error:
            raise SupervisorGone(f"testbed {entry.name!r} did not end in {DOWN_SECONDS:g} s",
                                 hint=f"testbed down --force {entry.name}") from error
    return Ended(entry.name, str(reply.get("kept", "")))


def _wait_gone(entry: Entry) -> None:
    """Until the keeper, which nothing announces the end of, has removed the directory."""
    deadline = time.monotonic() + DOWN_SECONDS
    while Path(entry.directory, registry.FILE).exists() and not Path(entry.directory, "KEPT").exists():
        if time.monotonic() > deadline:
            raise SupervisorGone(f"testbed {entry.name!r}: {entry.directory} is still there after {DOWN_SECONDS:g} s")
        time.sleep(0.05)
