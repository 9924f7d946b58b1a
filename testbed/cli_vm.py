"""`testbed exec`, `cp`, `logs`, `console`, `ssh`, `plug`, `unplug`: one VM of a running testbed.

May import typer, `testbed.control` and `testbed.terminal`.
"""

from __future__ import annotations

import os
import re
import select
import shlex
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from testbed import control, registry, terminal
from testbed.cli_common import Ended, Json, Quiet, VmName, complete_vm, out, print_json
from testbed.errors import SpecError

#: What `exec` ends with when it is the testbed that failed, not the command; ssh does the same.
EXEC_FAILED = 255
_INTERRUPT_SECONDS = 3.0
_REMOTE = re.compile(r"((?:[a-z0-9-]+/)?[a-z0-9-]+):(.*)", re.DOTALL)


def exec_(
    vm: VmName,
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...", help="One word is a shell's line.")],
    no_stdin: Annotated[bool, typer.Option("--no-stdin", "-n", help="Give it no standard input.")] = False,
    cwd: Annotated[str | None, typer.Option(metavar="DIR", help="Where it runs; by default /.")] = None,
    env: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUE", help="Set for it; may be repeated.")] = None,
) -> None:
    """Run a command in a VM.

    Its input, outputs and exit code are this command's (255 if the testbed itself failed). One word is a line for the
    guest's shell. Ctrl-C reaches the command, and kills it if that is not enough.
    """
    if command[0] == "--":
        command = command[1:]
    variables = dict(word.partition("=")[::2] for word in env or [])
    argv = ["/bin/sh", "-c", command[0]] if len(command) == 1 else command
    try:
        code = run_in(vm, argv, stdin=not no_stdin, cwd=cwd, env=variables)
    except (control.Refused, control.SupervisorGone, registry.NoSuchTestbed) as error:
        sys.stderr.write(f"error: {control.one_line(error)}\n")
        raise typer.Exit(EXEC_FAILED) from None
    raise typer.Exit(code)


def run_in(name: str, argv: list[str], *, stdin: bool = True, cwd: str | None = None,
           env: dict[str, str] | None = None) -> int:
    """Run a command on this process's standard input and outputs; the exit code as a shell gives it."""
    entry, vm = registry.find_vm(name)
    streams = [0, 1, 2] if stdin and _is_open(0) else [1, 2]
    with control.Control(entry) as link:
        request = {"op": "exec", "vm": vm, "argv": argv, "cwd": cwd, "env": env or {}, "stdin": len(streams) == 3}
        link.post(request, streams)
        try:
            reply, _ = link.await_reply()
        except Ended:
            reply = _interrupt(link)
    code = int(reply["exit_code"])
    return code if code >= 0 else 128 - code


def _interrupt(link: control.Control) -> dict[str, Any]:
    """Ctrl-C there, and if that is not enough, the end."""
    link.post({"signal": int(signal.SIGINT)})
    link.sock.settimeout(_INTERRUPT_SECONDS)
    try:
        return link.await_reply()[0]
    except (TimeoutError, Ended):
        link.post({"signal": int(signal.SIGKILL)})
        return link.await_reply()[0]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def cp(
    source: Annotated[str, typer.Argument(help="PATH, or VM:PATH.", autocompletion=complete_vm)],
    target: Annotated[str, typer.Argument(help="The other of the two; may be a directory.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a file into a VM or out of it."""
    there, here = _REMOTE.fullmatch(source), _REMOTE.fullmatch(target)
    if bool(there) == bool(here):
        raise SpecError("one of the two must be VM:PATH, and the other a path of this machine",
                        hint="between VMs: testbed transfer; a local path with a colon: write ./ in front")
    if here is not None:
        local = Path(source).absolute()
        if local.is_dir():
            raise SpecError(f"{source} is a directory", hint=_tar_hint(here[1], here[2], local, into=True))
        entry, vm = registry.find_vm(here[1])
        landing = here[2] or f"/root/{local.name}"
        reply = _copy(entry, quiet or as_json, "push", vm=vm, source=str(local), target=landing)
    else:
        assert there is not None
        local = Path(target).absolute()
        if local.is_dir():
            local /= os.path.basename(there[2])
        entry, vm = registry.find_vm(there[1])
        reply = _copy(entry, quiet or as_json, "pull", vm=vm, source=there[2], target=str(local))
    if as_json:
        print_json({"size": reply["size"], "target": reply["target"]})


def _tar_hint(vm: str, path: str, local: Path, *, into: bool) -> str:
    assert into
    return (f"tar -C {shlex.quote(str(local.parent))} -c {shlex.quote(local.name)} | testbed exec {vm} -- "
            f"tar -C {shlex.quote(path or '/root')} -x")


def _copy(entry: registry.Entry, quiet: bool, op: str, **fields: str) -> dict[str, Any]:
    with control.Control(entry) as link, terminal.bar(Path(fields["source"]).name, quiet=quiet) as move:
        return link.call(op, fields, hear=lambda reply: move(reply["done"], reply["size"]))


def logs(
    vm: VmName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the testbed ends.")] = False,
    qemu: Annotated[bool, typer.Option("--qemu", help="What QEMU said, instead of the console.")] = False,
) -> None:
    """Print a VM's console log."""
    entry, name = registry.find_vm(vm)
    path = Path(entry.directory, f"{name}.{'qemu' if qemu else 'console'}.log")
    with control.Control(entry) as link:
        try:
            with path.open("rb") as file:
                _print_log(file.fileno(), link.sock if follow else None)
        except OSError as error:
            raise SpecError(f"cannot read {path}: {error.strerror}") from error


def _print_log(fd: int, alive: socket.socket | None) -> None:
    while True:
        while data := os.read(fd, 1 << 16):
            sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        # Nothing tells of a file's growth but inotify, which has no binding here; the testbed's end is told at once.
        if alive is None or (select.select([alive], [], [], 0.2)[0] and not os.read(fd, 0)):
            return


def console(vm: VmName) -> None:
    """Use a VM's serial console; Ctrl-] leaves it."""
    entry, name = registry.find_vm(vm)
    with control.Control(entry) as link:
        _, (fd,) = link.call_fds("console", {"vm": name})
        with socket.socket(fileno=fd) as stream:
            if sys.stdin.isatty():
                sys.stderr.write(f"console of {name}; press Enter for a shell, Ctrl-] to leave\r\n")
            how = terminal.converse(stream)
        if how == "ended":
            sys.stderr.write(f"\nthe console of {name} ended\n")


def ssh(
    vm: VmName,
    words: Annotated[list[str] | None, typer.Argument(metavar="[-- SSH ARGUMENTS]...")] = None,
) -> None:
    """Log in with ssh; needs no network in the VM."""
    entry, name = registry.find_vm(vm)
    with control.Control(entry) as link:
        access = link.call("ssh", {"vm": name})
    given = [word for word in words or [] if word != "--"] if (words or [""])[0] == "--" else words or []
    arguments = terminal.ssh_arguments(access, f"{entry.name}/{name}")
    try:
        os.execvp("ssh", [*arguments, *given])
    except FileNotFoundError as error:
        raise SpecError("there is no ssh here", hint="apt install openssh-client, or testbed exec") from error


def ssh_proxy(vm: VmName) -> None:
    """Join standard input and output to an ssh server in a VM, for ssh's ProxyCommand."""
    raise typer.Exit(run_in(vm, list(terminal.SSHD)))


def plug(region: Annotated[str, typer.Argument()], vm: VmName) -> None:
    """Plug a region into a running VM that is its member."""
    _plug("plug", region, vm)


def unplug(region: Annotated[str, typer.Argument()], vm: VmName) -> None:
    """Take a region out of a running VM."""
    _plug("unplug", region, vm)


def _plug(op: str, region: str, vm: str) -> None:
    entry, name = registry.find_vm(vm)
    with control.Control(entry) as link:
        link.call(op, {"region": region, "vm": name})
    out(f"{region}: {op}ged {'into' if op == 'plug' else 'from'} {name}")
