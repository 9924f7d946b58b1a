"""`testbed up`, `down`, `ps`, `config`: testbeds as a whole. May import typer, `testbed.control` and
`testbed.topology`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from testbed import control, registry
from testbed.cli_common import Json, Quiet, complete_testbed, hear, out, print_json, table
from testbed.errors import TestbedError

if TYPE_CHECKING:
    from testbed.topology import Topology

config = typer.Typer(help="Show a topology as it is understood.", no_args_is_help=True)

File = Annotated[Path | None, typer.Argument(metavar="[TOPOLOGY.toml]", show_default=False,
                                             readable=False,  # said by `load`, in one line
                                             help="Without one: VMs front and back, and a link.")]


def _topology(file: Path | None, **overrides: str | None) -> Topology:
    from testbed.topology import load, pair, parse, resolve  # late: pydantic takes longer to load than `ps` to run

    topology = pair() if file is None else load(file)
    given = {key: value for key, value in overrides.items() if value is not None}
    if given:  # parsed again, so that an option is checked as the file's key is
        topology = parse(topology.model_dump() | given, source="command line")
    return resolve(topology, source=str(file or "topology"))


def up(
    file: File = None,
    name: Annotated[str | None, typer.Option(help="Name; by default the file's.")] = None,
    accel: Annotated[str | None, typer.Option(metavar="auto|kvm|tcg", help="Accelerator.")] = None,
    qemu: Annotated[str | None, typer.Option(metavar="PROGRAM", help="QEMU binary.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="failed|always|never", help="When logs stay.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start a testbed; returns when all its VMs are ready."""
    topology = _topology(file, name=name, accel=accel, qemu=qemu, keep=keep)
    began = time.monotonic()
    try:
        status = control.start(topology, hear(quiet or as_json))
    except control.Refused as error:
        for line in error.console:
            sys.stderr.write(f"  | {line}\n")
        raise
    if as_json:
        print_json({key: value for key, value in status.items() if key != "ok"})
    elif not quiet:
        out(f"testbed {status['name']}: {len(status['vms'])} VMs ready in {time.monotonic() - began:.1f} s "
            f"({', '.join(vm['name'] for vm in status['vms'])}); logs in {status['directory']}")


def down(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", autocompletion=complete_testbed)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Kill its process; what it started is ended too.")] = False,
    quiet: Quiet = False,
) -> None:
    """End a testbed (the only one, if none is named)."""
    entries = registry.running() if everything else [registry.find(name) for name in names or [""]]
    failures: list[TestbedError] = []
    for entry in entries:
        try:
            ended = control.down(entry, force=force)
        except TestbedError as error:  # the others are ended all the same
            failures.append(error)
            continue
        if not quiet:
            out(f"testbed {ended.name}: ended" + (f"; logs are kept in {ended.kept}" if ended.kept else ""))
    for failure in failures[1:]:
        sys.stderr.write(f"error: {control.one_line(failure)}\n")
    if failures:
        raise failures[0]


def ps(as_json: Json = False) -> None:
    """List testbeds with their VMs, regions and networks."""
    beds = [_status(entry) for entry in registry.running()]
    if as_json:
        print_json(beds)
        return
    rows: list[tuple[str, ...]] = []
    regions: list[tuple[str, ...]] = []
    dead: list[str] = []
    for bed in beds:
        if "error" in bed:
            rows.append((bed["name"], "", bed["error"], str(bed["pid"]), "", "", ""))
            continue
        age = _age(time.time() - bed["started"])
        rows += [(bed["name"], vm["name"], vm["state"], str(vm["pid"]), bed["accel"], age, f"{vm['memory_mib']}M")
                 for vm in bed["vms"]]
        regions += [(bed["name"], region["name"], f"{region['size'] >> 10}K",
                     ", ".join(map(_member, region["members"])) + (" (a trusted set)" if region["trusted_set"] else ""))
                    for region in bed["regions"]]
        dead += [f"{bed['name']}: VM {vm['name']} holds {len(vm['dead_mappings'])} of at most {vm['dead_cap']} dead "
                 f"mappings: {', '.join(vm['dead_mappings'])}" for vm in bed["vms"] if vm["dead_mappings"]]
        regions += [(bed["name"], net["name"], net["kind"], ", ".join(net["addresses"])) for net in bed["networks"]]
    table(("TESTBED", "VM", "STATE", "PID", "ACCEL", "UP", "MEMORY"), rows)
    if regions:
        out("")
        table(("TESTBED", "REGION/NETWORK", "SIZE/KIND", "MEMBERS"), regions)
    if dead:
        out("\n" + "\n".join(dead))


def _status(entry: registry.Entry) -> dict[str, Any]:
    """A testbed's own word, or why there is none: one that hangs must not hide the others."""
    try:
        with control.Control(entry) as link:
            link.sock.settimeout(10)
            return {key: value for key, value in link.call("status").items() if key != "ok"}
    except (TestbedError, TimeoutError) as error:
        return {"name": entry.name, "pid": entry.pid, "directory": entry.directory, "started": entry.started,
                "error": "does not answer" if isinstance(error, TimeoutError) else control.one_line(error)}


def _member(member: dict[str, Any]) -> str:
    # a read-only member has no connection to the region's server, so being plugged is all there is to know of it
    here = member["present"] if member["rights"] == "rw" else member["plugged"]
    return f"{member['name']} {member['rights']}{'' if here else ' (absent)'}"


def _age(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


@config.command()
def show(
    file: File = None,
    resolved: Annotated[bool, typer.Option("--resolved", help="With defaults; links and buses as regions.")] = False,
    as_json: Json = False,
) -> None:
    """Check a topology and print it."""
    from testbed.topology import load, pair, resolve

    topology = pair() if file is None else load(file)
    checked = resolve(topology, source=str(file or "topology"))
    chosen = checked if resolved else topology
    if as_json:
        print_json(chosen.model_dump(mode="json", exclude_none=True, exclude_unset=not resolved))
    else:
        out(chosen.as_toml(everything=resolved).rstrip())
