"""`testbed attach`, `detach`, `devices`. May import typer, `testbed.control` and `testbed.registry`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from testbed import registry
from testbed.cli_common import Json, Quiet, complete_testbed, hear, out, print_json, table
from testbed.control import Control
from testbed.errors import SpecError

Class = Annotated[str, typer.Argument(metavar="CLASS", help="Device class, as `testbed devices --classes` lists them.")]
Bed = Annotated[str, typer.Option("--testbed", "-t", metavar="TESTBED", autocompletion=complete_testbed,
                                  help="Which, if several run.")]
Front = Annotated[str, typer.Option("--frontend", metavar="DOMAIN", help="VM or process of the front end.")]
Number = Annotated[str, typer.Option("--number", metavar="N", help="Tells devices of one class and front end apart.")]
Wait = Annotated[float, typer.Option("--wait", metavar="SECONDS", min=0.0, help="For both ends.")]


def attach(
    kind: Class,
    frontend: Front,
    backend: Annotated[str, typer.Option("--backend", metavar="DOMAIN", help="VM or process of the back end.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="[OPTION=VALUE]...", show_default=False)] = None,
    number: Number = "",
    wait: Wait = 30.0,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Leave it to the ends when they meet.")] = False,
    bed: Bed = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Attach a device to running domains; returns once it is connected, or leaves nothing behind."""
    given: dict[str, str] = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise SpecError(f"{option!r} is no option", hint="write NAME=VALUE")
        if name in given:
            raise SpecError(f"option {name!r} is given twice")
        given[name] = value
    request = {"class": kind, "frontend": frontend, "backend": backend, "options": given, "number": number,
               "wait": None if no_wait else wait}
    with Control(registry.find(bed)) as link:
        device = link.call("attach", request, hear=hear(quiet or as_json))["device"]
    if as_json:
        print_json(device)
    elif not quiet:
        out(f"{device['class']}-{device['number']} of {device['frontend']}: region {device['region']}, "
            + ", ".join(f"{role} end in {device[role + 'end']} {_state(device, role)}" for role in ("front", "back")))


def detach(
    kind: Class,
    frontend: Front,
    number: Number = "",
    wait: Wait = 30.0,
    keep_link: Annotated[bool, typer.Option("--keep-link", help="Leave its region plugged for the next device of the "
                                            "two domains, which is there sooner.")] = False,
    force: Annotated[bool, typer.Option("--force", help="After the wait, though an end has not closed.")] = False,
    bed: Bed = "",
    quiet: Quiet = False,
) -> None:
    """Detach a device: both ends close."""
    request = {"class": kind, "frontend": frontend, "number": number, "wait": wait, "keep_link": keep_link,
               "force": force}
    with Control(registry.find(bed)) as link:
        done = link.call("detach", request)
    if not quiet:
        kept = "".join(f"; {domain} has not let go of its region, which is dead and takes a port until it does"
                       for domain in done["kept"])
        out(f"{done['device']}: detached{kept}")


def devices(
    bed: Bed = "",
    classes: Annotated[bool, typer.Option("--classes", help="List the classes there are, with options.")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="The last steps of both ends.")] = False,
    as_json: Json = False,
) -> None:
    """List devices: both ends' state, since when and why."""
    if classes:
        _list_classes(as_json)
        return
    with Control(registry.find(bed)) as link:
        found = link.call("devices")["devices"]
    if as_json:
        print_json(found)
        return
    rows = []
    for device in found:
        for role in ("front", "back"):
            history = device["ends"][role] or [{"state": "closed", "since": None, "why": "no drivers run there"}]
            rows += [(f"{device['class']}-{device['number']}", role, device[f"{role}end"], step["state"],
                      _time(step["since"]), step["why"], device["region"])
                     for step in (history if steps else history[:1])]
    table(("DEVICE", "END", "DOMAIN", "STATE", "SINCE", "WHY", "REGION"), rows)


def _list_classes(as_json: bool) -> None:
    from idc.device import load  # late: brings the compiled core

    found = load()
    if as_json:
        print_json({name: {option: {"default": declared.default, "help": declared.help}
                           for option, declared in kind.options.items()} for name, kind in found.items()})
        return
    rows = []
    for name, kind in found.items():
        rows.append((name, "", "", (kind.__doc__ or "").strip().partition("\n")[0]))
        rows += [("", option, str(declared.default), declared.help) for option, declared in kind.options.items()]
    table(("CLASS", "OPTION", "DEFAULT", "WHAT IT IS"), rows)


def _state(device: dict[str, Any], role: str) -> str:
    steps = device["ends"][role]
    return str(steps[0]["state"]) if steps else "closed"


def _time(since: float | None) -> str:
    return "" if since is None else time.strftime("%H:%M:%S", time.localtime(since)) + f".{int(since * 1000) % 1000:03}"
