"""`testbed bench`: measurements. May import typer, rich and `testbed`."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console

from testbed.accel import Wish
from testbed.bench import bars, runner, show
from testbed.bench.names import load
from testbed.bench.places import DOMAINS, Domains
from testbed.bench.rows import Result, parse
from testbed.bench.setting import Setting
from testbed.bench.store import Store
from testbed.cli_common import out
from testbed.errors import SpecError
from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU

_HELP = "; ".join(f"{bench.name}: {bench.help}" for bench in load().values())


def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=_HELP, show_default=False)] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Touch each row only; two minutes or three.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON; - prints "
                                                   "it and nothing else.")] = None,
    domains: Annotated[str, typer.Option(metavar="|".join(DOMAINS), help="Where to measure; several with commas, by "
                                         "default everywhere.")] = ",".join(DOMAINS),
    judge: Annotated[Path | None, typer.Option("--bars", metavar="FILE", help="Measure nothing: judge an earlier "
                                               "result; exit code 1 if a bar fails.")] = None,
    accel: Annotated[str, typer.Option("--accel", metavar="auto|kvm|tcg", help="Accelerator.")] = "auto",
    qemu: Annotated[str, typer.Option("--qemu", metavar="PROGRAM", help="QEMU binary.")] = DEFAULT_QEMU,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure, each path beside its limit and its peers.

    Every result names the accelerator it ran under, and is kept with its histograms in a database.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    if judge is not None:
        _judge(judge, console)
        return
    if accel not in get_args(Wish):
        raise typer.BadParameter(f"{accel!r} is not auto, kvm or tcg", param_hint="--accel")
    wanted = frozenset(domains.split(","))
    if unknown := wanted - set(DOMAINS):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))!r} is not one of {', '.join(DOMAINS)}",
                                 param_hint="--domains")
    steps = Steps(quiet=quiet)
    setting = Setting(tuple(names or ()), cast("frozenset[Domains]", wanted), quick, steps, cast("Wish", accel), qemu)
    runner.chosen(setting.names)  # before minutes are spent
    if json_file is not None and str(json_file) != "-" and not os.access(json_file.parent, os.W_OK | os.X_OK):
        raise SpecError(f"--json {json_file}: {json_file.parent} is no directory that this user may write in")
    with Store() as store:
        result, found = runner.run(setting)
        number = store.add(result, found)
        steps.say(f"kept as run {number} in {store.path}")
    if json_file is not None:
        _write(result, json_file)
    if str(json_file) != "-":
        show.show(result, console)


def _judge(file: Path, console: Console) -> None:
    result = parse(file.read_text(), str(file))
    show.show_bars(result, console)
    if any(verdict.held is False for verdict in bars.judge(result)):
        raise SystemExit(1)


def _write(result: Result, file: Path) -> None:
    """Whole or not at all."""
    if str(file) == "-":
        out(result.as_json())
        return
    with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=f".{file.name}.", delete=False) as staged:
        try:
            staged.write(result.as_json() + "\n")
            staged.close()
            Path(staged.name).chmod(0o644)
            Path(staged.name).replace(file)
        except BaseException:
            Path(staged.name).unlink(missing_ok=True)
            raise
