"""Draws aligned traces: a process for each domain, a row for each lane, arrows from submissions to their handling.

Depends on testbed.trace.align, testbed.trace.perfetto and idc.trace.
"""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from idc.errors import ProtocolError
from idc.trace import events, store
from idc.trace.events import Kind, Type, printable
from testbed.errors import SpecError
from testbed.trace.align import Aligned, Source, align, load, spans
from testbed.trace.perfetto import EventType, Writer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc.trace.events import TraceEvent

#: Kinds that are means, not ends: not drawn.
_HIDDEN: Final = frozenset({Kind.LANE, Kind.PING, Kind.SYNC})
_PAIRED: Final = frozenset({Kind.SUBMIT, Kind.HANDLE, Kind.ANSWER, Kind.COMPLETE})
#: What was submitted, by its frame's kind.
_SUBMITTED: Final = {2: "message", 4: "transaction", 13: "request about a buffer"}
_OWN: Final = "its own events"
#: Perfetto's times are 64 bits, signed; only one that lies is beyond.
_MOST: Final = (1 << 63) - 1


@dataclass(frozen=True)
class DomainReport:
    """What became of one domain's traces. Bounds in ns: of the time of any of its events, on the reference's clock.

    Attributes:
        name: of the domain.
        files: how many.
        events: in them.
        dropped: events that its writers say they dropped.
        missing: events that are missing besides.
        unread: bytes that a crash cut off, or that are being written.
        best, worst: least and greatest bound.
        steps: how often its clock was stepped, against the next one on the way to the reference.
        ended: why each file ended; empty for one that does not say.
        broken: what stood where an event should.
    """

    name: str
    files: int
    events: int
    dropped: int
    missing: int
    unread: int
    best: int
    worst: int
    steps: int
    ended: tuple[str, ...]
    broken: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was merged.

    Attributes:
        reference: the domain on whose clock everything is.
        domains: in the order of their names.
        arrows: submissions that were joined to their handling in another trace.
        across: those of them between two domains.
        seconds: from the first event to the last.
    """

    reference: str
    domains: tuple[DomainReport, ...]
    arrows: int
    across: int
    seconds: float


class _Item(NamedTuple):
    """Something to draw. At one time, what was added first comes first: within a row, what was logged first."""

    at: int
    serial: int
    track: int
    type: EventType
    name: str
    category: str
    notes: dict[str, str | int]
    flow: int
    value: int | None


def merge(paths: Sequence[Path | str], output: Path | str, *, reference: str = "") -> Report:
    """Merge files into one for Perfetto, which is written whole or not at all.

    Raises:
        SpecError: a file is no trace, there are no events, or the domains cannot be put on one clock.
        OSError: a file cannot be read or written.
    """
    output = Path(output)
    try:
        sources = [load(store.read(Path(path))) for path in paths]
    except ProtocolError as error:
        raise SpecError(str(error)) from error
    if not any(source.events for source in sources):
        raise SpecError("there are no events in these traces", hint="was anything logged, and its tracer closed?")
    aligned = align(sources, reference)
    with tempfile.NamedTemporaryFile("wb", dir=output.parent, prefix=f".{output.name}.", delete=False) as staged:
        try:
            report = _Drawing(aligned, Writer(staged.write)).draw()
            staged.close()
            os.chmod(staged.name, 0o644)
            os.replace(staged.name, output)
        except BaseException:
            Path(staged.name).unlink(missing_ok=True)
            raise
    return report


class _Drawing:
    def __init__(self, aligned: Aligned, writer: Writer) -> None:
        self._aligned = aligned
        self._writer = writer
        self._items: list[_Item] = []
        self._processes: dict[str, int] = {}
        self._rows: dict[tuple[int, int, str], int] = {}
        self._lanes: dict[tuple[int, int], str] = {}
        self._flows: dict[tuple[int, int], int] = {}
        self._bounds: dict[str, list[int]] = defaultdict(list)
        self._first = self._last = 0

    def draw(self) -> Report:
        """Write everything."""
        aligned = self._aligned
        times: list[list[int]] = []
        for number, source in enumerate(aligned.sources):
            found = [aligned.at(source.file.domain, event.time) for event in source.events]
            times.append([at for at, _ in found])
            self._bounds[source.file.domain] += [bound for _, bound in found]
            for event in source.events:
                if event.kind == Kind.LANE:
                    self._lanes[number, event.lane] = event.text
        flat = [at for each in times for at in each]
        self._first, self._last = min(flat), max(flat)
        for index, (submit, handle) in enumerate(aligned.arrows, 1):
            self._flows[submit.source, submit.begin] = self._flows[handle.source, handle.begin] = index
        for index, name in enumerate(sorted(self._bounds), 1):
            self._processes[name] = self._writer.process(index, name, self._labels(name))
        for number, source in enumerate(aligned.sources):
            self._single(number, source, times[number])
            for kind in (Kind.SUBMIT, Kind.HANDLE):
                self._submissions(number, source, times[number], kind)
        for item in sorted(self._items, key=lambda item: item[:2]):
            self._writer.event(min(item.at - self._first, _MOST), item.track, item.type, item.name, item.category,
                               notes=item.notes, flow=item.flow, value=item.value)
        return self._report()

    def _labels(self, domain: str) -> list[str]:
        if domain == self._aligned.reference:
            return ["the clock of this trace"]
        bounds = self._bounds[domain] or [0]
        return [f"clock within {min(bounds)} to {max(bounds)} ns of {self._aligned.reference}'s"]

    def _row(self, number: int, lane: int, below: str = "", *, counter: bool = False) -> int:
        """The track of a lane, or one below it."""
        key = number, lane, below
        if key not in self._rows:
            if below:
                parent, name = self._row(number, lane), below
            else:
                parent = self._processes[self._aligned.sources[number].file.domain]
                name = self._lanes.get((number, lane), f"lane {lane}") if lane else _OWN
            self._rows[key] = self._writer.track(parent, name, counter=counter)
        return self._rows[key]

    def _add(self, at: int, track: int, type_: EventType, name: str = "", category: str = "",
             notes: dict[str, str | int] | None = None, flow: int = 0, value: int | None = None) -> None:
        self._items.append(_Item(at, len(self._items), track, type_, name, category, notes or {}, flow, value))

    def _single(self, number: int, source: Source, times: Sequence[int]) -> None:
        """All but submissions. Slices that were not ended end with the trace; ends without a beginning are left out."""
        depth: dict[int, int] = defaultdict(int)
        before: dict[int, int] = {}  # threads share a lane, and domains lie: time does not go back within a row
        for event, time in zip(source.events, times, strict=True):
            if event.kind in _HIDDEN or event.kind in _PAIRED:
                continue
            if event.type == Type.COUNTER:
                if len(event.data) == events.COUNTER.size:
                    row = self._row(number, event.lane, event.text or "counter", counter=True)
                    self._add(time, row, EventType.COUNTER, value=events.COUNTER.unpack(event.data)[0])
                continue
            row = self._row(number, event.lane)
            at = before[row] = max(time, before.get(row, time))
            if event.type == Type.END:
                if depth[row]:
                    depth[row] -= 1
                    self._add(at, row, EventType.SLICE_END)
                continue
            type_ = EventType.SLICE_BEGIN if event.type == Type.BEGIN else EventType.INSTANT
            depth[row] += event.type == Type.BEGIN
            self._add(at, row, type_, *_words(event))
        for row, open_ in depth.items():
            for _ in range(open_):
                self._add(self._last, row, EventType.SLICE_END)

    def _submissions(self, number: int, source: Source, times: Sequence[int], kind: Kind) -> None:
        """Each on a row of its slot, where one at a time is under way, so that slices nest."""
        over: dict[int, list[int]] = defaultdict(list)
        for event, at in zip(source.events, times, strict=True):
            if event.kind == Kind.DISCONNECT:
                over[event.lane].append(at)
        until: dict[int, int] = {}
        found = sorted(spans(number, source, kind), key=lambda span: span.begin)
        verb = "submitted" if kind is Kind.SUBMIT else "handled"
        again: dict[tuple[int, int, int], int] = {}  # when a slot was used again
        limit: dict[int, int] = {}
        for span in reversed(found):
            slot = _slot(source.events[span.begin])
            limit[span.begin] = again.get(slot, self._last)
            again[slot] = times[span.begin]
        for span in found:
            event, begin = source.events[span.begin], times[span.begin]
            row = self._row(number, event.lane, f"{_SUBMITTED.get(event.detail, 'request')}s {verb}, "
                                                f"slot {event.value & 0xFFFF}")
            begin = max(begin, until.get(row, begin))  # clocks of threads of one domain may differ by a little
            if span.end >= 0:
                end = times[span.end]
            else:
                end = min([limit[span.begin], *(at for at in over[event.lane] if at >= begin)])
            until[row] = end = max(begin, end)
            notes: dict[str, str | int] = {"tag": event.value}
            if span.end < 0:
                notes["end"] = "not seen"
            name = f"{_SUBMITTED.get(event.detail, 'request')} {verb}"
            self._add(begin, row, EventType.SLICE_BEGIN, name, "idc", notes,
                      self._flows.get((number, span.begin), 0))
            self._add(end, row, EventType.SLICE_END)

    def _report(self) -> Report:
        aligned = self._aligned
        reports = []
        for name in sorted(self._bounds):
            mine = [source for source in aligned.sources if source.file.domain == name]
            bounds = self._bounds[name] or [0]
            reports.append(DomainReport(
                name, len(mine), sum(len(source.events) for source in mine), sum(source.dropped for source in mine),
                sum(source.missing for source in mine), sum(source.file.unread for source in mine), min(bounds),
                max(bounds), sum(step.steps for step in aligned.paths[name]),
                tuple(source.file.ended for source in mine),
                tuple(source.file.broken for source in mine if source.file.broken)))
        names = [source.file.domain for source in aligned.sources]
        across = sum(names[submit.source] != names[handle.source] for submit, handle in aligned.arrows)
        return Report(aligned.reference, tuple(reports), len(aligned.arrows), across, (self._last - self._first) / 1e9)


def _slot(event: TraceEvent) -> tuple[int, int, int]:
    return event.lane, event.detail, event.value & 0xFFFF


def _words(event: TraceEvent) -> tuple[str, str, dict[str, str | int]]:
    """Name, category and notes of an event."""
    notes: dict[str, str | int] = {}
    if event.data:
        notes["data"] = printable(event.data) if event.data.isascii() else event.data.hex()
    if event.kind == Kind.USER:
        return event.text or "event", "user", notes
    name = Kind(event.kind).name.lower()
    if event.kind == Kind.DROPPED:
        return f"{event.value} events dropped", "idc", notes
    if event.kind == Kind.DOORBELL:
        return "doorbell", "idc", {"count": event.value}
    return f"{name}: {event.text}" if event.name else name, "idc", notes
