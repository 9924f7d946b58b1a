"""Prints comparisons for people. Depends on rich, `testbed.bench` and `testbed.results.compare`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from testbed.bench import words
from testbed.results.compare import LEVEL, WANTED, turns_needed

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.bench.rows import Result
    from testbed.results.compare import Comparison, Difference

_STYLES = {"better": "bold green", "worse": "bold red", "no difference": "", "cannot tell": "dim"}


def show_comparison(found: Comparison, first: Result, second: Result, titles: tuple[str, str],
                    console: Console) -> None:
    """Print what changed, row by row, and what that is worth."""
    _print(console, f"{titles[1]} against {titles[0]}", style="bold")
    for line in _preface(found, first, second):
        _print(console, line)
    if found.differences:
        warning = f"NOT COMPARABLE ({'; '.join(dict.fromkeys(each.split(':')[0] for each in found.conditions))})"
        console.print(_table(found, warning if found.conditions else ""))
    for line in summary(found):
        _print(console, line, style="bold" if "differ" in line else "")
    if any(result.accel == "tcg" for result in (first, second)):
        _print(console, "ratios hold under this accelerator; figures under TCG say nothing about KVM", style="dim")


def _preface(found: Comparison, first: Result, second: Result) -> list[str]:
    lines = [f"accelerator {first.accel}" + (f" and {second.accel}" if second.accel != first.accel else "")
             + f"; {'measured in turn' if found.paired else 'measured apart'}"]
    if not found.paired:
        lines.append("measured apart: what else the machine did meanwhile is in every difference; "
                     "testbed bench --against COMMIT measures two versions in turn")
    lines += [f"warning: compared all the same, though they differ in {each}" for each in found.conditions]
    lines += [f"note: {note}" for note in dict.fromkeys((*first.notes, *second.notes))]
    return lines


def _table(found: Comparison, warning: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("row", "first", "second", "change", "95 % of draws", "noise", "chance", "verdict"):
        right = name not in ("row", "verdict")
        table.add_column(name, justify="right" if right else "left", no_wrap=right)
    for each in found.differences:
        verdict = f"{each.kind}, too noisy to see {WANTED:.0%}" if each.blind else each.kind
        table.add_row(name_of(each), words.figure(each.first, each.row.unit), words.figure(each.second, each.row.unit),
                      percent(each.change), f"{percent(each.low)} to {percent(each.high)}", noise(each),
                      _chance(each.chance), f"{verdict}; {warning}" if warning else verdict, style=_STYLES[each.kind])
    return table


def name_of(each: Difference) -> str:
    """The row's, short enough for a line."""
    row = each.row
    many = f"x{row.outstanding}" if row.name == "transact" and row.outstanding else ""
    parts = (row.name, many, row.domains, words.title(row, variant=False), words.size(row.size))
    return " ".join(part for part in parts if part)


def percent(value: float) -> str:
    """A change, signed."""
    return f"{value:+.1%}" if math.isfinite(value) else "?"


def noise(each: Difference) -> str:
    """Without a sign: it goes both ways."""
    return f"{each.noise:.1%}" if math.isfinite(each.noise) else "?"


def _chance(value: float) -> str:
    return f"{value:.2g}" if value >= 0.0001 else "<0.0001"


def summary(found: Comparison) -> list[str]:
    """What all rows together say, in sentences."""
    rows = len(found.differences)
    if not rows:
        return ["the two have no row in common"]
    better, worse, blind = found.of_kind("better"), found.of_kind("worse"), sum(map(_blind, found.differences))
    unclear, lines = found.of_kind("cannot tell"), []
    if better or worse:
        lines.append(f"{len(better) + len(worse)} of {rows} rows differ: {len(better)} better, {len(worse)} worse")
    elif len(unclear) < rows:
        lines.append(f"no difference in {rows - len(unclear)} rows")
    if unclear:
        one, two = unclear[0].turns
        lines.append(f"cannot tell for {len(unclear)} rows: {one} and {two} turns show nothing at a level of "
                     f"{LEVEL:.0%}; at least {turns_needed()} in turn are needed, or 5 and 5 apart")
    if blind:
        lines.append(f"of those without a difference, {blind} are too noisy for one of {WANTED:.0%} to be seen: "
                     "more turns, or a quieter machine")
    lines.append(f"called is what chance gives any of {rows} rows in at most {found.level:.0%} of comparisons "
                 "(corrected for all rows: permutation, largest statistic of any row), is above the noise of the first "
                 f"against itself, and at least {found.least:.0%}")
    lines += [f"not compared: {each}" for each in found.skipped]
    if any(found.only):
        lines.append(f"rows that only one of them has: {found.only[0]} in the first, {found.only[1]} in the second")
    return lines


def _blind(each: Difference) -> bool:
    return each.blind


def _print(console: Console, line: str, *, style: str = "") -> None:
    console.print(line, markup=False, soft_wrap=True, style=style)
