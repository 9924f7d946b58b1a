"""`testbed bench`: measurements, one command for each. May import typer, rich and `testbed`."""

from __future__ import annotations

import json
import sys
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from testbed import bench_boot
from testbed.accel import Wish
from testbed.bed import Testbed
from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU

app = typer.Typer(help="Measure; every result names the accelerator it ran under.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Measure; every result names the accelerator it ran under."""


@app.command("boot")
def boot(
    samples: Annotated[int, typer.Option(min=1, help="Clones to time.")] = 20,
    cold: Annotated[int, typer.Option(min=1, help="Cold boots to time.")] = 3,
    memory: Annotated[int, typer.Option(min=64, help="Guest memory in MiB.")] = 256,
    accel: Annotated[str, typer.Option("--accel", metavar="auto|kvm|tcg", help="Accelerator.")] = "auto",
    qemu: Annotated[str, typer.Option("--qemu", metavar="PROGRAM", help="QEMU binary.")] = DEFAULT_QEMU,
    as_json: Annotated[bool, typer.Option("--json", help="Print all samples as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Time cold boots and clones, and weigh an idle clone."""
    if accel not in get_args(Wish):
        raise typer.BadParameter(f"{accel!r} is not auto, kvm or tcg", param_hint="--accel")
    steps = Steps(quiet=quiet)
    with Testbed(accel=cast("Wish", accel), qemu=qemu, notify=steps.say) as bed:
        rows = bench_boot.measure(bed, samples=samples, cold=cold, memory_mib=memory, say=steps.say)
        verdict = bed.verdict
    if as_json:
        found = [{"name": row.name, "unit": row.unit, "note": row.note, "samples": row.samples,
                  "p50": row.percentile(50), "p90": row.percentile(90), "max": max(row.samples)} for row in rows]
        json.dump({"accel": verdict.accel, "reason": verdict.reason, "rows": found}, sys.stdout, indent=1)
        sys.stdout.write("\n")
        return
    table = Table("what", "unit", "p50", "p90", "max", "samples", box=None, padding=(0, 2, 0, 0))
    for row in rows:
        figures = (row.percentile(50), row.percentile(90), max(row.samples))
        table.add_row(row.name, row.unit, *(f"{value:.3f}" if row.unit == "s" else f"{value:.1f}" for value in figures),
                      str(len(row.samples)))
    console = Console(highlight=False)
    console.print(table)
    for row in rows:
        console.print(f"{row.name}: {row.note}")
    console.print(f"accelerator: {verdict}")
