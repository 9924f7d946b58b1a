"""This process's terminal: a console's conversation, a bar for bytes, ssh's command line. Standard
library, rich and idc.console.screen."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import sys
from typing import TYPE_CHECKING, Any, Literal

from idc.console.screen import ESCAPE, raw_terminal, write_all
from testbed.progress import Steps

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

#: The guest's ssh server on its standard input and output, with a key of its own made when it is first asked for.
SSHD = ("/usr/sbin/sshd", "-i")


def converse(stream: socket.socket) -> Literal["left", "ended"]:
    """Join the terminal to `stream` until Ctrl-] ("left") or the stream's end. End of file leaves the output on."""
    watched: list[Any] = [0, stream]
    with raw_terminal():
        while True:
            ready, _, _ = select.select(watched, [], [])
            if stream in ready:
                try:
                    data = stream.recv(65536)
                except ConnectionError:
                    data = b""
                if not data:
                    return "ended"
                write_all(data)
            if 0 in ready:
                typed = os.read(0, 4096)
                text, escape, _ = typed.partition(ESCAPE)
                try:
                    stream.sendall(text)
                except ConnectionError:
                    return "ended"
                if escape:
                    return "left"
                if not typed:
                    watched.remove(0)


@contextlib.contextmanager
def bar(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for bytes whose number is known at the first call: (done, size)."""
    with contextlib.ExitStack() as stack:
        move: Callable[[int], None] | None = None

        def update(done: int, size: int) -> None:
            nonlocal move
            if move is None:
                move = stack.enter_context(Steps(quiet=quiet).bar(title, size))
            move(done)

        yield update


def ssh_arguments(access: dict[str, Any], name: str) -> list[str]:
    """ssh's command line for the VM `name` (TESTBED/VM); `access` is the testbed's answer to "ssh"."""
    proxy = shlex.join([sys.executable, "-P", "-m", "testbed.cli", "ssh-proxy", name])
    options = {"ProxyCommand": proxy, "UserKnownHostsFile": access["known_hosts"], "HostKeyAlias": access["alias"],
               "StrictHostKeyChecking": "yes", "IdentitiesOnly": "yes", "GlobalKnownHostsFile": "/dev/null",
               "LogLevel": "ERROR"}
    # -F: what a user's own configuration says about all hosts (another proxy, a jump) is not meant for this one
    words = ["ssh", "-F", "/dev/null", "-i", access["key"]]
    for option, value in options.items():
        words += ["-o", f"{option}={value}"]
    return [*words, f"root@{access['alias']}"]
