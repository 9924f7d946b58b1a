"""ssh into a VM with no network: the server runs on the standard input and output of a command of the agent.

May depend on paramiko, cryptography (which paramiko brings) and `testbed.vm`. One key pair for each run, in its
directory; the guest makes its own host key, which is read over the agent, so nobody is trusted at first sight.
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.errors import TestbedError
from testbed.relay import Relay
from testbed.terminal import SSHD

if TYPE_CHECKING:
    from pathlib import Path

    import paramiko

    from testbed.run import Run
    from testbed.vm import Vm

CONNECT_SECONDS = 60.0
_LOCK = threading.Lock()
_HOST_KEY = "/etc/ssh/ssh_host_ed25519_key"
_PREPARE = f"""
set -e
umask 077
mkdir -p /root/.ssh /run/sshd
key=$1
grep -qxF "$key" /root/.ssh/authorized_keys 2> /dev/null || echo "$key" >> /root/.ssh/authorized_keys
[ -e {_HOST_KEY} ] || ssh-keygen -q -t ed25519 -N '' -C "$(busybox hostname)" -f {_HOST_KEY}
cat {_HOST_KEY}.pub
"""


class SshFailed(TestbedError):
    """No ssh connection to a VM; the message says what its server said."""


@dataclass(frozen=True)
class Access:
    """What a client needs: private key, known hosts, and the name that the VM has in the latter."""

    key: Path
    known_hosts: Path
    alias: str
    host_key: str


def prepare(vm: Vm) -> Access:
    """Let the run's key into the VM, and learn the VM's own. Raises VmError."""
    with _LOCK:
        key = _key_pair(vm.run)
        result = vm.succeed(["/bin/sh", "-c", _PREPARE, "sh", key.with_suffix(".pub").read_text().strip()])
        host_key = " ".join(result.split()[:2])
        known = key.parent / "known_hosts"
        others = [line for line in known.read_text().splitlines() if not line.startswith(f"{vm.name} ")] \
            if known.exists() else []
        known.write_text("".join(f"{line}\n" for line in [*others, f"{vm.name} {host_key}"]))
    return Access(key, known, vm.name, host_key)


def _key_pair(run: Run) -> Path:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    directory = run.directory / "ssh"
    path = directory / "id_ed25519"
    if path.with_suffix(".pub").exists():
        return path
    directory.mkdir(mode=0o700, exist_ok=True)
    private = Ed25519PrivateKey.generate()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b" idc-testbed\n")
    return path


def connect(vm: Vm, timeout: float = CONNECT_SECONDS) -> paramiko.SSHClient:
    """A paramiko client, logged in as root. Close it when done. Raises SshFailed, VmError.

    `timeout` in seconds is for each step of the handshake, which an emulated guest takes its time for.
    """
    import paramiko

    access = prepare(vm)
    process = vm.spawn([*SSHD, "-e"], stdin=True)
    ours, theirs = socket.socketpair()
    errors_out, errors_in = os.pipe()
    relay = Relay(vm.agent, process, os.dup(theirs.fileno()), theirs.detach(), errors_in)
    threading.Thread(target=_end, args=[relay], name=f"ssh of {vm.name}", daemon=True).start()
    client = paramiko.SSHClient()
    try:
        kind, _, blob = access.host_key.partition(" ")
        client.get_host_keys().add(vm.name, kind, paramiko.PKey.from_type_string(kind, _decode(blob)))
        client.connect(vm.name, username="root", key_filename=str(access.key), sock=ours, look_for_keys=False,
                       allow_agent=False, timeout=timeout, banner_timeout=timeout, auth_timeout=timeout)
    except (paramiko.SSHException, OSError) as error:
        client.close()
        ours.close()
        os.set_blocking(errors_out, False)
        said = _last(errors_out)
        raise SshFailed(f"no ssh connection to VM {vm.name}: {error}" + (f"; its server says: {said}" if said else ""),
                        hint=f"log of its console: {vm.log}") from error
    finally:
        os.close(errors_out)
    return client


def _decode(blob: str) -> bytes:
    import base64

    return base64.b64decode(blob)


def _last(fd: int) -> str:
    try:
        lines = os.read(fd, 65536).decode("utf-8", "replace").split("\n")
    except BlockingIOError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _end(relay: Relay) -> None:
    """Lets go of the relay when the server has ended; why, the client is told by its end of the socket."""
    try:
        relay.result()
    except TestbedError:
        pass  # the VM ended, and so did the connection
    finally:
        relay.close()
