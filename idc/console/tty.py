"""A person's terminal joined to one of another domain: raw, its size carried along, Ctrl-] leaves it.

    python3 -m idc.console.tty [--device PATH] [--name NAME] [--list | --close TERMINAL] [TERMINAL]

is for a VM that is the front end of a console device; on the host `testbed tty` does the same. Without TERMINAL a new
one is opened. Depends on idc.console.client and screen.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Final

from idc.console.client import Attachment, hang_up, terminals
from idc.console.protocol import ConsoleError, Size
from idc.console.screen import ESCAPE, raw_terminal, write_all
from idc.errors import IdcError
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

#: Seconds for the device to answer: the first time a program starts in an emulated guest.
PATIENCE: Final = 120.0
#: Questions to a terminal, which it would answer as if somebody typed: not to be asked again by what was kept.
_QUESTION: Final = re.compile(rb"\x1b\[[0-9;?>=]*[nc]|\x1b\[[?>]?[0-9;]*\$p|\x05")


class NoTerminalError(IdcError):
    """Standard input or output is no terminal."""


def own_size() -> Size:
    """Of the window of standard output. Raises ConsoleError if it has none, or an absurd one."""
    columns, rows = os.get_terminal_size(1)
    if (rows, columns) == (0, 0):  # a serial line does not know
        return Size()
    size = Size(rows, columns)
    size.check()
    return size


def check_terminal() -> None:
    """Raise NoTerminalError unless a person sits here."""
    for fd, what in ((0, "standard input"), (1, "standard output")):
        if not os.isatty(fd):
            raise NoTerminalError(f"{what} is no terminal; to run a command without one: testbed exec")


def converse(attachment: Attachment) -> None:
    """Join this process's terminal to an attachment until Ctrl-], or until that is over. Raises OSError."""
    with raw_terminal(), _resized() as resized:
        held = b""
        while True:
            held += attachment.take()
            if held and (attachment.position >= attachment.replay or attachment.over):
                if attachment.position - len(held) < attachment.replay:
                    kept = len(held) - (attachment.position - attachment.replay)
                    held = _QUESTION.sub(b"", held[:kept]) + held[kept:]
                write_all(held)
                held = b""
            if attachment.over:
                return
            if attachment.pump():
                continue
            # What the other side does not take in time waits in the kernel, a Ctrl-] behind it too.
            ready = attachment.sleep(1.0, resized, *(() if attachment.full else (0,)))
            if resized in ready:
                os.read(resized, 64)
                with contextlib.suppress(ConsoleError):  # a window that is being dragged is for a moment any size
                    attachment.resize(own_size())
            if 0 in ready:
                typed = os.read(0, 4096)
                text, escape, _ = typed.partition(ESCAPE)
                attachment.write(text)
                if escape or not typed:
                    return


@contextlib.contextmanager
def _resized() -> Iterator[int]:
    """A descriptor that is readable once the window has another size."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def changed(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been said often enough
            os.write(write, b"w")

    before = signal.signal(signal.SIGWINCH, changed)
    try:
        yield read
    finally:
        signal.signal(signal.SIGWINCH, before)
        os.close(read)
        os.close(write)


def use(address: str, terminal: str | None, *, name: str = "", where: str = "") -> int:
    """Attach this process's terminal, and say on standard error how it ended. The exit code.

    Args:
        address: of the device's socket.
        terminal: name or number; None opens a new one.
        name: of the new one.
        where: whose terminals they are, for what is said.

    Raises:
        NoTerminalError: this process has none.
        ConsoleError: the device refuses.
        TimedOutError: it does not answer.
    """
    check_terminal()
    attachment = Attachment(open_port(address), terminal, name=name, term=os.environ.get("TERM") or "dumb",
                            size=own_size())
    try:
        attachment.attach(PATIENCE)
        called = f"terminal {attachment.number}{where}"
        sys.stderr.write(f"{called}; Ctrl-] leaves it\n")
        converse(attachment)
    finally:
        attachment.close()
    if attachment.error is not None:
        raise attachment.error
    lost = f"; {attachment.lost} bytes of its output were not kept" if attachment.lost else ""
    if attachment.code is None:
        sys.stderr.write(f"\n{called}: left, and goes on{lost}\n")
        return 0
    sys.stderr.write(f"\n{called}: ended with {_how(attachment.code)}{lost}\n")
    return attachment.code if attachment.code >= 0 else 128 - attachment.code


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}"


def listed(address: str) -> list[tuple[str, ...]]:
    """A row for each terminal: number, name, size, how many are attached, state, command. Raises as `terminals`."""
    return [(str(each["number"]), each["name"], f"{each['columns']}x{each['rows']}", str(each["attached"]),
             "runs" if each["code"] is None else f"ended with {_how(each['code'])}", each["command"])
            for each in terminals(open_port(address))]


#: Headings of `listed`.
HEADINGS: Final = ("TERMINAL", "NAME", "SIZE", "ATTACHED", "STATE", "COMMAND")


def main() -> int:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="idc.console.tty", description="terminals of another domain")
    parser.add_argument("terminal", nargs="?", metavar="TERMINAL", help="name or number; without it a new one")
    parser.add_argument("--device", default="/run/idc/console-0", metavar="PATH", help="socket of the device")
    parser.add_argument("--name", default="", help="of the new one")
    parser.add_argument("--list", action="store_true", help="list those that are there")
    parser.add_argument("--close", default="", metavar="TERMINAL", help="hang one up")
    args = parser.parse_args()
    address = f"unix:{args.device}"
    try:
        if args.list:
            for row in (HEADINGS, *listed(address)):
                sys.stdout.write("\t".join(row) + "\n")
        elif args.close:
            hang_up(open_port(address), args.close)
        else:
            return use(address, args.terminal, name=args.name)
    except (IdcError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
