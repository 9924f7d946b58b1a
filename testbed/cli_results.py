"""`testbed results`: runs that were kept. May import typer, rich and `testbed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from testbed.bench import show as tables
from testbed.bench.rows import Result
from testbed.bench.store import Store
from testbed.cli_common import Json, complete_run, out, print_json, table, write_whole
from testbed.errors import SpecError
from testbed.results import export as exports
from testbed.results import runs

app = typer.Typer(help="Runs of `testbed bench` that were kept: list, show, compare, export.", no_args_is_help=True)

Run = Annotated[str, typer.Argument(metavar="RUN", help="Number of a run, latest, or latest~1 for the one before it.",
                                    autocompletion=complete_run)]


@app.command("list")
def list_(as_json: Json = False) -> None:
    """All runs, the newest last."""
    with Store(make=False) as store:
        found = store.summaries()
    if as_json:
        print_json([{"run": each.run, "started": each.result.started, "accel": each.result.accel,
                     "quick": each.result.quick, "commit": each.result.host.get("commit", ""),
                     "dirty": bool(each.result.host.get("dirty")), "session": each.result.session,
                     "version": each.result.version, "names": list(each.names), "domains": list(each.domains),
                     "rows": each.rows, "seconds": each.result.seconds} for each in found])
        return
    table(("RUN", "STARTED (UTC)", "COMMIT", "ACCEL", "KIND", "NAMES", "WHERE", "ROWS", "SECONDS"),
          runs.list_lines(found))


@app.command("show")
def show_run(run: Run = runs.LATEST, as_json: Json = False) -> None:
    """The tables of one run, as `testbed bench` printed them."""
    ((number, result),) = _load(run)
    if as_json:
        out(exports.as_json([(number, result)]))
        return
    out(f"run {number}, started {runs.when(result)} UTC")
    tables.show(result, _console())


@app.command()
def compare(
    first: Run,
    second: Run,
    anyway: Annotated[bool, typer.Option("--anyway", help="Compare runs of different accelerators, hosts, QEMU or "
                                         "options; every line warns.")] = False,
    as_json: Json = False,
) -> None:
    """What the second run changed against the first, and what is only noise.

    Runs are refused that were measured under different conditions.
    """
    from testbed.results.compare import compare as compare_runs  # numpy takes its time
    from testbed.results.compare import conditions
    from testbed.results.show import show_comparison

    (one, before), (two, after) = _load(first, second)
    differ = conditions(before, after)
    if differ and not anyway:
        raise SpecError(f"runs {one} and {two} cannot be compared, they differ in {'; '.join(differ)}",
                        hint="--anyway compares them all the same")
    found = compare_runs(before, after)
    if as_json:
        print_json({"first": one, "second": two} | found.as_dict())
        return
    titles = (f"run {one} ({runs.commit(before)})", f"run {two} ({runs.commit(after)})")
    show_comparison(found, before, after, titles, _console())


@app.command()
def export(
    run: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Numbers, latest, latest~1; by default "
                                                    "latest.", show_default=False,
                                                    autocompletion=complete_run)] = None,
    form: Annotated[str, typer.Option("--format", metavar="json|csv", help="Form; by default json.")] = "json",
    file: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file.")] = None,
) -> None:
    """Runs as JSON, or as CSV with a line for each row."""
    forms = {"json": exports.as_json, "csv": exports.as_csv}
    if form not in forms:
        raise typer.BadParameter(f"{form!r} is not json or csv", param_hint="--format")
    text = forms[form](_load(*(run or [runs.LATEST]))).rstrip("\n")
    if file is None:
        out(text)
    else:
        write_whole(file, text + "\n")


def _load(*wanted: str) -> list[tuple[int, Result]]:
    with Store(make=False) as store:
        numbers = [runs.find(store, text) for text in wanted]
        return [(number, store.result(number)) for number in numbers]


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    return console
