"""`testbed demo`, `transfer`, `accel`: what needs no testbed that runs. May import typer, rich and `testbed`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import images
from testbed import accel as accelerators
from testbed import control, demo, registry, ship
from testbed.bed import Testbed
from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU, format_args, path_wiring, qemu_args
from testbed.transfer import Transferred

if TYPE_CHECKING:
    from collections.abc import Iterable

    from testbed.qemu_args import VmSpec

Accel = Annotated[str, typer.Option("--accel", metavar="auto|kvm|tcg", help="Accelerator; auto proves KVM first.")]
Qemu = Annotated[str, typer.Option("--qemu", metavar="PROGRAM", help="QEMU binary.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the QEMU commands, one option a line, and stop.")]


def _wish(text: str) -> accelerators.Wish:
    wishes: dict[str, accelerators.Wish] = {"auto": "auto", "kvm": "kvm", "tcg": "tcg"}
    if text not in wishes:
        raise typer.BadParameter(f"{text!r} is not auto, kvm or tcg", param_hint="--accel")
    return wishes[text]


def _out(text: str) -> None:
    sys.stdout.write(text + "\n")


def _print_commands(specs: Iterable[VmSpec]) -> None:
    for spec in specs:
        _out(format_args(qemu_args(spec, path_wiring(".", spec.name))))


def demo_command(
    file: Annotated[Path | None, typer.Argument(help="File to send; by default the Debian kernel package.")] = None,
    accel: Accel = "auto",
    qemu: Qemu = DEFAULT_QEMU,
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Boot two VMs, send a file both ways, measure.

    A real file goes between them through shared memory and over TCP, verified, and both are timed.
    """
    steps = Steps(quiet=quiet)
    if dry_run:
        with Testbed(accel=_wish(accel), qemu=qemu, notify=steps.say) as bed:
            _print_commands(demo.specs(bed, demo.file_to_send(file, bed)[1]))
        return
    report = demo.run(file, steps, accel=_wish(accel), qemu=qemu)
    if as_json:
        _out(report.as_json())
    else:
        demo.show(report, Console(highlight=False))


def transfer(
    file: Annotated[Path, typer.Argument(help="File of this machine to send.")],
    source: Annotated[str, typer.Option("--from", metavar="VM", help="Name of the VM that sends it.")],
    target: Annotated[str, typer.Option("--to", metavar="VM", help="Name of the VM that receives it.")],
    path: Annotated[str | None, typer.Option("--path", help="Where it lands in the receiving VM.")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Copy what was received to this file here.")] = None,
    tcp: Annotated[bool, typer.Option("--tcp", help="Over TCP instead of shared memory.")] = False,
    accel: Accel = "auto",
    qemu: Qemu = DEFAULT_QEMU,
    as_json: Json = False,
    quiet: Quiet = False,
    dry_run: DryRun = False,
) -> None:
    """Send a file between two running VMs, or two that are booted for it.

    VMs of a running testbed are used if both names are theirs and no --accel or --qemu asks for others. Those that are
    booted take a file of any size. The checksum is verified at both ends.
    """
    job = ship.Job(file, source, target, path=path, save=save, tcp=tcp)
    steps = Steps(quiet=quiet)
    pair = None if dry_run or accel != "auto" or qemu != DEFAULT_QEMU else registry.find_pair(source, target)
    if pair is not None:
        entry, first, second = pair
        job = dataclasses.replace(job, source=first, target=second)
        _print_transferred(_ship_within(entry, job, steps), as_json)
        return
    if dry_run:
        size = ship.check(job)
        with Testbed(accel=_wish(accel), qemu=qemu, notify=steps.say) as bed:
            _print_commands(ship.specs(bed, job, size, Path("scratch.raw")))
        return
    _print_transferred(ship.run(job, steps, accel=_wish(accel), qemu=qemu), as_json)


def _ship_within(entry: registry.Entry, job: ship.Job, steps: Steps) -> Transferred:
    """Have a running testbed do it; its process reads and writes the files, so it is told where they are."""
    steps.say(f"VMs of testbed {entry.name}")
    save = str(job.save.absolute()) if job.save else None
    request = {"file": str(job.file.absolute()), "source": job.source, "target": job.target, "path": job.path,
               "save": save, "tcp": job.tcp}
    with control.Control(entry) as link, steps.transfer(f"{job.source} -> {job.target}") as progress:

        def hear(reply: dict[str, Any]) -> None:
            if "say" in reply:
                steps.say(reply["say"])
            else:
                progress(reply["side"], reply["phase"], reply["done"], reply["size"])

        reply = link.call("transfer", request, hear=hear)
    return Transferred(**{key: value for key, value in reply.items() if key != "ok"})


def _print_transferred(done: Transferred, as_json: bool) -> None:
    if as_json:
        _out(json.dumps(dataclasses.asdict(done) | {"rate": done.rate}, indent=2))
    else:
        _out(f"{done.name}: {done.size} bytes from {done.source} to {done.target} over {done.path} in "
             f"{done.seconds:.3f} s ({done.rate / 1e6:.1f} MB/s, {done.accel}), SHA-256 {done.sha256}")


def accel(
    wish: Annotated[str, typer.Argument(metavar="[auto|kvm|tcg]")] = "auto",
    qemu: Qemu = DEFAULT_QEMU,
    as_json: Json = False,
) -> None:
    """Prove which accelerator works here, and why.

    A guest is booted with it.
    """
    verdict = accelerators.choose(_wish(wish), images.ensure(progress=Steps().say).kernel, qemu=qemu)
    _out(json.dumps(dataclasses.asdict(verdict), indent=2) if as_json else str(verdict))
