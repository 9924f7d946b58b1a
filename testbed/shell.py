"""A person at a VM's serial console, from a program: joins this process's terminal to it.

Depends on `testbed.terminal`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

from testbed.terminal import converse

if TYPE_CHECKING:
    from testbed.console import Console


def interact(console: Console) -> None:
    """Type and read on the console until Ctrl-], the VM's end or end of input. What is typed reaches a root shell.

    For people who stop in the middle of a test (`pytest -s`); programs use `Vm.execute`.
    """
    near, far = socket.socketpair()

    def sink(data: bytes) -> None:
        # a terminal too slow for the console misses some of it; the log has all
        with contextlib.suppress(OSError):
            far.send(data, socket.MSG_DONTWAIT)

    def typed() -> None:
        while data := far.recv(4096):
            console.send(data)

    thread = threading.Thread(target=typed, name="shell", daemon=True)
    with near, far, console.shown(sink):
        thread.start()
        console.send(b"\n")  # the shell is started when somebody presses Enter
        converse(near)
        near.shutdown(socket.SHUT_RDWR)
        thread.join()
