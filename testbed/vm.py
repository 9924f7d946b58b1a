"""One virtual machine: started, watched, used, ended.

Depends on the rest of `testbed` below it: qemu_args, kernel, run, qmp, hotplug, console, agent, starve, errors. The
verbs are those of the NixOS test driver. Commands go over the management agent, never over the console. Whatever waits
on a VM is told at once, by an exception of testbed/errors.py, when QEMU ends or the guest's kernel gives up.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

from testbed import hotplug
from testbed.agent import AgentClient
from testbed.calls import AgentFault, AgentInfo, HostFault, Process, Result, argv_of
from testbed.console import Console, Finding
from testbed.errors import (
    AgentLost,
    BootFailed,
    CommandFailed,
    FileFailed,
    GuestHung,
    GuestOops,
    GuestPanicked,
    QemuFailed,
    QmpFailed,
    SpecError,
    TestbedError,
    TimedOut,
    VmError,
    VmStopped,
)
from testbed.hints import hint_for
from testbed.kernel import resolve_files
from testbed.pinning import pin
from testbed.qemu_args import VmSpec, Wiring, escape, qemu_args
from testbed.qmp import Event, EventLoop, Qmp, QmpError
from testbed.shell import interact
from testbed.starve import Starved, starve
from testbed.times import BootTimes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import paramiko

    from testbed.run import Run

E = TypeVar("E", bound=VmError)

BOOT_SECONDS = 90.0
"""How long a boot may take before it counts as failed; ten times what an idle machine needs under TCG."""
COMMAND_SECONDS = 300.0
_NOISE = re.compile(r"info: QEMU waiting for connection on|warning: netdev \w+ has no peer")
_LAST_WORDS_SECONDS = 3.0
_PANIC_SECONDS = 2.0


class Vm:
    """A VM of `run`. Starts nothing yet: `start()`, or `Vm.boot(...)` which also waits for READY.

    Raises SpecError for a kernel that is none and for files that cannot be read. As a context manager it boots if
    need be and is ended at the end. Thread-safe but for `start` and `close`.
    """

    _huge_pages = True

    def __init__(self, spec: VmSpec, run: Run) -> None:
        self.spec = resolve_files(spec)
        self.run = run
        self.name = spec.name
        self.log: Path = run.path(f"{spec.name}.console.log")
        self.stderr_log: Path = run.path(f"{spec.name}.qemu.log")
        self.boot_times: BootTimes | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = ""
        self._paused = False
        self._exited = threading.Event()
        self.ports = hotplug.Ports(self)
        """What is plugged into its root ports."""
        self._death: Callable[[], VmError] | None = None
        self._shutdown_reason = ""
        self._closed = False

    @classmethod
    def boot(cls, spec: VmSpec, run: Run, timeout: float = BOOT_SECONDS) -> Vm:
        """Start a VM and wait until its agent is ready. Raises BootFailed or QemuFailed, leaving nothing running."""
        return boot_all([spec], run, timeout)[0]

    def start(self) -> None:
        """Start QEMU; returns at once. Raises SpecError if there is no such QEMU or the VM was started before."""
        if self._process is not None:
            raise SpecError(f"VM {self.name} was started before")
        try:
            self._start()
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """What there is of a start that was cut short, by Ctrl-C for one, goes: nobody watches for QEMU's end yet."""
        self._closed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._exited.set()
        for part in ("_agent", "_qmp", "_console"):
            if part in vars(self):
                vars(self)[part].close()

    def _start(self) -> None:
        with contextlib.ExitStack() as ours:
            ends = {end: self._socket(end, ours) for end in ("console", "agent", "qmp")}
            # wait=on: QEMU takes our connection, which is there already, before it does anything else; so not
            # one byte of the console is lost, and nobody has to try again until a socket appears.
            words = {
                end: f"fd={ends[end][0].fileno()},server=on,wait={'off' if end == 'qmp' else 'on'}"
                for end in ("console", "agent", "qmp")
            }
            if self.gdb is not None:
                words["gdb"] = f"path={escape(str(self.gdb))},server=on,wait=off"
            wiring = Wiring(**words)
            fds = [*(listener.fileno() for listener, _ in ends.values()), *self._descriptors()]
            with self.stderr_log.open("wb") as stderr:
                self._began = time.monotonic()
                try:
                    self._process = self.run.popen(
                        self._command(wiring), stdout=stderr, stderr=subprocess.STDOUT, pass_fds=fds,
                        huge_pages=self._huge_pages,
                    )
                except (FileNotFoundError, PermissionError) as error:
                    # A directory of PATH that may not be looked into also ends as "permission denied".
                    raise SpecError(f"cannot run {self.spec.qemu}: {error.strerror}",
                                    hint="apt install qemu-system-x86") from error  # fmt: skip
            ours.pop_all()
        for listener, _ in ends.values():
            listener.close()
        self._console = Console(ends["console"][1], self.log, self._on_finding)
        self._agent = AgentClient(
            ends["agent"][1],
            self.name,
            lost=self._lost,
            hung=self._hung,
            running=lambda: not self._paused and self.gdb is None,  # gdb may have stopped it
            on_ready=self._on_ready,
        )
        self._qmp = Qmp(ends["qmp"][1], self.name, self._on_event)
        self._pidfd = os.pidfd_open(self._process.pid)
        EventLoop.get().watch_fd(self._pidfd, self._on_exit)

    def _command(self, wiring: Wiring) -> list[str]:
        return qemu_args(self.spec, wiring)

    def _descriptors(self) -> list[int]:
        """What QEMU inherits, by the same numbers, beside its sockets."""
        return [fd for nic in self.spec.nics for fd in nic.fds]

    def _socket(self, end: str, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
        """A listening socket for QEMU, at a path so that people can look in, and our connection to it."""
        path = str(self.run.path(f"{self.name}.{end}"))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen(1)
        client = stack.enter_context(socket.socket(socket.AF_UNIX))
        client.connect(path)
        return listener, client

    def wait_ready(self, timeout: float = BOOT_SECONDS) -> AgentInfo:
        """Wait for the agent's READY. Raises BootFailed, or QemuFailed if QEMU never got as far as a guest."""
        try:
            info = self._agent.wait_ready(timeout)
            pin(self)
            return info
        except TimeoutError:
            raise self.error(
                BootFailed, f"no READY from its agent in {timeout:.0f} s (QEMU: {self._run_state()})"
            ) from None
        except QemuFailed as error:
            if self._console.first_byte is None:
                raise
            raise self.error(BootFailed, f"did not boot: {error.message}", hint=error.hint) from error
        except VmError as error:
            raise self.error(BootFailed, f"did not boot: {error.message}", hint=error.hint) from error

    def shutdown(self, timeout: float = 60.0) -> None:
        """Have the guest sync and power off, wait for QEMU's end. Raises TimedOut, after killing it."""
        self._agent.check()
        self._stopping = "shut down"
        self._agent.poweroff()
        if not self._exited.wait(timeout):
            self._kill()
            raise self.error(TimedOut, f"did not power off in {timeout:g} s; it was killed")

    def crash(self) -> None:
        """Kill QEMU (signal 9), as a power cut would."""
        self._stopping = self._stopping or "killed"
        self._kill()

    def close(self) -> None:
        """End the VM at once and let go of everything. The logs stay. Again: nothing."""
        if self._closed or self._process is None:
            self._closed = True
            return
        self._closed = True
        self._stopping = self._stopping or "closed"
        self._kill()
        self._agent.close()
        self._qmp.close()
        self._console.close()
        os.close(self._pidfd)
        for end in ("console", "agent", "qmp", "gdb"):
            self.run.path(f"{self.name}.{end}").unlink(missing_ok=True)

    def _kill(self) -> None:
        assert self._process is not None
        if not self._exited.is_set():
            self._process.kill()
            self._exited.wait()

    def __enter__(self) -> Self:
        if self._process is None:
            self.start()
            try:
                self.wait_ready()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what happens to it

    def _on_ready(self, info: AgentInfo) -> None:
        if self.boot_times is None:
            console = self._console.first_byte
            self.boot_times = BootTimes(
                qmp=self._qmp.connected_at - self._began if self._qmp.connected_at else float("nan"),
                console=None if console is None else console - self._began,
                ready=time.monotonic() - self._began,
                guest=info.uptime,
            )

    def _on_event(self, event: Event) -> None:
        data = event.get("data", {})
        name = event["event"]
        if name == "SHUTDOWN":
            self._shutdown_reason = data.get("reason", "")
        elif name == "VSERPORT_CHANGE" and data.get("id") == "agent" and not data.get("open"):
            self._agent.port_closed()
        elif name == "GUEST_PANICKED":
            self._on_finding(Finding("panic", "the guest told the pvpanic device of a panic", time.monotonic()))
        elif name == "DEVICE_DELETED":
            self.ports.deleted(str(data.get("device")))

    def _on_finding(self, finding: Finding) -> None:
        if finding.severity == "oops":
            self._agent.poison(lambda: self.error(GuestOops, f"the kernel reported: {finding.text}"))
            return
        # QEMU's end follows at once and says it all; but a kernel told not to restart sits there for ever.
        timer = threading.Timer(
            _PANIC_SECONDS, self._agent.end, [lambda: self.error(GuestPanicked, self._panic_text() or finding.text)]
        )
        timer.daemon = True
        timer.start()

    def _on_exit(self) -> None:
        # On the event loop, which must not wait; the console's last bytes are still under way.
        threading.Thread(target=self._bury, name=f"exit of {self.name}", daemon=True).start()

    def _bury(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self._console.wait_end(_LAST_WORDS_SECONDS)
        self._death = lambda: self._cause_of_death(code)
        self._agent.end(self._death)
        self._exited.set()
        self._qmp.ended()

    def _panic_text(self) -> str:
        return next((f.text for f in self._console.findings if f.severity == "panic"), "")

    def _cause_of_death(self, code: int) -> VmError:
        panic = self._panic_text()
        oops = next((f.text for f in self._console.findings if f.severity == "oops"), "")
        if panic and oops:  # the kernel was told to panic on an oops (oops=panic): the oops is what happened
            return self.error(GuestOops, f"the kernel reported: {oops}; then it panicked, as it was told to")
        if panic:
            return self.error(GuestPanicked, panic)
        if self._stopping:
            return self.error(VmStopped, f"it was {self._stopping}")
        stderr = self.stderr_log.read_text("utf-8", "replace").strip()
        if self._shutdown_reason == "guest-shutdown":
            return self.error(VmStopped, "it powered itself off")
        if self._shutdown_reason == "guest-reset":
            return self.error(VmStopped, "it restarted itself: a reboot, or a triple fault")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        # What QEMU says of our own way of starting it is no reason for its end.
        said = "\n".join(line for line in stderr.splitlines() if not _NOISE.search(line))
        error = self.error(
            QemuFailed, f"QEMU ended ({how}){': ' + said if said else ' and said nothing'}", hint=hint_for(said)
        )
        error.exit_code, error.stderr = code, stderr
        return error

    def _lost(self, text: str) -> TestbedError:
        """The link ended, or the agent was started again. Usually QEMU's end is the reason, and about to be told."""
        if self._process is not None and self._process_ends():
            self._exited.wait(_LAST_WORDS_SECONDS)
        if self._death is not None:
            return self._death()
        return self.error(AgentLost, f"{text}; whether the call took effect is not known")

    def _process_ends(self) -> bool:
        """Whether QEMU has ended, or closed its console, which it does only then."""
        return self._exited.is_set() or self._console.wait_end(0.2)

    def _hung(self, text: str) -> TestbedError:
        warnings = self._console.warnings()
        because = f"; the console warns: {warnings[-1]}" if warnings else ""
        return self.error(
            GuestHung,
            f"{text}; QEMU: {self._run_state()}{because}",
            hint=hint_for(*warnings) or "attach to the console, or raise the limit if the machine is overloaded",
        )

    def _run_state(self) -> str:
        try:
            return str(self._qmp.execute("query-status", timeout=3.0)["status"])
        except QmpError as error:
            return f"does not answer either ({error})"

    def error(self, kind: type[E], message: str, *, hint: str = "") -> E:
        """An exception about this VM, with its console's tail and its log."""
        tail = self._console.tail()
        return kind(message, vm=self.name, console=tail, log=self.log, hint=hint or hint_for(message, *tail))

    def clear_oops(self) -> None:
        """After a GuestOops: use the guest again all the same, to gather what it knows."""
        self._agent.poison(None)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def gdb(self) -> Path | None:
        """The socket for gdb's `target remote`, if the spec asks for one; a VM under gdb is never taken for hung."""
        return None if self.spec.gdb == "off" else self.run.path(f"{self.name}.gdb")

    @property
    def alive(self) -> bool:
        """Whether QEMU runs."""
        return self._process is not None and not self._exited.is_set()

    @property
    def death(self) -> VmError | None:
        """Why QEMU ended; None while it runs, and before it was started."""
        return None if self._death is None else self._death()

    @property
    def state(self) -> str:
        """"running", "paused", or "ended: " with the reason in one line."""
        death = self.death
        if death is not None:
            return f"ended: {death.message.splitlines()[0]}"
        return "ended" if not self.alive else "paused" if self._paused else "running"

    @property
    def devices(self) -> frozenset[str]:
        """Ids of the devices that are plugged into root ports now."""
        return self.ports.devices

    @property
    def info(self) -> AgentInfo:
        """What the agent said in READY."""
        return self._agent.wait_ready(0 if self._agent.info else COMMAND_SECONDS)

    @property
    def agent(self) -> AgentClient:
        """The link to the agent, for what the verbs below do not offer."""
        return self._agent

    @property
    def console(self) -> Console:
        """The serial console."""
        return self._console

    # -- commands

    def execute(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes = b"",
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = COMMAND_SECONDS,
    ) -> Result:
        """Run a command (a string goes to the guest's shell) and return how it ended, whatever that is.

        `timeout` in seconds; then its process group is killed and TimedOut raised.
        """
        try:
            return self._agent.execute(argv_of(command), stdin=stdin, cwd=cwd, env=env, timeout=timeout)
        except TimeoutError:
            raise self.error(TimedOut, f"{command!r} took longer than {timeout:g} s; it was killed") from None

    def succeed(self, *commands: str | Sequence[str], timeout: float | None = COMMAND_SECONDS) -> str:
        """Run commands that must end with 0, one after the other; returns their standard outputs, joined, as
        text.

        Raises CommandFailed at the first that does not.
        """
        output = ""
        for command in commands:
            result = self.execute(command, timeout=timeout)
            if result.exit_code != 0:
                raise self._command_failed(command, result, f"ended with {result.exit_code}")
            output += result.out
        return output

    def fail(self, *commands: str | Sequence[str], timeout: float | None = COMMAND_SECONDS) -> str:
        """Run commands that must not end with 0; returns their standard outputs. Raises CommandFailed."""
        output = ""
        for command in commands:
            result = self.execute(command, timeout=timeout)
            if result.exit_code == 0:
                raise self._command_failed(command, result, "ended with 0, and should have failed")
            output += result.out
        return output

    def wait_until_succeeds(self, command: str | Sequence[str], timeout: float = 60.0, every: float = 0.2) -> str:
        """Run a command again and again, `every` so many seconds, until it ends with 0; returns its standard
        output.

        Raises CommandFailed with the last attempt when `timeout` seconds have passed.
        """
        deadline = time.monotonic() + timeout
        while True:
            result = self.execute(command, timeout=max(1.0, deadline - time.monotonic()))
            if result.exit_code == 0:
                return result.out
            if time.monotonic() + every > deadline:
                raise self._command_failed(command, result, f"still ended with {result.exit_code} after {timeout:g} s")
            time.sleep(every)

    def _command_failed(self, command: str | Sequence[str], result: Result, how: str) -> CommandFailed:
        words = "".join(
            f"\n{name}: {text.strip()[-2000:]}"
            for name, text in (("stdout", result.out), ("stderr", result.err))
            if text.strip()
        )
        error = self.error(CommandFailed, f"{command!r} {how}{words}")
        error.exit_code, error.stdout, error.stderr = result.exit_code, result.stdout, result.stderr
        return error

    def spawn(
        self,
        command: str | Sequence[str],
        *,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
    ) -> Process:
        """Start a command and return a handle: poll, wait, kill, lines, write."""
        return self._agent.spawn(argv_of(command), cwd=cwd, env=env, stdin=stdin, timeout=COMMAND_SECONDS)

    def copy_to(
        self,
        source: Path,
        target: str,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Copy a host's file to `target` in the guest; returns its size in bytes. Raises FileFailed, TimedOut."""
        with self._file_errors(f"push of {source} to {target}", timeout):
            return self._agent.push(source, target, timeout=timeout, progress=progress)

    def copy_from(
        self,
        source: str,
        target: Path,
        *,
        timeout: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Copy the guest's file `source` to the host; returns its size in bytes. Raises FileFailed, TimedOut."""
        with self._file_errors(f"pull of {source} to {target}", timeout):
            return self._agent.pull(source, target, timeout=timeout, progress=progress)

    @contextlib.contextmanager
    def _file_errors(self, what: str, timeout: float | None) -> Iterator[None]:
        try:
            yield
        except AgentFault as fault:
            error = self.error(FileFailed, f"{what}: the guest says: {fault}")
            error.errno = fault.errno
            raise error from None
        except HostFault as fault:
            error = self.error(FileFailed, f"{what}: {fault}")
            if isinstance(fault.__cause__, OSError):
                error.errno = fault.__cause__.errno or 0
            raise error from fault.__cause__
        except TimeoutError:
            raise self.error(TimedOut, f"{what} took longer than {timeout} s") from None

    def wait_for_console_text(self, pattern: str, timeout: float = 60.0, *, since: int = 0) -> str:
        """Wait until the console shows a match of the regular expression; returns the match.

        `since` is a `console.position()` taken earlier. Raises TimedOut, or what ended the VM.
        """
        deadline = time.monotonic() + timeout
        while True:
            seen = self._console.position()
            match = self._console.search(pattern, since)
            if match:
                return match.group()
            if self._death is not None:
                raise self._death()
            if time.monotonic() >= deadline:
                raise self.error(TimedOut, f"nothing like {pattern!r} on the console in {timeout:g} s")
            if self._exited.is_set() or not self._console.wait_changed(seen, min(1.0, deadline - time.monotonic())):
                continue
            self._exited.wait(0.01 if self._console.position() == seen else 0)

    def ssh(self) -> paramiko.SSHClient:
        """A paramiko client, logged in as root; no network is needed. Raises SshFailed, VmError."""
        from testbed import ssh  # late: paramiko is slow to load, and few want it

        return ssh.connect(self)

    def shell(self) -> None:
        """Join this process's terminal to a root shell on the serial console; Ctrl-] leaves. For people."""
        interact(self._console)

    # -- QEMU

    def qmp(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = 20.0) -> Any:  # noqa: ANN401 - JSON, of any shape
        """Run a QMP command and return its answer. Raises QmpFailed, or what ended the VM."""
        try:
            return self._qmp.execute(command, dict(arguments) if arguments is not None else None, timeout=timeout)
        except QmpError as error:
            raise self._qmp_failed(error) from error

    def qmp_until(self, command: str, arguments: Mapping[str, object], over: Callable[[Event], bool],
                  timeout: float) -> Event:  # fmt: skip
        """Run a QMP command and return the event with which it is over; `timeout` in seconds. Raises as `qmp`."""
        mark = self._qmp.mark()
        self.qmp(command, arguments)
        try:
            return self._qmp.wait_event(over, since=mark, timeout=timeout)
        except QmpError as error:
            raise self._qmp_failed(error) from error

    def _qmp_failed(self, error: QmpError) -> VmError:
        if not error.error_class and self._process_ends():
            self._exited.wait(_LAST_WORDS_SECONDS)
        if self._death is not None:
            return self._death()
        failed = self.error(QmpFailed, str(error))
        failed.error_class = error.error_class
        return failed

    def send_fd(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of `fd`, to be used by that name in a later command. Raises QmpFailed."""
        try:
            self._qmp.send_fd(name, fd)
        except QmpError as error:
            raise self._qmp_failed(error) from error

    def pause(self) -> None:
        """Stop the guest's CPUs."""
        self.qmp("stop")
        self._paused = True

    def resume(self) -> None:
        """Let the guest's CPUs run again."""
        self.qmp("cont")
        self._paused = False

    def migrate(self, command: str, uri: str, timeout: float) -> None:
        """Save or load state (QMP migrate or migrate-incoming, capability "events" set) and wait for its end.

        `timeout` in seconds. Raises QmpFailed, or what ended the VM: a QEMU that cannot load ends.
        """

        def over(event: Event) -> bool:
            return event["event"] == "MIGRATION" and event["data"]["status"] in ("completed", "failed", "cancelled")

        event = self.qmp_until(command, {"uri": uri}, over, timeout)
        if event["data"]["status"] != "completed":
            reason = self.qmp("query-migrate").get("error-desc", "no reason given")
            raise self.error(QmpFailed, f"QMP {command}: {event['data']['status']}: {reason}")

    def starve(self, share: float, *, seed: int = 0) -> AbstractContextManager[Starved]:
        """Let QEMU run for `share` (above 0, below 1) of the time while the block runs, in turns drawn from `seed`."""
        return starve(self.pid, share, seed=seed)

    def plug(self, device: Mapping[str, object], *, timeout: float = 30.0) -> str:
        """Plug a device in (QMP device_add); without a "bus" it goes to a free root port. Returns that bus.

        `device` needs "driver" and "id". An ivshmem-doorbell blocks QEMU's main loop until its server has
        answered: that is what `timeout` is for. Raises QmpFailed, SpecError when no root port is free.
        """
        return self.ports.plug(device, timeout)

    def unplug(self, device: str, *, timeout: float = 30.0) -> None:
        """Unplug a device and wait until the guest has let go of it. Raises QmpFailed; the guest may refuse."""
        self.ports.unplug(device, timeout)

    def add_chardev(self, name: str, path: Path) -> None:
        """Connect QEMU to the listening Unix socket at `path`, as character device `name`. Raises QmpFailed."""
        hotplug.add_chardev(self, name, path)

    def remove_chardev(self, name: str, *, timeout: float = 10.0) -> None:
        """Take a character device away, as soon as QEMU has freed the device that used it. Raises QmpFailed."""
        hotplug.remove_chardev(self, name, timeout)


def boot_all(specs: Sequence[VmSpec], run: Run, timeout: float = BOOT_SECONDS) -> list[Vm]:
    """Boot several VMs at the same time. If one fails, all are ended and its exception is raised."""
    return start_all([Vm(spec, run) for spec in specs], timeout)


def start_all(vms: list[Vm], timeout: float = BOOT_SECONDS) -> list[Vm]:
    """Start several VMs at the same time and wait until all are ready. If one fails, all are ended."""
    deadline = time.monotonic() + timeout
    try:
        for vm in vms:
            vm.start()
        for vm in vms:
            vm.wait_ready(max(0.0, deadline - time.monotonic()))
    except BaseException:
        for vm in vms:
            vm.close()
        raise
    return vms
