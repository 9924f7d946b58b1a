"""Prints a result for people: each figure beside its limit and its peers. Depends on rich and `testbed.bench.rows`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from testbed.bench import words
from testbed.bench.bars import by_rounds, judge

if TYPE_CHECKING:
    from rich.console import Console

    from testbed.bench.rows import Result, Row

#: Share of the processors' time from which on it is said that others had it.
STEAL = 0.01
_TITLES = {"rtt": "round trips", "rtt-open": "round trips by a timetable at half the closed loop's rate",
           "rtt-rare": "round trips, one every 2 ms",
           "rtt-busy": "round trips, each VM's CPU shared with a burner",
           "rtt-busy-rare": "round trips, one every 2 ms, each VM's CPU shared with a burner",
           "trace": "transactions of endpoints, by what is traced"}


def show(result: Result, console: Console) -> None:
    """Print all tables, the bars, and what it was measured under."""
    for domains in dict.fromkeys(row.domains for row in result.results):
        rows = [row for row in result.results if row.domains == domains]
        for name, title in _TITLES.items():
            for size in dict.fromkeys(row.size for row in rows if row.name == name):
                found = [row for row in rows if (row.name, row.size) == (name, size)]
                heading = f"{title}, {words.size(size)}, {words.PLACES[domains]}; us"
                _print(console, heading, _round_trips(found, result))
        rates = [row for row in rows if row.name == "rate"]
        if rates:
            _print(console, f"messages of {words.size(rates[0].size)} one way, {words.PLACES[domains]}", _values(rates))
        for size in dict.fromkeys(row.size for row in rows if row.name == "stream"):
            found = [row for row in rows if (row.name, row.size) == ("stream", size)]
            _print(console, f"streams in pieces of {words.size(size)}, {words.PLACES[domains]}", _values(found))
        _idc(rows, console, result)
        for op, depth in dict.fromkeys((row.op, row.depth) for row in rows if row.name == "block"):
            found = [row for row in rows if (row.name, row.op, row.depth) == ("block", op, depth)]
            _print(console, f"fio {op} of {words.size(found[0].size)}, depth {depth}, {words.PLACES[domains]}",
                   _values(found))
        costs = [row for row in rows if row.name == "trace-cost"]
        if costs:
            _print(console, f"tracing's cost, {words.PLACES[domains]}: against a build without the hook", _costs(costs))
        for name, title in (("net", "iperf3"), ("ping", "ping")):
            if found := [row for row in rows if row.name == name]:
                _print(console, f"{title}, {words.PLACES[domains]}", _network(found))
        boots = [row for row in rows if row.path == "boot"]
        if boots:
            _print(console, "VMs", _boots(boots))
    show_bars(result, console)
    _footer(result, console)


def _idc(rows: list[Row], console: Console, result: Result) -> None:
    """The tables of `bench idc`."""
    place = words.PLACES[rows[0].domains]
    for size in dict.fromkeys(row.size for row in rows if row.name == "transact"):
        calls = [row for row in rows if (row.name, row.size) == ("transact", size)]
        _print(console, f"transactions of {words.size(size)}, one at a time, {place}; us",
               _round_trips([row for row in calls if row.unit == "ns"], result))
        if many := [row for row in calls if row.unit != "ns"]:
            _print(console, f"transactions of {words.size(size)}, many at a time, {place}", _values(many))
    for name, title in (("bulk", "bulk transfers"), ("face", "the stream face over TCP, pieces")):
        for size in dict.fromkeys(row.size for row in rows if row.name == name):
            found = [row for row in rows if (row.name, row.size) == (name, size)]
            _print(console, f"{title} of {words.size(size)}, {place}", _values(found))
    for line in crossings(rows):
        console.print(line, markup=False, soft_wrap=True)


def crossings(rows: list[Row]) -> list[str]:
    """From which size on to map, and to hand over, is faster than to copy, as far as was measured."""
    found = []
    for touched in (False, True):
        by_size: dict[int, dict[str, float]] = {}
        for row in rows:
            if (row.name, row.api) == ("bulk", "python") and row.strategy and row.touched is touched:
                by_size.setdefault(row.size, {})[row.strategy] = row.figure
        for strategy in ("map", "handover"):
            sizes = sorted(size for size, figures in by_size.items() if {"copy", strategy} <= figures.keys())
            wins = [size for size in sizes if all(by_size[larger][strategy] > by_size[larger]["copy"]
                                                  for larger in sizes if larger >= size)]  # fmt: skip
            if sizes:
                when = f"from {words.size(wins[0])} on" if wins else f"at no size up to {words.size(sizes[-1])}"
                found.append(f"{strategy} beats copy {when}, {'every byte summed' if touched else 'untouched'}")
    return found


def show_bars(result: Result, console: Console) -> None:
    """Print each bar: what it needs, what there is, whether it holds."""
    verdicts = [verdict for verdict in judge(result) if verdict.held is not None]
    if not verdicts:
        return
    table = Table("bar", "need", "have", "of rounds", "", box=SIMPLE_HEAD, pad_edge=False)
    for verdict in verdicts:
        bar = verdict.bar
        style = "" if verdict.held else "bold red"
        table.add_row(bar.what, f"{'at most' if bar.sense == '<=' else 'at least'} {bar.need:g}", f"{verdict.have:.3g}",
                      verdict.range, "holds" if verdict.held else "FAILS", style=style)
    console.print(table)


def _print(console: Console, heading: str, table: Table) -> None:
    console.print(f"\n{heading}", markup=False, style="bold", soft_wrap=True)
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _round_trips(rows: list[Row], result: Result) -> Table:
    table = _table("p50", "p90", "p99", "p99.9", "max", "p50 of rounds", "limit x", "peer/this", "samples",
                   "CPU s/1000")
    for row in rows:
        cells = ["" if value is None else words.micros(value) for value in row.told]
        limit = result.find(row.name, "limit", row.domains, row.mode if row.mode in ("poll", "doorbell") else "poll",
                            "core", row.size) or result.find(row.name, "ring", row.domains, row.mode, "core", row.size)
        peers = [other for other in rows if words.is_peer(other) and other.api == row.api]
        peer = min(peers, key=lambda other: other.figure, default=None)
        ours = row.path in words.OURS
        samples = f"{row.samples}" + (f" of {row.per}" if row.per > 1 else "")
        rounds = f"{words.micros(min(row.rounds))}-{words.micros(max(row.rounds))}"
        table.add_row(words.title(row), *cells, rounds, f"{by_rounds(row, limit).value:.2f}" if ours and limit else "",
                      f"{by_rounds(peer, row).value:.1f}" if ours and peer else "", samples, _cpu(row))
    return table


def _values(rows: list[Row]) -> Table:
    limits = [row for row in rows if row.path == "ring" or (row.path, row.mode) == ("limit", "pipeline")]
    limit = max(limits, key=lambda row: row.figure, default=None)
    unit = rows[0].unit
    cost = "CPU s/GB" if unit in ("B/s", "MB/s") else "CPU s/1000"
    table = _table("median", "least", "most", "of limit", "peer x", cost)
    for row in rows:
        ours = row.path in words.OURS
        peers = [other for other in rows if words.is_peer(other) and other.api == row.api
                 and (row.name != "rate" or row.api == "core" or other.outstanding == row.outstanding)]
        peer = max(peers, key=lambda other: other.figure, default=None)
        spread = (words.rate(value, unit) for value in (row.figure, min(row.rounds), max(row.rounds)))
        table.add_row(words.title(row), *spread, f"{by_rounds(row, limit).value:.0%}" if ours and limit else "",
                      f"{by_rounds(row, peer).value:.1f}" if ours and peer else "", _cpu(row))
    return table


def _costs(rows: list[Row]) -> Table:
    table = Table("transactions", "tracing", "%", "over all turns", box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        which = f"{'Python' if row.api == 'python' else row.api}, {row.outstanding or 1} under way"
        table.add_row(which, row.mode or "", f"{row.figure:+.2f}", row.note)
    return table


def _network(rows: list[Row]) -> Table:
    """The device net beside virtio-net; processor time for a GB, or for 1,000 pings."""
    table = _table("median", "least", "most", "p99", "CPU s/GB" if rows[0].name == "net" else "CPU s/1000")
    for row in rows:
        spread = (words.figure(value, row.unit) for value in (row.figure, min(row.rounds), max(row.rounds)))
        table.add_row(words.title(row), *spread, "" if row.p99 is None else words.figure(row.p99, row.unit), _cpu(row))
    return table


def _boots(rows: list[Row]) -> Table:
    table = _table("unit", "p50", "p90", "max", "samples")
    for row in rows:
        table.add_row(f"{row.name}: {row.note}", row.unit,
                      *(f"{value:.3f}" if row.unit == "s" else f"{value:.1f}" for value in
                        (row.p50 or 0.0, row.p90 or 0.0, row.max or 0.0)), str(row.samples))
    return table


def _footer(result: Result, console: Console) -> None:
    host = result.host
    lines = [f"accelerator {result.accel}: {result.accel_reason}",
             f"{host.get('cpu')}, {host.get('cpus')} CPUs, kernel {host.get('kernel')}"
             + (", itself a virtual machine" if host.get("hypervisor") else "")]
    lines += [f"{name}: {host[name]}" for name in ("qemu", "guest_kernel", "mapping", "network", "netdev", "vhost",
                                                   "pinning") if name in host]
    lines.append(f"commit {host.get('commit') or 'unknown'}{' with changes' if host.get('dirty') else ''}; "
                 f"{result.seconds:g} s{', quick' if result.quick else ''}")
    lines += [f"not measured: {what}" for what in result.absent]
    load, cpus = host.get("load_before", 0.0), host.get("cpus", 1)
    if load > cpus / 2:
        lines.append(f"others were busy when it began (load {load:.1f} on {cpus} CPUs): mind the spread of rounds")
    if (steal := host.get("steal", 0.0)) >= STEAL:
        lines.append(f"a hypervisor had {steal:.1%} of the processors' time meanwhile: mind the spread of rounds")
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print("ratios hold within this run; absolute figures under TCG say nothing about KVM", style="dim")


def _cpu(row: Row) -> str:
    return "" if row.cpu_s is None else f"{row.cpu_s:.3g}"

