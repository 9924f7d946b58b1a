"""The process that owns a testbed started by `testbed up`, and does what the other commands ask.

    python3 -m testbed.supervisor FD

FD is one end of a SEQPACKET socket pair to `testbed up`: it brings the topology, carries progress back, and then
"ready" or the error. If it is hung up before that, everything ends. Afterwards a socket in the run's directory
serves, one thread for each connection: a request {"op": ...}, replies, the last of which has "ok". May depend on
everything in `testbed` but the command line. If this process is killed, the run's keeper ends what it started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from host import wire
from host.errors import HostError
from idc.errors import IdcError
from images import ImageError
from testbed import isolation, registry
from testbed.bed import Testbed, plugged
from testbed.build import open_testbed
from testbed.errors import SpecError, TestbedError, VmError, VmStopped
from testbed.operations import OPERATIONS, Caller
from testbed.topology import parse

if TYPE_CHECKING:
    from types import FrameType

    from testbed.topology import Topology

EXPECTED = (TestbedError, HostError, ImageError, IdcError)
"""What a request may fail with, by a user's mistake or the world's; anything else is a mistake of ours."""

#: Seconds between two looks whether a daemon has died; between two tries with one that does not come up, at most.
MEND_EVERY, LONGEST_PAUSE = 0.5, 30.0

_log = logging.getLogger(__name__)


def describe(error: BaseException) -> dict[str, Any]:
    """An exception for the other end of the socket: what `testbed.control` makes one of its own from."""
    if isinstance(error, TestbedError):
        told: dict[str, Any] = {"message": error.message, "hint": error.hint}
        if isinstance(error, VmError):
            told |= {"vm": error.vm, "log": str(error.log or ""), "console": list(error.console)}
    else:
        told = {"message": str(error), "hint": ""}
    return told | {"kind": type(error).__name__, "internal": not isinstance(error, EXPECTED)}


class Supervisor:
    """Serves requests about one testbed until one says "down", or SIGTERM comes."""

    def __init__(self, bed: Testbed, topology: Topology) -> None:
        self.bed = bed
        self.topology = topology
        self.started = time.time()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._over = threading.Event()
        self._mourners: list[socket.socket] = []
        self._listener = wire.listen(bed.run.path(registry.SOCKET), socket.SOCK_SEQPACKET, backlog=64)

    def register(self) -> None:
        """Make the testbed known by its name. Raises NameTaken."""
        (self.bed.run.directory / "topology.toml").write_text(self.topology.as_toml())
        registry.register(registry.Entry(self.topology.name, str(self.bed.run.directory), os.getpid(), self.started,
                                         tuple(self.bed.vms)))

    def serve(self) -> None:
        """Until "down"; then the testbed is closed."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._stop_fd, select.POLLIN)
        # One of its own: what it waits for, such as a device that is being attached, must not keep callers waiting.
        threading.Thread(target=self._mend, name="mender", daemon=True).start()
        try:
            while not any(fd == self._stop_fd for fd, _ in poller.poll()):
                with contextlib.suppress(BlockingIOError):  # the caller has gone already
                    sock, _ = self._listener.accept()
                    sock.setblocking(True)
                    threading.Thread(target=self._converse, args=[sock], name="caller", daemon=True).start()
        finally:
            self.close()

    def _mend(self) -> None:
        """Start daemons again that have died; one that does not come up is tried again, less and less often."""
        pause = MEND_EVERY
        while not self._over.wait(pause):
            try:
                mended = self.bed.mend()
            except EXPECTED as error:
                pause = min(2 * pause, LONGEST_PAUSE)
                if not self._over.is_set():
                    _log.error("not mended, again in %g s: %s", pause, error)
            else:
                pause = MEND_EVERY
                if mended:
                    _log.warning("had died and were started again: %s", ", ".join(mended))

    def hang_up(self) -> None:
        """Serve no more; the testbed goes on."""
        self._over.set()
        self._listener.close()
        os.close(self._stop_fd)

    def close(self) -> None:
        """End it, and tell those who asked for that."""
        self.hang_up()
        failed = any(vm.death is not None and not isinstance(vm.death, VmStopped) for vm in self.bed.vms.values())
        answer: dict[str, Any] = {"ok": True}
        try:
            self.bed.close(failed=failed)
            answer["kept"] = str(self.bed.run.directory) if self.bed.run.kept else ""
        except EXPECTED as error:
            answer = {"ok": False, "error": describe(error)}
        for mourner in self._mourners:
            with contextlib.suppress(OSError):
                wire.send_message(mourner, answer)
            mourner.close()

    def _converse(self, sock: socket.socket) -> None:
        try:
            if not wire.same_user(sock):
                return
            while (received := wire.receive_message(sock)) is not None:
                request, fds = received
                if "op" not in request:
                    wire.close_all(fds)
                    continue  # a signal for a command that ended while it was under way
                if request.get("op") == "down":
                    self._mourners.append(sock)
                    os.eventfd_write(self._stop_fd, 1)
                    return
                wire.send_message(sock, *self._answer(Caller(sock, fds), request))
        except (OSError, HostError) as error:
            _log.info("a caller went away: %s", error)
        finally:
            if sock not in self._mourners:
                sock.close()

    def _answer(self, caller: Caller, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Do what is asked. Returns the last reply and the descriptors that go with it."""
        fds: list[int] = []
        try:
            if request.get("op") == "status":
                reply = self.status()
            else:
                operation = OPERATIONS.get(str(request.get("op")))
                if operation is None:
                    raise SpecError(f"this testbed does not know the operation {request.get('op')!r}",
                                    hint="it was started by another version: testbed down, then up again")
                reply = operation(self.bed, caller, request)
            fds = caller.gifts
        except EXPECTED as error:
            return {"ok": False, "error": describe(error)}, []
        except ConnectionError:
            raise
        except Exception as error:  # a mistake of ours must not end everybody's testbed
            _log.exception("operation %s", request.get("op"))
            return {"ok": False, "error": describe(error) | {"log": str(self.bed.run.directory / LOG)}}, []
        finally:
            caller.close()
        return {"ok": True, **reply}, fds

    def status(self) -> dict[str, Any]:
        """What `testbed ps` shows: plain data."""
        bed = self.bed
        dead = isolation.dead(bed)
        vms = [{"name": name, "state": vm.state, "pid": vm.pid, "cpus": vm.spec.cpus, "memory_mib": vm.spec.memory.mib,
                "ready_seconds": vm.boot_times.ready if vm.boot_times else None, "ip": vm.spec.ip,
                "console_log": str(vm.log), "qemu_log": str(vm.stderr_log), "dead_mappings": list(dead.get(name, ())),
                "dead_cap": 0 if bed.service is None else bed.service.dead_cap} for name, vm in bed.vms.items()]
        regions = []
        for name, region in bed.regions.items():
            assert bed.service is not None
            presence = bed.service.members(name)
            members = []
            for member in region.header.members:
                incarnation, present = presence.get(member.name, (0, False))
                vm = bed.vms.get(member.name)
                members.append({"name": member.name, "rights": member.rights.name.lower(), "present": present,
                                "incarnation": incarnation, "plugged": vm is not None and plugged(vm, region)})
            regions.append({"name": name, "size": region.header.size, "members": members,
                            "trusted_set": isolation.trusted_set(region),
                            "channels": [channel.name for channel in region.header.channels],
                            "doorbell_faults": [{"from": pair[0], "to": pair[1], **dataclasses.asdict(counts)}
                                                for pair, counts in bed.doorbells(name).items()]})
        nets = [{"name": name, "kind": net.kind, "description": net.description,
                 "addresses": [member.ip for member in net.members]} for name, net in bed.networks.items()]
        daemons = {} if bed.service is None else bed.service.processes()
        return {"name": self.topology.name, "pid": os.getpid(), "started": self.started, "accel": bed.verdict.accel,
                "reason": bed.verdict.reason, "directory": str(bed.run.directory), "image": bed.image.label,
                "keep": bed.run.keep, "vms": vms, "regions": regions, "networks": nets, "broker": _broker(bed),
                "registry": None if self.topology.broker is None else bed.registry_address, "daemons": daemons}


def _broker(bed: Testbed) -> dict[str, Any] | None:
    """Its own word, or why there is none: the rest can be told all the same."""
    try:
        return bed.broker_status()
    except HostError as error:
        return {"error": str(error)}


LOG = "supervisor.log"


def _terminated(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _watch(parent: socket.socket, ready: threading.Event) -> None:
    """End this process if `testbed up` goes away before the testbed is ready."""
    poller = select.poll()
    poller.register(parent, 0)
    poller.poll()
    if not ready.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """The supervisor process."""
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    parent = socket.socket(fileno=int(sys.argv[1]))
    received = wire.receive_message(parent)
    if received is None:
        return 1
    topology = parse(json.loads(received[0]["topology"]))
    ready = threading.Event()
    threading.Thread(target=_watch, args=[parent, ready], name="parent", daemon=True).start()
    supervisor: Supervisor | None = None
    try:
        bed = open_testbed(topology, notify=lambda text: wire.send_message(parent, {"say": text}))
        try:
            _log_to(bed)
            supervisor = Supervisor(bed, topology)
            supervisor.register()
            ready.set()  # first: `testbed up` ends as soon as it has read this
            wire.send_message(parent, {"ok": True, **supervisor.status()})
        except BaseException:  # its name was taken meanwhile, or nobody waits for it any more
            bed.close()
            raise
        supervisor.serve()
    except KeyboardInterrupt:
        return 130
    except EXPECTED as error:
        with contextlib.suppress(ConnectionError):
            wire.send_message(parent, {"ok": False, "error": describe(error)})
        return 1
    except ConnectionError:
        return 1  # `testbed up` has gone, and so has all that was started for it
    return 0


def _log_to(bed: Testbed) -> None:
    """From now on what this process says goes to its log in the run's directory."""
    with bed.run.path(LOG).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")


if __name__ == "__main__":
    sys.exit(main())
