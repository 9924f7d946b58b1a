"""`testbed trace`: merge what domains logged into one file for Perfetto. May import typer and `testbed.trace`."""

from __future__ import annotations

import dataclasses
import os
import shlex
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from idc.trace.store import DIRECTORY, SUFFIX
from testbed import registry
from testbed.cli_common import Json, Quiet, complete_vm, out, print_json, table
from testbed.control import Control
from testbed.errors import SpecError
from testbed.trace.merge import Report, merge


def trace(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where the merged trace goes; open it "
                                         "with ui.perfetto.dev.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[FILE]...", help="Traces of this machine; by "
                                                       "default those of running VMs.", show_default=False)] = None,
    vms: Annotated[list[str] | None, typer.Option("--vm", metavar="VM", help="Fetch from this VM; may be repeated.",
                                                  autocompletion=complete_vm, show_default=False)] = None,
    directory: Annotated[str, typer.Option(metavar="DIR", help="Where the VMs have them.")] = DIRECTORY,
    clock: Annotated[str, typer.Option(metavar="DOMAIN", help="On whose clock; by default that of the domain which "
                                       "recorded most.", show_default=False)] = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge the traces of all domains on one clock.

    Says for each domain within which bound its times are, what was dropped and what a crash cut off.
    """
    if files and vms:
        raise SpecError("files are given, and --vm too", hint="one of the two")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK | os.X_OK):
        raise SpecError(f"-o {output}: {output.parent} is no directory that this user may write in")
    if files:
        report = merge(files, output, reference=clock)
    else:
        with tempfile.TemporaryDirectory(prefix="idc-trace-") as fetched:
            report = merge(_fetch(_chosen(vms), directory, Path(fetched)), output, reference=clock)
    if as_json:
        print_json(dataclasses.asdict(report) | {"output": str(output)})
    elif not quiet:
        _show(report, output)


def _chosen(vms: list[str] | None) -> list[tuple[registry.Entry, str]]:
    if vms:
        return [registry.find_vm(name) for name in vms]
    entry = registry.find("")
    return [(entry, vm) for vm in entry.vms]


def _fetch(vms: list[tuple[registry.Entry, str]], directory: str, into: Path) -> list[Path]:
    """All traces of these VMs, as files here."""
    found: list[Path] = []
    for entry, vm in vms:
        with Control(entry) as link:
            for path in _listed(link, vm, directory):
                landing = into / f"{vm}-{len(found)}{SUFFIX}"
                link.call("pull", {"vm": vm, "source": path, "target": str(landing)})
                found.append(landing)
    if not found:
        raise SpecError(f"there are no traces in {directory} of {', '.join(vm for _, vm in vms)}",
                        hint="testbed attach trace, or --directory")
    return found


def _listed(link: Control, vm: str, directory: str) -> list[str]:
    with tempfile.TemporaryFile() as output, open(os.devnull, "wb") as nothing:
        script = f"find {shlex.quote(directory)} -maxdepth 1 -type f -name '*{SUFFIX}' -print0 2>/dev/null; true"
        request: dict[str, Any] = {"vm": vm, "argv": ["/bin/sh", "-c", script], "cwd": None, "env": {}, "stdin": False}
        link.call("exec", request, fds=[output.fileno(), nothing.fileno()])
        output.seek(0)
        return sorted(path.decode("utf-8", "surrogateescape") for path in output.read().split(b"\0") if path)


def _show(report: Report, output: Path) -> None:
    rows = [(each.name, str(each.events), "0" if each.name == report.reference else
             f"{_ns(each.best)} to {_ns(each.worst)}", str(each.dropped), str(each.missing), str(each.unread),
             "; ".join(dict.fromkeys(end or "still written, or cut off" for end in (*each.ended, *each.broken))))
            for each in report.domains]
    table(("DOMAIN", "EVENTS", "CLOCK WITHIN", "DROPPED", "MISSING", "BYTES CUT OFF", "ENDED"), rows)
    out(f"{output}: {report.seconds:.3f} s on the clock of {report.reference}, {report.arrows} arrows, "
        f"{report.across} of them between domains")


def _ns(value: int) -> str:
    if value < 10_000:
        return f"{value} ns"
    return f"{value / 1e3:.1f} us" if value < 10_000_000 else f"{value / 1e6:.1f} ms"
