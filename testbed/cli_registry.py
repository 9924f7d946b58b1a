"""`testbed registry`: the keys of a running testbed, as the host sees them. May import typer and `idc`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from idc.registry import Event, Registry
from idc.transport.address import open_port
from testbed import registry as testbeds
from testbed.cli_common import Json, complete_testbed, out, print_json, table
from testbed.control import Control
from testbed.errors import SpecError
from testbed.hints import BROKER_HINT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.registry import Permissions

app = typer.Typer(help="Keys of a running testbed: what domains publish, and find each other by.",
                  no_args_is_help=True)

Path = Annotated[str, typer.Argument(metavar="PATH", help="As /domain/front/state.")]
Bed = Annotated[str, typer.Option("--testbed", "-t", metavar="TESTBED", autocompletion=complete_testbed,
                                  help="Which, if several run.")]


def _open(bed: str) -> Registry:
    entry = testbeds.find(bed)
    with Control(entry) as link:
        address = link.call("status").get("registry")
    if not address:
        raise SpecError(f"testbed {entry.name!r} has no registry", hint=BROKER_HINT)
    return Registry(open_port(address))


def _shown(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _access(permissions: Permissions) -> str:
    """As "front: back read, others nothing"."""
    named = [f"{name} {_words(permit)}" for name, permit in permissions.named]
    return f"{permissions.owner}: " + ", ".join([*named, f"others {_words(permissions.default)}"])


def _words(permit: int) -> str:
    return ("nothing", "read", "write", "both")[permit]


def _walk(registry: Registry, path: str, *, deep: bool) -> Iterator[str]:
    for name in registry.list(path):
        below = f"{path.rstrip('/')}/{name}"
        yield below
        if deep:
            yield from _walk(registry, below, deep=True)


@app.command()
def ls(
    path: Path = "/",
    bed: Bed = "",
    recursive: Annotated[bool, typer.Option("--recursive", "-r", help="All below, not only right below.")] = False,
    as_json: Json = False,
) -> None:
    """List nodes with values and permissions."""
    with _open(bed) as registry:
        rows: list[dict[str, Any]] = []
        for where in _walk(registry, path, deep=recursive):
            value = registry.get(where)
            if value is not None:  # removed since it was listed
                rows.append({"path": where, "value": _shown(value), "access": _access(registry.permissions(where))})
    if as_json:
        print_json(rows)
    else:
        table(("PATH", "VALUE", "OWNER: ACCESS"), [tuple(row.values()) for row in rows])


@app.command()
def get(path: Path, bed: Bed = "") -> None:
    """Print a node's value."""
    with _open(bed) as registry:
        out(_shown(registry.read(path)))


@app.command("set")
def set_(path: Path, value: Annotated[str, typer.Argument(metavar="VALUE")], bed: Bed = "") -> None:
    """Write a node's value; it is made if it is not there."""
    with _open(bed) as registry:
        registry.write(path, value)


@app.command()
def rm(path: Path, bed: Bed = "") -> None:
    """Remove a node and all below it."""
    with _open(bed) as registry:
        registry.rm(path)


@app.command()
def watch(
    path: Path = "/",
    bed: Bed = "",
    count: Annotated[int, typer.Option("--count", "-n", min=0, help="End after so many lines; 0: never.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object in each line.")] = False,
) -> None:
    """Print a line at once and whenever something changes at or below a path: where, and how many changes.

    Changes that come faster than they are told are told in one line, which names what they have in common.
    """
    with _open(bed) as registry:
        seen: list[Event] = []
        registry.watch(path, seen.append)
        shown = 0
        while not count or shown < count:
            registry.pump(1.0)
            while seen and (not count or shown < count):
                event = seen.pop(0)
                shown += 1
                out(json.dumps(event._asdict()) if as_json else f"{event.path} {event.changes}")
