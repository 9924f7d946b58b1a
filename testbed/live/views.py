"""Two looks at testbeds made into tables: rates, shares, states. Pure; `testbed top` draws them.

A column is *claimed* where its figures come from what members wrote into a region or the registry: the host did not
measure them, and a member that lies is believed here. Depends on testbed.live.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from testbed.live.collect import BedNow, ProcessNow, RegionNow
    from testbed.live.memory import ChannelNow, RingNow, SideNow

Value: TypeAlias = str | float | int | None
Row: TypeAlias = dict[str, Value]
#: A name of something that a row is about: what it is remembered by from one look to the next.
KEY: Final = "key"
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: in a row, in JSON, and for sorting.
        title: above it.
        shown: a value for people; None is shown as "-".
        claimed: see the top of the file.
    """

    key: str
    title: str
    shown: Callable[[Value], str] = str
    claimed: bool = False

    def text(self, row: Row) -> str:
        """The cell."""
        value = row[self.key]
        return "-" if value is None else self.shown(value)


def amount(value: Value) -> str:
    """1234567 as 1.23M."""
    number, unit = _number(value), ""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit or number % 1 else f"{number:.0f}"


def size(value: Value) -> str:
    """Bytes, in units of 1024."""
    number, unit = _number(value), ""
    for unit in ("", "K", "M", "G", "T"):
        if abs(number) < 1023.5 or unit == "T":
            break
        number /= 1024
    return f"{number:.0f}" if not unit else f"{number:.{1 if number < 99.95 else 0}f}{unit}"


def percent(value: Value) -> str:
    """A share of 1."""
    return f"{100 * _number(value):.0f}%"


def span(value: Value) -> str:
    """Seconds, as short as can be."""
    number = _number(value)
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if number >= scale:
            return f"{number / scale:.3g}{unit}"
    return f"{number * 1e9:.0f}ns"


def _number(value: Value) -> float:
    assert isinstance(value, int | float)
    return value


@dataclass(frozen=True)
class View:
    """A kind of table.

    Attributes:
        name: of the view.
        columns: the first of them say what a row is.
        sort: key of the column that it is sorted by at first.
    """

    name: str
    columns: tuple[Column, ...]
    sort: str

    def column(self, key: str) -> Column | None:
        """The column of that key."""
        return next((column for column in self.columns if column.key == key), None)


_BED = Column("testbed", "TESTBED")
_CLAIMED_RATES = (
    Column("sent", "SENT/S", amount, True), Column("received", "RECV/S", amount, True),
    Column("doorbells", "BELLS/S", amount, True), Column("fill", "FILL", percent, True),
    Column("round_trip", "RTT", span, True), Column("drops", "DROPS", amount, True))
VIEWS: Final = (
    View("vms", (_BED, Column("vm", "VM"), Column("state", "STATE"), Column("cpu", "CPU", percent),
                 Column("private", "PRIVATE", size), Column("shared", "SHARED", size),
                 Column("proportional", "PSS", size), Column("swap", "SWAP", size), Column("regions", "REGIONS"),
                 Column("pid", "PID")), "vm"),
    View("links", (_BED, Column("link", "LINK"), Column("state", "STATE"), Column("members", "MEMBERS"),
                   Column("size", "SIZE", size), Column("memory", "MEMORY", size),
                   Column("connected", "CONNECTED", claimed=True), Column("messages", "MSGS/S", amount, True),
                   Column("bytes", "BYTES/S", size, True), Column("doorbells", "BELLS/S", amount, True),
                   Column("lost", "LOST", amount), Column("drops", "DROPS", amount, True)), "link"),
    View("endpoints", (_BED, Column("endpoint", "ENDPOINT"), Column("peer", "PEER"),
                       Column("state", "STATE", claimed=True), *_CLAIMED_RATES,
                       Column("late", "LATE", amount, True), Column("masked", "MASKED", amount, True)), "endpoint"),
    View("devices", (_BED, Column("device", "DEVICE"), Column("frontend", "FRONT END"),
                     Column("front", "STATE", claimed=True), Column("backend", "BACK END"),
                     Column("back", "STATE", claimed=True), *_CLAIMED_RATES, Column("region", "REGION"),
                     Column("why", "WHY", claimed=True)), "device"),
    View("host", (_BED, Column("process", "PROCESS"), Column("state", "STATE"), Column("cpu", "CPU", percent),
                  Column("private", "PRIVATE", size), Column("shared", "SHARED", size),
                  Column("proportional", "PSS", size), Column("pid", "PID")), "process"),
)


def view(name: str) -> View:
    """The view of that name; raises KeyError."""
    return {each.name: each for each in VIEWS}[name]


def rows(which: View, now: Sequence[BedNow], before: Sequence[BedNow]) -> list[Row]:
    """The rows of a view, from two looks; what was not there in the one before has no rates."""
    earlier = {bed.name: bed for bed in before}
    made: list[Row] = []
    for bed in now:
        made += _MAKERS[which.name](bed, earlier.get(bed.name))
    return made


def arrange(which: View, found: Iterable[Row], sort: str, *, reverse: bool = False, wanted: str = "") -> list[Row]:
    """Rows that hold `wanted` in a cell, whatever its case, sorted by a column; what has no value comes last."""
    needle = wanted.casefold()
    kept = [row for row in found if any(needle in str(row[column.key]).casefold() for column in which.columns)]
    kept.sort(key=lambda row: str(row[KEY]))
    with_value = [row for row in kept if row[sort] is not None]
    with_value.sort(key=lambda row: (isinstance(row[sort], str), row[sort]), reverse=reverse)
    return with_value + [row for row in kept if row[sort] is None]


def grown(now: int, before: int) -> int:
    """What a counter of 64 bits gained; one that went back began anew, with a new connection."""
    return now - before if now >= before else now


# -- one look after the other


def _vms(bed: BedNow, before: BedNow | None) -> Iterator[Row]:
    if bed.trouble and not bed.vms:
        yield {**dict.fromkeys(column.key for column in view("vms").columns), "testbed": bed.name, "vm": "",
               "state": bed.trouble, KEY: bed.name}
    for vm in bed.vms:
        plugged = sum(member["name"] == vm.name and member["plugged"]
                      for region in bed.regions for member in region.told["members"])
        yield {**_process(bed, before, vm, None if before is None else before.vms), "vm": vm.name, "regions": plugged}


def _host(bed: BedNow, before: BedNow | None) -> Iterator[Row]:
    for process in bed.processes:
        yield {**_process(bed, before, process, None if before is None else before.processes),
               "process": process.name}


def _process(bed: BedNow, before: BedNow | None, process: ProcessNow, others: Sequence[ProcessNow] | None) -> Row:
    memory = process.memory
    last = next((other for other in others or () if other.name == process.name), None)
    cpu: float | None = None
    if (before is not None and last is not None and last.cpu is not None and process.cpu is not None
            and last.cpu.started == process.cpu.started and bed.at > before.at):
        cpu = max(process.cpu.seconds - last.cpu.seconds, 0.0) / (bed.at - before.at)
    return {"testbed": bed.name, "state": process.state, "cpu": cpu, "pid": process.pid,
            "private": None if memory is None else memory.private, "shared": None if memory is None else memory.shared,
            "proportional": None if memory is None else memory.proportional,
            "swap": None if memory is None else memory.swap, KEY: f"{bed.name}/{process.name}"}


def _links(bed: BedNow, before: BedNow | None) -> Iterator[Row]:
    for region in bed.regions:
        told = region.told
        members = []
        for member in told["members"]:
            here = member["present"] if member["rights"] == "rw" else member["plugged"]
            members.append(f"{member['name']} {member['rights']}{'' if here else ' (absent)'}")
        connected = sum(channel.connected for channel in region.channels)
        totals = _totals(bed, before, region)
        absent = any("absent" in member for member in members)
        state = "unknown" if not told["known"] else "waiting" if absent else "up"
        lost = sum(pair["dropped"] for pair in told["doorbell_faults"])
        yield {"testbed": bed.name, "link": region.name, "state": state, "members": ", ".join(members),
               "size": told["size"], "memory": region.allocated, "connected": f"{connected}/{len(region.channels)}",
               "lost": lost, **totals, KEY: f"{bed.name}/{region.name}"}


def _totals(bed: BedNow, before: BedNow | None, region: RegionNow) -> Row:
    messages, moved, doorbells, drops = 0.0, 0.0, 0.0, 0
    for channel in region.channels:
        last = _channel_before(before, region, channel)
        for number, ring in enumerate(channel.rings):
            drops += channel.sides[number].dropped
            if last is None or before is None:
                continue
            old, seconds = last.rings[number], bed.at - before.at
            taken = _taken(ring, old, seconds)
            messages += taken if channel.kind == "message" else 0.0
            moved += grown(ring.taken["bytes"], old.taken["bytes"]) / seconds if channel.kind == "message" else taken
            doorbells += sum(grown(now["doorbells"], was["doorbells"]) for now, was
                             in ((ring.sent, old.sent), (ring.taken, old.taken))) / seconds
    known = before is not None
    return {"messages": messages if known else None, "bytes": moved if known else None,
            "doorbells": doorbells if known else None, "drops": drops}


def _endpoints(bed: BedNow, before: BedNow | None) -> Iterator[Row]:
    for region in bed.regions:
        for channel in region.channels:
            for number, side in enumerate(channel.sides):
                yield {"testbed": bed.name, "endpoint": f"{region.name}/{channel.name} {side.member}",
                       "peer": channel.sides[1 - number].member, "state": state(channel, number),
                       **_rates(bed, before, region, channel, number),
                       KEY: f"{bed.name}/{region.name}/{channel.name}/{side.member}"}


def state(channel: ChannelNow, number: int) -> str:
    """What a side says of itself, and of the other."""
    side = channel.sides[number]
    if channel.connected:
        return "connected"
    return f"closed ({side.reason})" if side.state == "closed" and side.reason else side.state


def _rates(bed: BedNow, before: BedNow | None, region: RegionNow, channel: ChannelNow, number: int) -> Row:
    """Of one side. In a byte channel what is sent and received is bytes."""
    out, back = channel.rings[number], channel.rings[1 - number]
    side, last = channel.sides[number], _channel_before(before, region, channel)
    filled = out.filled
    row: Row = {"sent": None, "received": None, "doorbells": None, "round_trip": None, "drops": side.dropped,
                "fill": None if filled is None else filled / out.capacity,
                "late": out.sent["late"] + back.taken["late"], "masked": out.sent["masked"] + back.taken["masked"]}
    if last is None or before is None:
        row["round_trip"] = side.total_ns / side.samples / 1e9 if side.samples else None
        return row
    seconds, old_out, old_back = bed.at - before.at, last.rings[number], last.rings[1 - number]
    row |= {"sent": _taken(out, old_out, seconds), "received": _taken(back, old_back, seconds),
            "doorbells": (grown(out.sent["doorbells"], old_out.sent["doorbells"])
                          + grown(back.taken["doorbells"], old_back.taken["doorbells"])) / seconds,
            "round_trip": _round_trip(side, last.sides[number])}
    return row


def _taken(ring: RingNow, old: RingNow, seconds: float) -> float:
    """Items a second, by the consumer's index."""
    gained = ring.head - old.head & _MASK
    # what went back began anew; and nobody takes 2^63 of anything between two looks
    return (gained if gained < 1 << 63 else ring.head if ring.head < 1 << 63 else 0) / seconds


def _round_trip(side: SideNow, last: SideNow) -> float | None:
    """Mean of those timed since the last look; where there were none, of all of the connection."""
    if last.samples <= side.samples and last.total_ns <= side.total_ns and last.samples != side.samples:
        return (side.total_ns - last.total_ns) / (side.samples - last.samples) / 1e9
    return side.total_ns / side.samples / 1e9 if side.samples else None


def _devices(bed: BedNow, before: BedNow | None) -> Iterator[Row]:
    regions = {region.name: region for region in bed.regions}
    for device in bed.devices:
        name = f"{device['class']}-{device['number']}"
        steps = {role: device["ends"][role][0] if device["ends"][role] else {"state": "closed", "since": None,
                                                                              "why": "no drivers run there"}
                 for role in ("front", "back")}
        odd = next((steps[role] for role in ("front", "back") if steps[role]["state"] != "connected"), steps["front"])
        row: Row = dict.fromkeys(column.key for column in _CLAIMED_RATES)
        region = regions.get(device["region"])
        for channel in region.channels if region is not None else ():
            if {side.member for side in channel.sides} == {device["frontend"], device["backend"]}:
                assert region is not None
                number = 0 if channel.sides[0].member == device["frontend"] else 1
                row = _rates(bed, before, region, channel, number)
                row["drops"] = sum(side.dropped for side in channel.sides)
                break
        yield {"testbed": bed.name, "device": name, "frontend": device["frontend"], "backend": device["backend"],
               "front": steps["front"]["state"], "back": steps["back"]["state"], **row, "why": odd["why"],
               "region": device["region"], KEY: f"{bed.name}/{name} {device['frontend']}"}


def _channel_before(before: BedNow | None, region: RegionNow, channel: ChannelNow) -> ChannelNow | None:
    for other in before.regions if before is not None else ():
        if other.name == region.name and other.told["uuid"] == region.told["uuid"]:
            return next((last for last in other.channels if last.name == channel.name), None)
    return None


_MAKERS: Final[Mapping[str, Callable[[BedNow, BedNow | None], Iterator[Row]]]] = {
    "vms": _vms, "links": _links, "endpoints": _endpoints, "devices": _devices, "host": _host}


# -- one connection, closely


def detail(key: str, now: Sequence[BedNow], before: Sequence[BedNow]) -> list[str]:
    """All there is to say about the connection whose endpoint has that key; empty once it is gone."""
    found = next(((bed, region, channel, number) for bed in now for region in bed.regions for channel in region.channels
                  for number, side in enumerate(channel.sides)
                  if key == f"{bed.name}/{region.name}/{channel.name}/{side.member}"), None)
    if found is None:
        return []
    bed, region, channel, number = found
    earlier = next((one for one in before if one.name == bed.name), None)
    told, ours = region.told, channel.sides[number].member
    lines = [f"testbed {bed.name}, region {region.name}, channel {channel.name}: {channel.kind}s, "
             f"{'connected' if channel.connected else 'not connected'}"]
    ends = {side.member for side in channel.sides}
    lines += [f"the host says: {member['name']} {'present' if member['present'] else 'absent'}, incarnation "
              f"{member['incarnation']}" for member in told["members"] if member["name"] in ends]
    lines += [f"the host says: doorbells from {pair['from']} to {pair['to']}: "
              + ", ".join(f"{value} {name}" for name, value in pair.items() if name not in ("from", "to"))
              for pair in told["doorbell_faults"]]
    lines.append("")
    lines.append("what the members say:")
    for side in channel.sides:
        why = f", reason {side.reason}" if side.reason else ""
        lines.append(f"  {side.member}: {side.state}{why}, epoch {side.epoch:#x}, acknowledges {side.ack:#x}, "
                     f"{side.dropped} dropped")
    for ring in channel.rings:
        filled = "indexes that cannot be" if ring.filled is None else f"{ring.filled} of {ring.capacity}"
        lines += ["", f"  {ring.producer} -> {ring.consumer}: {filled}; tail {ring.tail}, head {ring.head}"]
        for who, counts in ((ring.producer, ring.sent), (ring.consumer, ring.taken)):
            listed = ", ".join(f"{name.replace('_', ' ')} {amount(value)}" for name, value in counts.items() if value)
            lines.append(f"    {who} counted {listed or 'nothing'}")
    rates = _rates(bed, earlier, region, channel, number)
    shown = ", ".join(f"{column.title.lower()} {column.text(rates)}" for column in _CLAIMED_RATES)
    lines += ["", f"  {ours}: {shown}"]
    return lines + _histogram(channel)


def _histogram(channel: ChannelNow) -> list[str]:
    lines: list[str] = []
    for side in channel.sides:
        total = sum(side.buckets)
        if not total:
            continue
        lines += ["", f"  round trips of {side.member}, a sample of {total}:"]
        for number, count in enumerate(side.buckets):
            if count:
                lines.append(f"    below {span(bucket_bound(number)):>7} {count:>8} {'#' * round(40 * count / total)}")
    return lines


def bucket_bound(number: int) -> float:
    """Upper bound of a bucket of round trips, seconds; that of the last one is none."""
    from idc.layout import FIRST_TRIP_BIT  # beside its only use

    return float(1 << number + FIRST_TRIP_BIT) / 1e9


def clock() -> str:
    """The time of day, for headings."""
    return time.strftime("%H:%M:%S")
