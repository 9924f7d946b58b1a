"""What can be asked of a running testbed over its control socket; each is a function of the testbed and a request.

Runs in the supervisor, in the caller's thread. May depend on everything in `testbed` but the command line.
`OPERATIONS` at the end is the list; `testbed.control` is the other end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host import wire
from host.errors import RegionError
from idc.device.keys import Name
from testbed import within
from testbed.bed import plug, plugged
from testbed.devices import shown
from testbed.errors import SpecError, nearest
from testbed.live.describe import describe
from testbed.relay import Relay
from testbed.ship import Job
from testbed.ssh import prepare as prepare_ssh

if TYPE_CHECKING:
    from collections.abc import Callable

    from host.region import Region
    from testbed.bed import Testbed
    from testbed.vm import Vm

    Operation = Callable[["Testbed", "Caller", dict[str, Any]], dict[str, Any]]

_TELL_EVERY = 0.1
_CONSOLE_TAIL = 4000


class Caller:
    """Who asks: its socket, the descriptors that came with the request, and those that go with the reply."""

    def __init__(self, sock: socket.socket, fds: list[int]) -> None:
        self.sock = sock
        self.fds = fds
        self.gifts: list[int] = []

    def take_fds(self, count: int) -> list[int]:
        """The request's descriptors, which are the operation's from now on. Raises SpecError if others came."""
        if len(self.fds) != count:
            raise SpecError(f"{len(self.fds)} descriptors came with a request that takes {count}")
        fds, self.fds = self.fds, []
        return fds

    def tell(self, **fields: object) -> None:
        """A reply that is not the last."""
        wire.send_message(self.sock, fields)

    def progress(self, *, every: float = _TELL_EVERY) -> Callable[[int, int], None]:
        """Tells of bytes done and the size, at most once in `every` seconds."""
        last = 0.0

        def report(done: int, size: int) -> None:
            nonlocal last
            if time.monotonic() - last >= every:
                last = time.monotonic()
                self.tell(done=done, size=size)

        return report

    def close(self) -> None:
        """Let go of descriptors that nobody took."""
        wire.close_all(self.fds)
        self.fds = []


def _vm(bed: Testbed, request: dict[str, Any]) -> Vm:
    name = str(request["vm"])
    if name not in bed.vms:
        raise SpecError(f"no VM {name!r}{nearest(name, bed.vms, every=True)}")
    return bed.vms[name]


def _region(bed: Testbed, request: dict[str, Any]) -> Region:
    name = str(request["region"])
    if name not in bed.regions:
        raise SpecError(f"no region {name!r}{nearest(name, bed.regions, every=True)}")
    return bed.regions[name]


def execute(bed: Testbed, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Run a command on the caller's own descriptors: {vm, argv, cwd, env, stdin}; signals come as {signal}.

    The command is killed when the caller goes away. Replies {exit_code}, as in subprocess.
    """
    vm = _vm(bed, request)
    fds = caller.take_fds(3 if request["stdin"] else 2)
    stdin = fds[0] if request["stdin"] else None
    stdout, stderr = fds[-2:]
    try:
        process = vm.spawn(request["argv"], cwd=request.get("cwd"), env=request.get("env"), stdin=stdin is not None)
    except BaseException:
        wire.close_all(fds)
        raise
    relay = Relay(vm.agent, process, stdin, stdout, stderr)
    try:
        poller = select.poll()
        poller.register(caller.sock, select.POLLIN)
        poller.register(relay, select.POLLIN)
        while relay.fileno() not in dict(poller.poll()):
            received = wire.receive_message(caller.sock)
            if received is None:
                relay.cancel()
                raise ConnectionAbortedError("the caller of a command went away")
            relay.kill(int(received[0]["signal"]))
        return {"exit_code": relay.result()}
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise SpecError(f"the output of {request['argv'][0]} could not be written: {error.strerror}") from error
    finally:
        relay.close()


def push(bed: Testbed, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Copy a host's file into a VM: {vm, source, target}. Replies {size}."""
    vm = _vm(bed, request)
    source = Path(request["source"])
    target = _into(vm, str(request["target"]), source.name)
    return {"size": vm.copy_to(source, target, progress=caller.progress()), "target": target}


def _into(vm: Vm, target: str, name: str) -> str:
    """The path that a copy to `target` makes: in it, if that is a directory."""
    if target.endswith("/") or vm.execute(["test", "-d", target]).exit_code == 0:
        return f"{target.rstrip('/')}/{name}"
    return target


def pull(bed: Testbed, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Copy a VM's file to the host: {vm, source, target}. Replies {size}."""
    target = Path(request["target"])
    size = _vm(bed, request).copy_from(str(request["source"]), target, progress=caller.progress())
    return {"size": size, "target": str(target)}


def console(bed: Testbed, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Show the serial console and type on it: {vm}. The reply comes with a stream socket."""
    vm = _vm(bed, request)
    ours, theirs = socket.socketpair()
    caller.gifts.append(theirs.detach())
    tail = vm.log.read_bytes()[-_CONSOLE_TAIL:]
    threading.Thread(target=_show_console, args=[vm, ours, tail], name=f"console of {vm.name}", daemon=True).start()
    return {}


def _show_console(vm: Vm, ours: socket.socket, tail: bytes) -> None:
    def show(data: bytes) -> None:
        # Never waits: a reader that is too slow is cut off, rather than the guest held up.
        try:
            ours.send(data, socket.MSG_DONTWAIT)
        except OSError:
            with contextlib.suppress(OSError):
                ours.shutdown(socket.SHUT_RDWR)

    with ours, vm.console.shown(show):
        show(tail)
        while vm.alive:
            ready, _, _ = select.select([ours], [], [], 1.0)
            if not ready:
                continue
            with contextlib.suppress(ConnectionError):
                data = ours.recv(4096)
                if data:
                    vm.console.send(data)
                    continue
            return


def plug_region(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Plug a region into a VM that is a member: {vm, region}."""
    vm, region = _vm(bed, request), _region(bed, request)
    if plugged(vm, region):
        raise RegionError(f"region {region.name!r} is plugged into {vm.name} already")
    plug(vm, region)
    return {}


def unplug_region(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Take a region out of a VM: {vm, region}."""
    vm, region = _vm(bed, request), _region(bed, request)
    if not plugged(vm, region):
        raise RegionError(f"region {region.name!r} is not plugged into {vm.name}")
    bed.unplug(vm, region)
    return {}


def ssh(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Let the testbed's key into a VM: {vm}. Replies {key, known_hosts, alias}, for ssh's options."""
    access = prepare_ssh(_vm(bed, request))
    return {"key": str(access.key), "known_hosts": str(access.known_hosts), "alias": access.alias}


def transfer(bed: Testbed, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Send a file between two VMs: {file, source, target, path, save, tcp}. Replies the fields of `Transferred`."""
    job = Job(Path(request["file"]), _vm(bed, {"vm": request["source"]}).name, _vm(bed, {"vm": request["target"]}).name,
              path=request["path"], save=Path(request["save"]) if request["save"] else None, tcp=bool(request["tcp"]))
    last = 0.0

    def progress(side: str, phase: str, done: int, size: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _TELL_EVERY:
            last = time.monotonic()
            caller.tell(side=side, phase=phase, done=done, size=size)

    return dataclasses.asdict(within.ship(bed, job, say=lambda text: caller.tell(say=text), progress=progress))


def memory(bed: Testbed, caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """A read-only descriptor of a region's memory: {region}. Replies {size}."""
    region = _region(bed, request)
    caller.gifts.append(region.open_memory())
    return {"size": region.header.size}


def look(bed: Testbed, _caller: Caller, _request: dict[str, Any]) -> dict[str, Any]:
    """What there is to look at, see `testbed.live.describe`."""
    return describe(bed)


def qmp(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Run a QMP command: {vm, command, arguments}. Replies {answer}."""
    return {"answer": _vm(bed, request).qmp(str(request["command"]), request.get("arguments"), timeout=5.0)}


def attach(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Attach a device: {class, frontend, backend, options, number, wait}, options as text. Replies {device}."""
    seen = bed.devices.attach(str(request["class"]), str(request["frontend"]), str(request["backend"]),
                              texts=request["options"], number=str(request["number"]), wait=request["wait"])
    return {"device": shown(seen)}


def detach(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Detach a device: {class, frontend, number, wait, keep_link, force}; number "" for the only one.

    Replies its name, and the domains that did not let go.
    """
    with bed.devices.controller() as controller:
        number, kind, front = str(request["number"]), str(request["class"]), str(request["frontend"])
        name = Name(kind, front, number) if number else controller.find(kind, front)
    kept = bed.devices.detach(name, wait=float(request["wait"]), keep_link=bool(request["keep_link"]),
                              force=bool(request["force"]))
    return {"device": str(name), "kept": list(kept)}


def tty(bed: Testbed, _caller: Caller, request: dict[str, Any]) -> dict[str, Any]:
    """Where terminals of a VM can be used: {vm}. Attaches a console device to it the first time. Replies {socket}."""
    return {"socket": str(bed.devices.console(_vm(bed, request).name))}


def devices(bed: Testbed, _caller: Caller, _request: dict[str, Any]) -> dict[str, Any]:
    """List devices. Replies {devices}."""
    return {"devices": [shown(seen) for seen in bed.devices.list()]}


OPERATIONS: dict[str, Operation] = {
    "exec": execute,
    "push": push,
    "pull": pull,
    "console": console,
    "ssh": ssh,
    "transfer": transfer,
    "plug": plug_region,
    "unplug": unplug_region,
    "memory": memory,
    "look": look,
    "qmp": qmp,
    "attach": attach,
    "detach": detach,
    "devices": devices,
    "tty": tty,
}
