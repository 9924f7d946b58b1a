"""Regions for a run: starts fd holder and region server, makes regions, says what to plug into whom.

May depend on the standard library, idc.layout and host.

    with RegionService(run_dir) as service:
        region = service.create(RegionSpec("link", 1 << 22, {"front": Rights.RW, "back": Rights.RW}, channels))
        vm.plug(region.attachment("front"))                   # a VM as member
        host.ivshmem.client.join(region.socket("back"))       # a host process as member

A region's memory is a memfd that only the holder and the members keep open; nothing is left in /dev/shm.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import host
from host import control_region, revocation, wire
from host.errors import HostError, RegionError, ServerError
from host.revocation import Revocation, Worth
from idc.layout import HEADER_BYTES, LayoutError, RegionHeader, Rights, pack_header

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable, Mapping, Sequence

    from idc.layout import ChannelSpec

START_TIMEOUT: Final = 20.0  # seconds: Python's start on a busy machine under emulation of everything else
STOP_TIMEOUT: Final = 5.0
CALL_TIMEOUT: Final = 20.0
STATUS_TIMEOUT: Final = 2.0  # a broker looks at such requests every few ms; one that is stopped must not hold up a list
_LOG_TAIL: Final = 2000  # bytes of a log that go into an error


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """What is asked of `RegionService.create`.

    Attributes:
        name: letters, digits, . _ - ; what guests find the region by.
        size: bytes, a power of two (QEMU maps it as a PCI BAR).
        members: rights by name; their order gives the ids.
        channels: laid out behind the header page; see `idc.layout`.
        vectors: of each rw member; None for as many as the channels need.
        parts: bytes, whole pages, from which each rw member allocates; None shares what is left out evenly.
    """

    name: str
    size: int
    members: Mapping[str, Rights]
    channels: Sequence[ChannelSpec] = ()
    vectors: int | None = None
    parts: Mapping[str, int] | None = None

    def plan(self, session: int = 0) -> RegionHeader:
        """The header page for it. Raises RegionError when it cannot be laid out."""
        for member in self.members:
            if member.startswith(revocation.GONE):
                raise RegionError(f"region {self.name!r}: no member can be called {member!r}, which stands for one "
                                  "that was revoked")
        try:
            return RegionHeader.plan(
                self.name, self.size, self.members, self.channels, parts=self.parts, vectors=self.vectors,
                session=session,
            )  # fmt: skip
        except LayoutError as error:
            raise RegionError(f"region {self.name!r} cannot be made: {error}") from error


@dataclass(frozen=True, slots=True)
class DoorbellAttachment:
    """For an rw member: chardev socket,path=`socket` and ivshmem-doorbell,chardev=...,vectors=`vectors`.

    The server must be running and reachable while the device is added: QEMU reads id and memory in `device_add`.
    One live connection for each member: a second is refused.
    """

    region: str
    member: str
    id: int
    size: int
    socket: Path
    vectors: int


@dataclass(frozen=True, slots=True)
class PlainAttachment:
    """For a ro member: memory-backend-file,mem-path=`memory`,share=on,readonly=on,size=`size` and ivshmem-plain.

    `memory` leads to the memfd in the holder and works as long as that lives; QEMU needs it only to open it.
    """

    region: str
    member: str
    id: int
    size: int
    memory: Path


@dataclass(frozen=True, slots=True)
class Region:
    """A region that is being served: pure data, valid until `RegionService.drop` or `close`."""

    header: RegionHeader
    memory: Path
    sockets: Mapping[str, Path]

    @property
    def name(self) -> str:
        """The region's name."""
        return self.header.name

    def socket(self, member: str) -> Path:
        """Where an rw member connects. Raises RegionError if it is none."""
        if member not in self.sockets or member.startswith(revocation.GONE):
            writers = ", ".join(name for name in self.sockets if not name.startswith(revocation.GONE)) or "none"
            raise RegionError(f"region {self.name!r} has no rw member {member!r} (rw members: {writers})")
        return self.sockets[member]

    def attachment(self, member: str) -> DoorbellAttachment | PlainAttachment:
        """What to plug into the member's VM. Raises RegionError if there is no such member."""
        if member.startswith(revocation.GONE):
            raise RegionError(f"region {self.name!r}: {member!r} stands for a member that was revoked")
        try:
            entry = self.header.member(member)
        except LayoutError as error:
            raise RegionError(str(error)) from error
        if entry.rights is Rights.RW:
            return DoorbellAttachment(
                self.name, member, entry.id, self.header.size, self.socket(member), self.header.vectors
            )
        return PlainAttachment(self.name, member, entry.id, self.header.size, self.memory)

    def open_memory(self, *, writable: bool = False) -> int:
        """A new descriptor of the memory, for the host itself (copies between regions, ro members here).

        Raises RegionError when the region was dropped or the holder is gone.
        """
        try:
            return os.open(self.memory, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        except OSError as error:
            raise RegionError(f"memory of region {self.name!r} is gone ({self.memory}): {error.strerror}") from error


class RegionService:
    """Holder and region server of one run, and what asks them for regions. Its methods may be called by any thread.

    Both processes end when this object is closed, and when the process that made it ends, however that happens.

    Args:
        run_dir: directory of the run; a private subdirectory `ivshmem` is made there for sockets and logs.
            Keep its path short: socket paths have at most 107 bytes.
        env: environment of both processes; by default that of this one.
        send_timeout: seconds in which a member must take the server's messages.
        dead_cap: abandoned regions that a domain may still map; see `abandon`.
    """

    def __init__(
        self, run_dir: Path, env: Mapping[str, str] | None = None, *, send_timeout: float | None = None,
        dead_cap: int = revocation.DEAD_CAP,
    ) -> None:
        self._directory = run_dir / "ivshmem"
        self._env = dict(os.environ if env is None else env)
        # Neither process needs more than the standard library and these two packages: -S keeps the start short,
        # and -P keeps files of the current directory from being imported instead.
        root = str(Path(host.__file__).resolve().parent.parent)
        self._env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, self._env.get("PYTHONPATH")]))
        self._options = [] if send_timeout is None else ["--send-timeout", str(send_timeout)]
        self._lock = threading.Lock()
        self._dead = revocation.Dead(dead_cap)
        self._dead_lock = threading.RLock()  # also: one region is abandoned at a time
        self._holder: _Child | None = None
        self._server: _Child | None = None
        self._broker: _Child | None = None
        self._broker_options: tuple[str, ...] = ()
        self._registry: _Child | None = None
        self._registry_options: tuple[str, ...] = ()
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start holder and server; returns when both serve. Raises ServerError with the end of the log."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        wire.check_socket_path(self.holder_socket)
        try:
            self._holder = _Child(
                "fd holder", ["host.holder", str(self.holder_socket)], self._env, self._directory / "holder.log"
            )
            self._start_server()
        except BaseException:
            self.close()
            raise

    @property
    def holder_socket(self) -> Path:
        """Where the fd holder answers."""
        return self._directory / "holder.sock"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self._directory / "server.log"

    @property
    def holder_pid(self) -> int:
        """Process id of the fd holder. Raises ServerError when the service is not started."""
        return _started(self._holder).process.pid

    @property
    def server_pid(self) -> int:
        """Process id of the region server. Raises ServerError when the service is not started."""
        return _started(self._server).process.pid

    @property
    def broker_pid(self) -> int:
        """Process id of the broker. Raises ServerError when none was started."""
        return self._brokered().process.pid

    def start_broker(self, *options: str) -> None:
        """Start the broker; returns when it serves. `options` are those of `python3 -m host.broker`.

        Raises ServerError with the end of its log; also if there is one already.
        """
        if self._broker is not None:
            raise ServerError("the broker runs already")
        self._broker_options = options
        self._start_broker()

    def _start_broker(self) -> None:
        arguments = ["host.broker", "--server", str(self._control_socket), "--control", str(self._broker_socket)]
        # It needs the compiled core, and so site-packages, which the other two do without.
        self._broker = _Child("broker", [*arguments, *self._broker_options], self._env, self._directory / "broker.log",
                              site=True)

    def restart_broker(self) -> None:
        """Kill the broker with SIGKILL, unless it is dead already, and start another, which joins all control regions.

        Raises ServerError.
        """
        self._brokered().kill()
        self._start_broker()

    def _brokered(self) -> _Child:
        if self._broker is None:
            raise ServerError("no broker was started: call start_broker()")
        return self._broker

    def broker_status(self) -> dict[str, Any]:
        """What the broker says of itself, see `host.broker.service.Service.status`. Raises ServerError."""
        self._brokered()
        try:
            with wire.connect(self._broker_socket, STATUS_TIMEOUT) as sock:
                wire.send_message(sock, {"op": "status"})
                answer = wire.receive_message(sock)
        except (OSError, HostError) as error:
            raise ServerError(f"the broker does not answer: {error}. Its log is {self._directory / 'broker.log'}; "
                              "restart_broker() brings it back") from error
        if answer is None:
            raise ServerError("the broker closed the connection")
        return {key: value for key, value in answer[0].items() if key != "ok"}

    @property
    def registry_pid(self) -> int:
        """Process id of the registry. Raises ServerError when none was started."""
        return self._registered().process.pid

    @property
    def registry_socket(self) -> Path:
        """Where host processes reach the registry: `unix:PATH` as an address."""
        return self._directory / "registry.sock"

    @property
    def registry_directory(self) -> Path:
        """What the registry keeps on disk."""
        return self._directory / "registry"

    def start_registry(self, *options: str) -> None:
        """Start the registry; returns when it serves. `options` are those of `python3 -m host.registry`.

        Raises ServerError with the end of its log; also if there is one already.
        """
        if self._registry is not None:
            raise ServerError("the registry runs already")
        self._registry_options = options
        self._start_registry()

    def _start_registry(self) -> None:
        arguments = ["host.registry", "--server", str(self._control_socket), "--socket", str(self.registry_socket),
                     "--directory", str(self.registry_directory)]
        self._registry = _Child("registry", [*arguments, *self._registry_options], self._env,
                                self._directory / "registry.log", site=True)

    def restart_registry(self) -> None:
        """Kill the registry with SIGKILL, unless it is dead already, and start another, with all that was acknowledged.

        Raises ServerError.
        """
        self._registered().kill()
        self._start_registry()

    def _registered(self) -> _Child:
        if self._registry is None:
            raise ServerError("no registry was started: call start_registry()")
        return self._registry

    def control(self, domain: str) -> Region:
        """Make the control region of a domain: how it reaches broker and registry, and what it is known by.

        In the domain's VM its addresses are `ivshmem:REGION/CHANNEL`, for a host process `member:SOCKET/CHANNEL`, with
        `host.broker.CHANNEL` and `host.registry.CHANNEL`. Raises RegionError (also for a reserved name), ServerError.
        """
        if domain in control_region.RESERVED:
            raise RegionError(f"a domain cannot be called {domain!r}: that is a name of the host's own")
        return self.create(RegionSpec(control_region.PREFIX + domain, control_region.REGION_BYTES,
                                      control_region.members(domain), control_region.channels(domain), parts={}))

    def create(self, spec: RegionSpec) -> Region:
        """Make a region and serve it. Raises RegionError (not as asked), ServerError (refused, or gone)."""
        header = spec.plan(session=secrets.randbits(64))
        with self._dead_lock:
            if header.name in self._dead.regions:
                raise RegionError(f"region {header.name!r} was abandoned and is still mapped by "
                                  f"{', '.join(self._dead.holders(header.name))}: take another name")
        memory = _make_memory(header)
        try:
            return self._serve(header, memory)
        finally:
            os.close(memory)

    def _serve(self, header: RegionHeader, memory: int) -> Region:
        reply = self._call({"op": "create"}, [memory])
        sockets = {name: Path(path) for name, path in reply["sockets"].items()}
        return Region(header, Path(f"/proc/{self.holder_pid}/fd/{reply['memory']}"), sockets)

    def drop(self, name: str) -> None:
        """Stop serving a region: members are cut off, and the memory goes when the last of them unmaps it."""
        self._call({"op": "drop", "region": name})

    def abandon(self, region: Region, member: str, *, live: Iterable[tuple[int, int]] | None = None) -> Revocation:
        """Take a region away from a member that need not agree, by leaving it alone in it; see docs/isolation.md.

        The others' bytes are copied to a fresh region, whose name is new (`link.1` after `link`) and whose layout is
        the old one's; the old one is served no more, and its memory punched to zeros. Whoever mapped it keeps a mapping
        that leads nowhere; that is counted against `dead_cap` until `released`. What is written to the old region while
        this runs may be lost: let the remaining members rest, then move them to `fresh`.

        Args:
            region: what is taken away; refused if the name means another region by now.
            member: from whom.
            live: (offset, length) of what is copied, in bytes; by default all behind the header page, which is made
                anew.

        Raises:
            RegionError: no such member, a range outside of the region, a control region, the cap is reached, or no
                memory. Nothing has changed then.
            ServerError: the region server is gone; the old region is in use as before, unless the text says otherwise.
        """
        name = region.name
        if name.startswith(control_region.PREFIX):
            raise RegionError(f"region {name!r} is a domain's control link, which ends with the domain")
        with self._dead_lock:
            old = self._open_memory(region)
            try:
                return self._abandon(region.header, member, old, live)
            finally:
                os.close(old)

    def _abandon(self, header: RegionHeader, member: str, old: int,
                 live: Iterable[tuple[int, int]] | None) -> Revocation:
        name = header.name
        fresh = revocation.successor(header, member, {*self.regions(), *self._dead.regions})
        behind = [(HEADER_BYTES, header.size - HEADER_BYTES)]
        ranges = revocation.check_ranges(header, behind if live is None else live)
        presence = self.members(name)
        # Nobody tells whether a read-only member maps it, nor whether a process kept what it had mapped.
        holders = {entry.name for entry in header.members if entry.name == member
                   or (not entry.name.startswith(revocation.GONE) and presence.get(entry.name, (0, True))[1])}
        self._dead.check(sorted(holders))
        made = self._replace(name, old, fresh, ranges)
        self._dead.add(name, holders)
        try:
            revocation.punch(old)
        except OSError as error:
            raise RegionError(f"region {name!r} is abandoned, but what is in it could not be erased: {error.strerror}; "
                              f"{made.name!r} has taken its place") from error
        return Revocation(name, member, Worth.ABANDONED, made, self._dead.holders(name))

    def _replace(self, name: str, old: int, header: RegionHeader, ranges: Sequence[tuple[int, int]]) -> Region:
        """Serve a copy in place of a region; either both steps are done or neither."""
        memory = _make_memory(header)
        try:
            revocation.copy_live(old, memory, ranges)
            made = self._serve(header, memory)
        except OSError as error:
            raise RegionError(f"region {name!r} cannot be copied: {error.strerror}") from error
        finally:
            os.close(memory)
        try:
            self.drop(name)
        except BaseException as error:
            try:
                self.drop(made.name)
            except HostError as again:
                raise ServerError(f"region {name!r} was copied to {made.name!r} and not dropped: {error}; after "
                                  "restart() drop one of them") from again
            raise
        return made

    def _open_memory(self, region: Region) -> int:
        """The region's memory itself: a path of a region that was dropped may lead to another's by now."""
        _, fds = self._ask({"op": "open", "region": region.name, "uuid": region.header.uuid.hex})
        memory = fds.pop()
        wire.close_all(fds)
        return memory

    def released(self, region: str, domain: str) -> None:
        """A domain does not map an abandoned region any more: unplugged, or ended. Idempotent."""
        with self._dead_lock:
            self._dead.released(region, domain)

    @property
    def dead(self) -> dict[str, tuple[str, ...]]:
        """Names of the abandoned regions that each domain still maps."""
        with self._dead_lock:
            return self._dead.domains

    @property
    def dead_cap(self) -> int:
        """How many each may."""
        return self._dead.cap

    def members(self, name: str) -> dict[str, tuple[int, bool]]:
        """(incarnation, present) of each rw member, as the server knows it. Raises RegionError if no such region."""
        regions = self.presence()
        if name not in regions:
            raise RegionError(f"no region {name!r} (there are: {', '.join(regions) or 'none'})")
        return regions[name]

    def presence(self) -> dict[str, dict[str, tuple[int, bool]]]:
        """The same of all regions, by name. Raises ServerError."""
        return {name: {member: (int(m["incarnation"]), bool(m["present"])) for member, m in members.items()}
                for name, members in self._call({"op": "list"})["regions"].items()}

    def processes(self) -> dict[str, int]:
        """Ids of the processes that it has started, by what they are."""
        children = (self._holder, self._server, self._broker, self._registry)
        return {child.what: child.process.pid for child in children if child is not None}

    def regions(self) -> list[str]:
        """Names of all regions that are served. Raises ServerError."""
        return list(self._call({"op": "list"})["regions"])

    def ring(self, name: str, member: str, vector: int = 0) -> None:
        """Ring a vector of an rw member, as the host (vector 0: look at the header page)."""
        self._call({"op": "ring", "region": name, "member": member, "vector": vector})

    def mend(self) -> list[str]:
        """Start again what has died of region server, broker and registry; what that was, in words. Established
        connections are not touched. Raises ServerError if one does not come up; it can be called again.
        """
        mended = []
        for child, restart in ((self._server, self.restart), (self._broker, self.restart_broker),
                               (self._registry, self.restart_registry)):
            if child is not None and not child.alive:
                restart()
                mended.append(child.what)
        return mended

    def restart(self) -> None:
        """Kill the server with SIGKILL, unless it is dead already, and start another, which takes all over."""
        with self._lock:
            if self._control is not None:
                self._control.close()
                self._control = None
            if self._server is not None:
                self._server.kill()
            self._start_server()

    def close(self) -> None:
        """End both processes and remove their directory's sockets; logs stay. Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
        for child in (self._registry, self._broker, self._server, self._holder):
            if child is not None:
                child.stop()
        self._registry = self._broker = self._server = self._holder = None
        if self._directory.is_dir():
            for leftover in self._directory.glob("*.sock"):  # of a server that was killed
                leftover.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _control_socket(self) -> Path:
        return self._directory / "control.sock"

    @property
    def _broker_socket(self) -> Path:
        return self._directory / "broker.sock"

    def _start_server(self) -> None:
        arguments = ["host.ivshmem.member", "--holder", str(self.holder_socket), "--sockets", str(self._directory)]
        arguments += ["--control", str(self._control_socket), *self._options]
        self._server = _Child("region server", arguments, self._env, self.log)

    def _call(self, request: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        reply, received = self._ask(request, fds)
        wire.close_all(received)
        return reply

    def _ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            try:
                if self._control is None:
                    self._control = wire.connect(self._control_socket, CALL_TIMEOUT)
                wire.send_message(self._control, request, fds)
                answer = wire.receive_message(self._control)
                if answer is None:
                    raise ConnectionResetError("it closed the connection")
            except (OSError, HostError) as error:
                if self._control is not None:
                    self._control.close()
                    self._control = None
                raise ServerError(
                    f"region server does not answer {request['op']}: {error}. Its log is {self.log}; "
                    "restart() brings it back without harm to its members"
                ) from error
        reply, received = answer
        if not reply.get("ok"):
            wire.close_all(received)
            raise RegionError(f"region server refuses {request['op']}: {reply.get('error')}")
        return reply, received


class _Child:
    """A process of ours that says when it serves, and ends when our end of its lifeline is closed."""

    def __init__(self, what: str, arguments: Sequence[str], env: Mapping[str, str], log: Path, *,
                 site: bool = False) -> None:
        self.what = what
        self._log = log
        ready, ready_there = os.pipe()
        lifeline_there, self._lifeline = os.pipe()
        try:
            command = [sys.executable, *(() if site else ("-S",)), "-P", "-m", *arguments]
            command += ["--ready", str(ready_there), "--lifeline", str(lifeline_there)]
            with log.open("ab") as output:
                self.process = subprocess.Popen(
                    command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    pass_fds=(ready_there, lifeline_there),
                    start_new_session=True,  # Ctrl-C is for us; we end it in order
                )  # fmt: skip
            os.close(ready_there)
            ready_there = -1
            self._wait_ready(ready)
        except BaseException:
            if hasattr(self, "process"):
                self.kill()
            self._close_lifeline()
            raise
        finally:
            for fd in (ready, ready_there, lifeline_there):
                if fd >= 0:
                    os.close(fd)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def stop(self) -> None:
        """Let it end in order; kill it if it does not within STOP_TIMEOUT seconds."""
        self._close_lifeline()
        try:
            self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and reap it."""
        self.process.kill()
        self.process.wait()
        self._close_lifeline()

    def _close_lifeline(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _wait_ready(self, ready: int) -> None:
        poller = select.poll()
        poller.register(ready, select.POLLIN)
        if not poller.poll(START_TIMEOUT * 1000):
            raise ServerError(f"the {self.what} does not serve after {START_TIMEOUT:g} s; its log is {self._log}")
        if os.read(ready, 1) != b"\n":
            code = self.process.wait()
            tail = self._log.read_bytes()[-_LOG_TAIL:].decode(errors="replace").strip()
            raise ServerError(f"the {self.what} ended with code {code} (log: {self._log}):\n{tail}")


def _started(child: _Child | None) -> _Child:
    if child is None:
        raise ServerError("the region service is not started: use it in a with statement, or call start()")
    return child


def _make_memory(header: RegionHeader) -> int:
    """A memfd with the header page, whose size nobody can change any more. Raises RegionError.

    A peer that could shrink it would kill every QEMU that maps it with SIGBUS.
    """
    try:
        memory = os.memfd_create(f"idc-{header.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise RegionError(f"region {header.name!r}: cannot make a memfd: {error.strerror}") from error
    try:
        os.ftruncate(memory, header.size)
        os.pwrite(memory, pack_header(header), 0)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        os.close(memory)
        raise RegionError(f"region {header.name!r} of {header.size} bytes: {error.strerror}") from error
    return memory
