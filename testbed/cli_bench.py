"""`testbed bench`: measurements. May import typer, rich and `testbed`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console

from testbed.accel import Wish
from testbed.bench import bars, runner, show
from testbed.bench.baton import ALONE, Baton
from testbed.bench.names import load
from testbed.bench.places import DOMAINS, Domains
from testbed.bench.rows import Result, parse
from testbed.bench.setting import Setting
from testbed.bench.store import Store
from testbed.cli_common import check_writable, out, write_whole
from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU
from testbed.results import runs

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
    against: Annotated[str | None, typer.Option("--against", metavar="COMMIT", help="Measure this tree against another "
                                                "commit of it, in turn, and say what differs.")] = None,
    turns: Annotated[int | None, typer.Option("--turns", metavar="N", min=1, max=1000, help="With --against: turns of "
                                              "each, by default 12, or 8 with --quick.")] = None,
    accel: Annotated[str, typer.Option("--accel", metavar="auto|kvm|tcg", help="Accelerator.")] = "auto",
    qemu: Annotated[str, typer.Option("--qemu", metavar="PROGRAM", help="QEMU binary.")] = DEFAULT_QEMU,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    in_turn: Annotated[str, typer.Option("--in-turn", hidden=True, help="FD,first or FD,second; see testbed.bench."
                                         "baton.")] = "",
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
    if json_file is not None and str(json_file) != "-":
        check_writable("--json", json_file)
    if against is None and turns is not None:
        raise typer.BadParameter("it is for --against COMMIT", param_hint="--turns")
    if against is not None:
        _against(setting, against, turns, json_file, console)
        return
    with Store() as store:
        baton = Baton.told(in_turn) if in_turn else ALONE
        result, found = runner.run(dataclasses.replace(setting, baton=baton))
        number = store.add(result, found)
        steps.say(f"kept as run {number} in {store.path}")
    if json_file is not None:
        _write(result, json_file)
    if str(json_file) != "-":
        show.show(result, console)


def _against(setting: Setting, commit: str, turns: int | None, json_file: Path | None, console: Console) -> None:
    from testbed.results import against  # numpy takes its time
    from testbed.results.compare import compare
    from testbed.results.show import show_comparison

    name = against.resolve(commit)
    against.check_core()
    with Store() as store:
        count = turns or (against.QUICK_TURNS if setting.quick else against.TURNS)
        measured = against.measure(setting, name, count)
        numbers = [store.add(each.result, each.found) for each in measured]
        setting.steps.say(f"kept as runs {numbers[0]} (base) and {numbers[1]} (this) in {store.path}")
    base, this = (each.result for each in measured)
    comparison = compare(base, this)
    if json_file is not None:
        text = json.dumps({"first": numbers[0], "second": numbers[1]} | comparison.as_dict(), indent=2)
        if str(json_file) == "-":
            out(text)
            return
        write_whole(json_file, text + "\n")
    show_comparison(comparison, base, this, (f"base ({runs.commit(base)})", f"this ({runs.commit(this)})"), console)


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
    write_whole(file, result.as_json() + "\n")
