"""The HTML of a report: `render(run, ...)`. Depends on jinja2, `testbed.bench.bars` and `testbed.report.sections`.

Everything lies in the one file: Observable Plot and D3 (assets/, with their licences), the script and the style of this
project, and the data. Tables are in the HTML itself, so that a reader without JavaScript has every figure and lacks the
plots alone.
"""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from testbed.bench import words
from testbed.bench.bars import judge
from testbed.report.figures import Axis, Cell, Figure, Item, Table, number
from testbed.report.parts import Place, Run, Section, Tile, cpu_cell, device_action
from testbed.report.sections import ORDER, places
from testbed.results import runs

if TYPE_CHECKING:
    from testbed.bench.bars import Verdict
    from testbed.bench.rows import Result
    from testbed.results.compare import Comparison

_ASSETS = resources.files("testbed.report") / "assets"
#: In this order; each is one <script>.
_LIBRARIES = (("d3.min.js", "LICENSE.d3"), ("plot.umd.min.js", "LICENSE.plot"))
_FACTS = ("cpu", "cpus", "memory_mib", "kernel", "system", "qemu", "guest_kernel", "guest_cpu", "guest_python",
          "mapping", "network", "netdev", "vhost", "mtu", "offloads", "pinning", "python", "load_before",
          "load_after", "steal")
ACCELERATORS = {
    "tcg": "TCG: QEMU emulated every instruction of the VMs. Ratios within this run hold under TCG; absolute figures "
           "say nothing about KVM.",
    "kvm": "KVM: the VMs ran on the processor itself.",
    "none": "No VM took part: these are processes of one machine.",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Against:
    """The other version of a run whose turns were alternated.

    Attributes:
        base, this: numbers of the two runs.
        title: what against what.
        comparison: what came out.
    """

    base: int
    this: int
    title: str
    comparison: Comparison


def render(run: Run, against: Against | None = None) -> str:
    """The whole file."""
    environment = Environment(loader=PackageLoader("testbed.report", "assets"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    shown = places(run)
    compared = _against(run, against) if against else None
    figures = [figure for place in shown for figure in place.figures] + (compared.figures if compared else [])
    verdicts = sorted((each for each in judge(run.result) if each.held is not None), key=lambda each: bool(each.held))
    result = run.result
    return environment.get_template("report.html.j2").render(
        run=run.number, result=result, when=runs.when(result), commit=runs.commit(result), kind=runs.kind(result),
        accel=result.accel.upper() if result.accel != "none" else "no VM", about=ACCELERATORS.get(result.accel, ""),
        notes=_notes(result), places=shown, against=compared, tiles=lambda place: _bars_tile(place, verdicts),
        bars=_bars(verdicts), held=sum(bool(each.held) for each in verdicts), judged=len(verdicts),
        rows=_all_rows(run), facts=_facts(result),
        style=_asset("report.css"), script=_asset("report.js"),
        libraries=[(_asset(script), _asset(licence)) for script, licence in _LIBRARIES],
        data=_data({figure.id: figure.as_dict() for figure in figures}),
    )  # fmt: skip


def _facts(result: Result) -> list[tuple[str, str]]:
    """What a run knows of its machine, as people read it."""
    found = [(name.replace("_", " "), result.host.get(name)) for name in _FACTS]
    return [(name, f"{value:.2f}" if isinstance(value, float) else str(value)) for name, value in found
            if value not in (None, "")]


def _notes(result: Result) -> list[str]:
    """What a reader must know before any figure."""
    load, cpus = result.host.get("load_before", 0.0), result.host.get("cpus", 1)
    busy = f"The machine was busy when this run began (load {load:.1f} on {cpus} CPUs): mind the spread of rounds."
    return [*result.notes, *([busy] if load > cpus / 2 else [])]


def _asset(name: str) -> Markup:
    text = (_ASSETS / name).read_text()
    assert "</script" not in text.lower(), "it would end the element that it is put into"
    assert "</style" not in text.lower(), "likewise"
    return Markup(text)


def _data(value: dict[str, Any]) -> Markup:
    """JSON that cannot end its element, whatever is in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _bars_tile(place: Place, verdicts: list[Verdict]) -> list[Tile]:
    """What a place begins with, and how many of its bars hold."""
    mine = [each for each in verdicts if each.bar.what.startswith(f"{place.id}:")]
    if not mine:
        return place.tiles
    held = sum(bool(each.held) for each in mine)
    failed = [each.bar.what.partition(": ")[2] for each in mine if not each.held]
    said = "all it must show" if not failed else f"fails: {failed[0]}" + (f", and {len(failed) - 1} more"
                                                                          if len(failed) > 1 else "")
    return [*place.tiles, Tile("Bars that hold here", f"{held} of {len(mine)}", said)]


def _bars(verdicts: list[Verdict]) -> Table:
    lines = []
    for each in verdicts:
        bar, have = each.bar, each.have or 0.0
        lines.append((Cell("\N{CHECK MARK} holds" if each.held else "\N{BALLOT X} fails"), Cell(bar.what),
                      Cell(f"{'at most' if bar.sense == '<=' else 'at least'} {bar.need:.3g}", bar.need),
                      Cell(words.digits(have), have)))
    return Table(("", "bar", "need", "have"), list(lines))


def _all_rows(run: Run) -> Table:
    order = {domains: place for place, domains in enumerate(ORDER)}
    lines = []
    for row in sorted(run.result.results, key=lambda row: order.get(row.domains, 9)):
        many = f" x{row.outstanding}" if row.outstanding else f", {done}" if (done := device_action(row)) else ""
        lines.append((Cell(row.name + many), Cell(row.domains), Cell(words.title(row)),
                      Cell(words.size(row.size), row.size), number(row.figure, row.unit), number(row.p99, row.unit),
                      number(row.max, row.unit), cpu_cell(row, row.cpu_s),
                      Cell(run.result.accel if row.domains != "process" else "no VM")))
    return Table(("name", "where", "way", "size", "median", "p99", "max", "CPU", "under"), list(lines))


def _against(run: Run, against: Against) -> Section:
    """Differences between the two versions, the called ones first."""
    found = against.comparison
    order = {"worse": 0, "better": 1, "cannot tell": 2, "no difference": 3}
    differences = sorted(found.differences, key=lambda each: order[each.kind])
    items, lines = [], []
    for each in differences:
        row = each.row
        name = f"{row.name} {row.domains} {words.title(row, variant=False)} {words.size(row.size)}"
        style = each.kind.replace(" ", "-")
        items.append(Item(name, style, each.change, each.low, each.high, f"{each.change:+.1%} {each.kind}"))
        lines.append((Cell(name), number(each.first, row.unit), number(each.second, row.unit),
                      Cell(f"{each.change:+.1%}", each.change), Cell(f"{each.low:+.1%} to {each.high:+.1%}", each.low),
                      Cell(f"{each.noise:.1%}", min(each.noise, 1e9)), Cell(f"{each.chance:.2g}", each.chance),
                      Cell(each.kind)))
    columns = ("row", "base", "this", "change", "95 % of draws", "noise", "chance", "verdict")
    accel = "no VM" if run.result.accel == "none" else run.result.accel.upper()
    figure = Figure("against", "dots", f"{against.title}: change of each row",
                    f"{accel} · runs {against.base}, {against.this}", Axis("change", "linear", "change"),
                    Table(columns, list(lines)), items=items[:40], rules=[(0.0, "no change")],
                    lead="Dot: median of the turns. Line: 95 of 100 bootstrap draws."
                    + (" The first 40 rows; all are in the table." if len(items) > 40 else ""))
    from testbed.results.show import summary

    return Section("against", f"Against another commit: {against.title}", ". ".join(summary(found)) + ".", [figure])
