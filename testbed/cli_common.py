"""What the commands share: options, output, completion of names. May import typer, rich and `testbed.registry`."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from testbed import registry
from testbed.errors import RunError, SpecError

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]


class Ended(BaseException):
    """A signal asks for the end. Not KeyboardInterrupt: typer would make that an exit of its own, without a word."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def out(text: str) -> None:
    """One line, or several, of what was asked for."""
    sys.stdout.write(text + "\n")


def print_json(value: object) -> None:
    """Indented JSON."""
    out(json.dumps(value, indent=2))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns, as wide as they need be: no border, nothing cut when the output is no terminal."""
    grid = Table(box=None, pad_edge=False, header_style="")
    for heading in headings:
        grid.add_column(heading, overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 1000
    with console.capture() as captured:
        console.print(grid)
    out("\n".join(line.rstrip() for line in captured.get().splitlines()))


def hear(quiet: bool) -> Callable[[dict[str, Any]], None]:
    """Shows what a testbed says while it is at it, on standard error."""

    def show(reply: dict[str, Any]) -> None:
        if "say" in reply and not quiet:
            sys.stderr.write(f"{reply['say']}\n")
            sys.stderr.flush()

    return show


def _entries() -> list[registry.Entry]:
    try:
        return registry.running()
    except (OSError, RunError):  # a shell that completes a word has no place for an error
        return []


def complete_testbed() -> list[str]:
    """Names of running testbeds, for the shell."""
    return [entry.name for entry in _entries()]


def complete_vm() -> list[str]:
    """Names of running VMs, for the shell; with their testbed's where there are several."""
    entries = _entries()
    if len(entries) == 1:
        return list(entries[0].vms)
    return [f"{entry.name}/{vm}" for entry in entries for vm in entry.vms]


def complete_run() -> list[str]:
    """Numbers of the runs that were kept, for the shell, the newest first."""
    from testbed.bench.errors import StoreError
    from testbed.bench.store import Store

    try:
        with Store(make=False) as store:
            return ["latest", *(str(number) for number in reversed(store.runs()))]
    except StoreError:
        return []


def write_whole(file: Path, text: str) -> None:
    """Whole or not at all: an earlier file of that name stays until the new one is complete."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as staged:
        try:
            staged.write(text)
            staged.close()
            Path(staged.name).chmod(0o644)
            Path(staged.name).replace(file)
        except BaseException:
            Path(staged.name).unlink(missing_ok=True)
            raise


def check_writable(option: str, file: Path) -> None:
    """Before minutes are spent. Raises SpecError: `file` could not be made."""
    if file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK):
        raise SpecError(f"{option} {file}: {'it is a directory' if file.is_dir() else file.parent}"
                        + ("" if file.is_dir() else " is no directory that this user may write in"))


VmName = Annotated[str, typer.Argument(metavar="VM", help="VM, or TESTBED/VM.", autocompletion=complete_vm)]
