"""The `testbed` command. Parses, calls the library, prints; decides nothing itself.

Every error a user can cause or meet ends as one message and exit code 1 (2 for wrong usage, 128 + n for signal n, so
130 for Ctrl-C). Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import importlib
import io
import signal
import sys
from typing import TYPE_CHECKING, Final

import typer

import images
from host.errors import HostError
from idc.errors import IdcError
from testbed import control
from testbed.cli_common import Ended
from testbed.errors import TestbedError, VmError

if TYPE_CHECKING:
    from types import FrameType

#: Where each command is.
_COMMANDS: Final = {
    "config": "cli_up:config",
    "image": "cli_image:app",
    "snapshot": "cli_snapshot:app",
    "registry": "cli_registry:app",
    "results": "cli_results:app",
    "up": "cli_up:up",
    "down": "cli_up:down",
    "ps": "cli_up:ps",
    "exec": "cli_vm:exec_",
    "cp": "cli_vm:cp",
    "logs": "cli_vm:logs",
    "console": "cli_vm:console",
    "tty": "cli_tty:tty",
    "ssh": "cli_vm:ssh",
    "ssh-proxy": "cli_vm:ssh_proxy",
    "plug": "cli_vm:plug",
    "unplug": "cli_vm:unplug",
    "attach": "cli_devices:attach",
    "detach": "cli_devices:detach",
    "devices": "cli_devices:devices",
    "top": "cli_top:top",
    "metrics": "cli_top:metrics",
    "doctor": "cli_look:doctor",
    "dump": "cli_look:dump",
    "bundle": "cli_look:bundle",
    "bench": "cli_bench:bench",
    "report": "cli_report:report",
    "trace": "cli_trace:trace",
    "demo": "cli_transfer:demo_command",
    "transfer": "cli_transfer:transfer",
    "accel": "cli_transfer:accel",
}
#: For other programs, and one question of those that doctor answers.
_HIDDEN: Final = frozenset({"ssh-proxy", "accel"})
#: The rest of whose line belongs to another program.
_PASSING_ON: Final = frozenset({"exec", "ssh"})
_REST: Final = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def _root() -> None:
    """There are no options before a command."""


def build(word: str = "") -> typer.Typer:
    """The whole command, or as much of it as a command line needs that begins with `word`: to load all of it takes
    almost three times as long as `testbed ps` does.
    """
    app = typer.Typer(help="Virtual machines that talk through shared memory: boot, transfer, measure.",
                      no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                      context_settings={"help_option_names": ["-h", "--help"]})
    app.callback()(_root)
    for name in (word,) if word in _COMMANDS else _COMMANDS:
        module, _, attribute = _COMMANDS[name].partition(":")
        found = getattr(importlib.import_module(f"testbed.{module}"), attribute)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=name)
        else:
            app.command(name, hidden=name in _HIDDEN, context_settings=_REST if name in _PASSING_ON else None)(found)
    return app


def _ended(number: int, _frame: FrameType | None) -> None:
    """SIGINT, SIGTERM and SIGHUP all end the command through the context managers that clean up."""
    raise Ended(number)


def _fail(text: str, code: int = 1) -> SystemExit:
    sys.stderr.write(text + "\n")
    return SystemExit(code)


def main() -> None:
    """Entry point of the `testbed` command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or the background of a script
            signal.signal(number, _ended)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold bytes that are no text
            stream.reconfigure(errors="backslashreplace")
    try:
        build(*sys.argv[1:2])()
    except (TestbedError, images.ImageError, HostError, IdcError) as error:
        # A VM's own error has the console's last lines; every other fits one line.
        raise _fail(f"error: {error if isinstance(error, VmError) else control.one_line(error)}") from None
    except OSError as error:  # of this machine: a full disk, a directory that may not be written
        raise _fail(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}") from None
    except Ended as ended:
        raise _fail(f"interrupted ({ended}); everything that was started is ended", ended.exit_code) from None


if __name__ == "__main__":
    main()
