"""`testbed tty`: terminals in a VM, over IDC. May import typer, `testbed.control` and `idc.console`."""

from __future__ import annotations

from typing import Annotated

import typer

from testbed import registry
from testbed.cli_common import Json, VmName, out, print_json, table
from testbed.control import Control
from testbed.errors import SpecError


def tty(
    vm: VmName,
    terminal: Annotated[str, typer.Argument(metavar="[TERMINAL]", help="Name or number of one that is there; without "
                                            "it a new one is opened.", show_default=False)] = "",
    name: Annotated[str, typer.Option(metavar="NAME", help="What the new one is called.")] = "",
    list_: Annotated[bool, typer.Option("--list", "-l", help="List those that are there.")] = False,
    close: Annotated[bool, typer.Option("--close", help="Hang TERMINAL up: its program ends.")] = False,
    as_json: Json = False,
) -> None:
    """Use a terminal in a VM; Ctrl-] leaves it, and it goes on.

    Needs a testbed with a broker: a console device is attached to the VM the first time. A terminal that was left is
    found again by name or number, with what it put out last. Exits as its program does.
    """
    if sum((list_, close, bool(name))) > 1 or (terminal and (list_ or name)) or (close and not terminal):
        raise SpecError("one thing at a time", hint="[TERMINAL], --name NAME, --list, or --close TERMINAL")
    # Late: they bring the compiled core.
    from idc.console import client
    from idc.console import tty as person
    from idc.transport.address import open_port

    if not (list_ or close):
        person.check_terminal()
    entry, found = registry.find_vm(vm)
    with Control(entry) as link:
        address = f"unix:{link.call('tty', {'vm': found})['socket']}"
    if list_:
        if as_json:
            print_json(client.terminals(open_port(address), person.PATIENCE))
        else:
            table(person.HEADINGS, person.listed(address))
    elif close:
        client.hang_up(open_port(address), terminal, person.PATIENCE)
        out(f"terminal {terminal} of {found}: hung up")
    else:
        raise typer.Exit(person.use(address, terminal or None, name=name, where=f" of {found}"))
