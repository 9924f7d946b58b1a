"""`testbed top`, `metrics`: looking on while testbeds run. May import typer and `testbed.live`."""

from __future__ import annotations

import sys
import threading
import time
from typing import Annotated, Any

import typer

from testbed import registry
from testbed.cli_common import Ended, Json, complete_testbed, out, print_json, table
from testbed.errors import SpecError
from testbed.live import views
from testbed.live.collect import Collector

Names = Annotated[list[str] | None, typer.Argument(metavar="[TESTBED]...", autocompletion=complete_testbed,
                                                   show_default=False, help="By default all that run.")]


def _complete_view() -> list[str]:
    return [view.name for view in views.VIEWS]


def top(
    names: Names = None,
    which: Annotated[str, typer.Option("--view", metavar="VIEW", autocompletion=_complete_view,
                                       help="vms, links, endpoints, devices or host.")] = "",
    sort: Annotated[str, typer.Option(metavar="COLUMN", help="By the column of that name, as in --json.")] = "",
    wanted: Annotated[str, typer.Option("--filter", metavar="TEXT", help="Rows that hold it.")] = "",
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, max=3600.0, help="Between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the tables once, and no screen.")] = False,
    as_json: Json = False,
) -> None:
    """Watch VMs, links, endpoints, devices and host processes.

    On a terminal a screen; its last line names the keys. Columns with * are what members say of themselves. Figures
    per second are between two looks.
    """
    chosen = _views(which)
    if sort and not all(view.column(sort) for view in chosen):
        known = ", ".join(column.key for view in chosen for column in view.columns)
        raise SpecError(f"no column {sort!r}{'' if which else ' in every view'} (there are: {known})",
                        hint="" if which else "name one view with --view")
    for name in names or [""]:
        if name or not registry.running():
            registry.find(name)  # raises, and says what runs
    with Collector(names or ()) as collector:
        if once or as_json:
            _print(collector, chosen, sort, wanted, interval, as_json=as_json)
            return
        if not sys.stdout.isatty() or not sys.stdin.isatty():
            raise SpecError("top draws on a terminal, and this is none", hint="--once, or --json")
        from testbed.live.screen import Top  # late: textual takes half a second to load

        app = Top(collector, interval, which or "vms", sort, wanted)
        app.run()
    if app.ended_by:
        raise Ended(app.ended_by)
    if app.return_code:
        raise typer.Exit(app.return_code)


def _views(which: str) -> list[views.View]:
    if which and which not in _complete_view():
        raise SpecError(f"no view {which!r}", hint=f"there are {', '.join(_complete_view())}")
    return [views.view(which)] if which else list(views.VIEWS)


def _print(collector: Collector, chosen: list[views.View], sort: str, wanted: str, interval: float, *,
           as_json: bool) -> None:
    before = collector.look()
    time.sleep(interval)
    now = collector.look()
    if not now:
        raise registry.NoSuchTestbed("the testbed ended meanwhile", hint="testbed ps")
    made = {view.name: views.arrange(view, views.rows(view, now, before), sort or view.sort, wanted=wanted)
            for view in chosen}
    if as_json:
        told: dict[str, Any] = {"time": time.time(), "interval": interval,
                                "testbeds": [{"name": bed.name, "accel": bed.accel, "trouble": bed.trouble}
                                             for bed in now]}
        told |= {name: [{key: value for key, value in row.items() if key != views.KEY} for row in found]
                 for name, found in made.items()}
        print_json(told)
        return
    for number, view in enumerate(chosen):
        out(("\n" if number else "") + view.name.upper())
        table([column.title + ("*" if column.claimed else "") for column in view.columns],
              [[column.text(row) for column in view.columns] for row in made[view.name]])
    for bed in now:
        if bed.trouble:
            out(f"\n{bed.name}: {bed.trouble}")


def metrics(
    names: Names = None,
    listen: Annotated[str, typer.Option(metavar="ADDRESS:PORT", help="Serve them over HTTP instead, until interrupted; "
                                        "the testbeds need not run yet.")] = "",
) -> None:
    """Print what `top` shows as Prometheus metrics.

    Names and units are in docs/top.md. Who can reach the address can read them.
    """
    from testbed.live import metrics as exporter  # late: a library that most commands do not need

    where = _address(listen) if listen else None
    if where is None:
        for name in names or ():
            registry.find(name)
    with Collector(names or ()) as collector:
        if where is None:
            began = time.monotonic()
            beds = collector.look()
            sys.stdout.write(exporter.exposition(beds, time.monotonic() - began).decode())
            return
        with exporter.serve(collector, *where) as serving:
            host = f"[{serving.address}]" if ":" in serving.address else serving.address
            sys.stderr.write(f"serving http://{host}:{serving.port}/metrics\n")
            threading.Event().wait()  # until a signal ends it


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise SpecError(f"--listen {text!r} is not ADDRESS:PORT", hint="--listen 127.0.0.1:9105")
    return host.removeprefix("[").removesuffix("]"), int(port)
