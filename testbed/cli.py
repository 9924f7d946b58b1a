"""The `testbed` command. Parses, calls the library, prints; decides nothing itself.

Every error a user can cause or meet ends as one message and exit code 1 (2 for wrong usage, 128 + n for signal n, so
130 for Ctrl-C). Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import images
from host.errors import HostError
from idc.errors import IdcError
from testbed import accel as accelerators
from testbed import (
    cli_bench,
    cli_devices,
    cli_image,
    cli_look,
    cli_registry,
    cli_report,
    cli_results,
    cli_snapshot,
    cli_top,
    cli_trace,
    cli_tty,
    cli_up,
    cli_vm,
    control,
    demo,
    registry,
    ship,
)
from testbed.bed import Testbed
from testbed.cli_common import Ended
from testbed.errors import TestbedError, VmError
from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU, format_args, path_wiring, qemu_args
from testbed.transfer import Transferred

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

    from testbed.qemu_args import VmSpec

app = typer.Typer(help="Virtual machines that talk through shared memory: boot, transfer, measure.",
                  no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  context_settings={"help_option_names": ["-h", "--help"]})
app.command()(cli_up.up)
app.command()(cli_up.down)
app.command()(cli_up.ps)
app.command("exec", context_settings=cli_vm.REST)(cli_vm.exec_)
app.command()(cli_vm.cp)
app.command()(cli_vm.logs)
app.command()(cli_vm.console)
app.command()(cli_tty.tty)
app.command(context_settings=cli_vm.REST)(cli_vm.ssh)
app.command("ssh-proxy", hidden=True)(cli_vm.ssh_proxy)
app.command()(cli_vm.plug)
app.command()(cli_vm.unplug)
app.command()(cli_devices.attach)
app.command()(cli_devices.detach)
app.command()(cli_devices.devices)
app.command()(cli_top.top)
app.command()(cli_top.metrics)
app.command()(cli_look.doctor)
app.command()(cli_look.dump)
app.command()(cli_look.bundle)
app.add_typer(cli_up.config, name="config")
app.add_typer(cli_image.app, name="image")
app.add_typer(cli_snapshot.app, name="snapshot")
app.add_typer(cli_registry.app, name="registry")
app.command()(cli_bench.bench)
app.add_typer(cli_results.app, name="results")
app.command()(cli_report.report)
app.command()(cli_trace.trace)

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


@app.command("demo")
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


@app.command()
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


@app.command(hidden=True)  # one question of those that doctor answers
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
        app()
    except (TestbedError, images.ImageError, HostError, IdcError) as error:
        # A VM's own error has the console's last lines; every other fits one line.
        raise _fail(f"error: {error if isinstance(error, VmError) else control.one_line(error)}") from None
    except OSError as error:  # of this machine: a full disk, a directory that may not be written
        raise _fail(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}") from None
    except Ended as ended:
        raise _fail(f"interrupted ({ended}); everything that was started is ended", ended.exit_code) from None


if __name__ == "__main__":
    main()
