"""`testbed report`: one run as a page. May import typer and `testbed`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.bench.store import Store
from testbed.cli_common import check_writable, complete_run, out, write_whole
from testbed.report.parts import Run
from testbed.results import runs


def report(
    run: Annotated[str, typer.Argument(metavar="[RUN]", help="Number of a run, latest, or latest~1 for the one before "
                                       "it; see `testbed results list`.", autocompletion=complete_run)] = runs.LATEST,
    file: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to; by default "
                                              "testbed-report-N.html here; - prints it.")] = None,
) -> None:
    """One HTML file with all plots and figures of a run.

    It loads nothing from anywhere: send it to whom you like.
    """
    from testbed.report.page import Against, render  # these take their time

    if file is not None and str(file) != "-":
        check_writable("-o", file)
    with Store(make=False) as store:
        number = runs.find(store, run)
        result = store.result(number)
        histograms = {place: histogram for place in range(len(result.results))
                      if (histogram := store.histogram(number, place)) is not None}
        other = _other_version(store, number)
        second = store.result(other) if other else None
    against = None
    if other and second is not None:
        from testbed.results.compare import compare

        (base, before), (this, after) = sorted([(number, result), (other, second)],
                                               key=lambda each: each[1].version != "base")
        title = f"this ({runs.commit(after)}) against base ({runs.commit(before)})"
        against = Against(base, this, title, compare(before, after))
    page = render(Run(number, result, histograms), against)
    if str(file) == "-":
        out(page)
        return
    target = file or Path(f"testbed-report-{number}.html")
    if file is None:
        check_writable("-o", target)
    write_whole(target, page)
    out(f"{target}: run {number}, {len(page) / 1e6:.1f} MB")


def _other_version(store: Store, number: int) -> int | None:
    """Number of the run whose turns alternated with this one's."""
    summaries = {each.run: each.result.session for each in store.summaries()}
    session = summaries[number]
    return next((run for run, other in summaries.items() if session and other == session and run != number), None)
