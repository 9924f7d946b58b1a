"""`testbed snapshot`: list, build, prune the templates that VMs are cloned from. May import typer and `testbed`."""

from __future__ import annotations

import dataclasses
import json
import sys
from datetime import UTC, datetime
from typing import Annotated, cast, get_args

import typer

from testbed.accel import Wish
from testbed.bed import Testbed
from testbed.qemu_args import DEFAULT_QEMU
from testbed.template import NAME, Store
from testbed.template_build import obtain

app = typer.Typer(help="Warm templates that VMs are cloned from.", no_args_is_help=True)

_MIB = 1 << 20
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _say(text: str) -> None:
    typer.echo(f"snapshot: {text}", err=True)


def _print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=1, default=str)
    sys.stdout.write("\n")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the templates, the one used last first; says of each whether its files are sound."""
    found = Store().stored()
    if as_json:
        _print_json([dataclasses.asdict(stored) for stored in found])
        return
    for stored in found:
        used = datetime.fromtimestamp(stored.used, UTC).astimezone()
        typer.echo(f"{stored.key}  {stored.manifest.get('shape', '?')}  {stored.bytes / _MIB:.0f} MiB on disk  "
                   f"used {used:%Y-%m-%d %H:%M}  {stored.problem or 'sound'}")


@app.command()
def build(
    memory: Annotated[int, typer.Option(min=64, help="Guest memory in MiB.")] = 256,
    cpus: Annotated[int, typer.Option(min=1, help="Guest CPUs.")] = 1,
    accel: Annotated[str, typer.Option("--accel", metavar="auto|kvm|tcg", help="Accelerator.")] = "auto",
    qemu: Annotated[str, typer.Option("--qemu", metavar="PROGRAM", help="QEMU binary.")] = DEFAULT_QEMU,
    as_json: Json = False,
) -> None:
    """Build the template for such VMs if there is none that fits, and print where it is. Done by itself when needed."""
    if accel not in get_args(Wish):
        raise typer.BadParameter(f"{accel!r} is not auto, kvm or tcg", param_hint="--accel")
    with Testbed(accel=cast("Wish", accel), qemu=qemu, notify=_say) as bed:
        spec = bed.spec(NAME, memory_mib=memory, cpus=cpus)
        with obtain(spec, notify=_say) as template:
            if as_json:
                _print_json({"directory": template.directory, **template.manifest})
            else:
                typer.echo(template.directory)


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=0, help="How many templates to keep: those used last.")] = 0,
    as_json: Json = False,
) -> None:
    """Remove templates. VMs that were cloned from them run on."""
    removed = Store().prune(keep=keep)
    if as_json:
        _print_json([dataclasses.asdict(stored) for stored in removed])
        return
    typer.echo(f"removed {len(removed)} templates, freed {sum(stored.bytes for stored in removed) / _MIB:.0f} MiB")
