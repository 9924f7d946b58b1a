"""Puts the traces of several domains on one clock. Depends on idc.trace.

Each file knows how its domain's clock stands to that of the domain that recorded it, from the comparisons in it. So the
domains are a graph; one of them is the reference, and each other is reached over the fewest comparisons. Where the ends
of a transaction are both there, it is used too: it was not handled before it was submitted, nor its answer
seen before it was given.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from idc.trace import events
from idc.trace.clock import ClockMap, Limits, RoundTrip
from idc.trace.events import Kind, TraceEvent
from testbed.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from idc.trace.store import TraceFile

#: Which event ends what another began.
_ENDS: Final = {Kind.COMPLETE: Kind.SUBMIT, Kind.ANSWER: Kind.HANDLE}


@dataclass
class Source:
    """One file, read.

    Attributes:
        file: what it says of itself.
        events: all of it, in the order they were logged.
        dropped: what its writer says it dropped.
        missing: what is missing besides, by the numbers of the events.
    """

    file: TraceFile
    events: list[TraceEvent]
    dropped: int = 0
    missing: int = 0


def load(file: TraceFile) -> Source:
    """Read all of it, and count what is not there."""
    source = Source(file, list(file.events()))
    expected = 0
    for event in file.logged():
        gap = event.sequence - expected & 0xFFFFFFFF
        if event.kind == Kind.DROPPED:
            source.dropped += event.value
            gap -= event.value
        source.missing += max(gap, 0)
        expected = event.sequence + 1
    return source


class Span(NamedTuple):
    """A submission, as the one end or the other saw it: the source, and its events' places in that; -1: no end."""

    source: int
    begin: int
    end: int


class Arrow(NamedTuple):
    """A submission and its handling."""

    submit: Span
    handle: Span


@dataclass
class Aligned:
    """Domains on one clock.

    Attributes:
        reference: the domain whose clock it is.
        sources: as given.
        paths: for each domain, the comparisons that lead to the reference.
        arrows: submissions that both ends logged.
    """

    reference: str
    sources: Sequence[Source]
    paths: dict[str, list[ClockMap]]
    arrows: list[Arrow] = field(default_factory=list)

    def at(self, domain: str, time: int) -> tuple[int, int]:
        """(time of the reference's clock, bound), ns."""
        bound = 0
        for step in self.paths[domain]:
            offset, doubt = step.at(time)
            time, bound = time + offset, bound + doubt
        return time, bound


Edges = dict[tuple[str, str], Limits]


def align(sources: Sequence[Source], reference: str = "") -> Aligned:
    """Find each domain's way to the reference: by default the domain that recorded most of the files.

    Raises:
        SpecError: no such domain, or one whose clock was never compared with the others'.
    """
    edges = _comparisons(sources)
    domains = sorted({source.file.domain for source in sources})
    recorders = [source.file.recorder for source in sources]
    known = sorted({*domains, *recorders})
    if reference and reference not in known:
        raise SpecError(f"no domain {reference!r} in these traces", hint=f"there are {', '.join(known)}")
    reference = reference or max(known, key=lambda name: (recorders.count(name), name))
    rough = Aligned(reference, sources, _paths(edges, domains, reference))
    arrows = list(_arrows(rough))
    _tighten(edges, sources, arrows)
    return Aligned(reference, sources, _paths(edges, domains, reference), arrows)


def _comparisons(sources: Iterable[Source]) -> Edges:
    edges: Edges = {}
    for source in sources:
        pair = source.file.domain, source.file.recorder
        if pair[0] == pair[1]:
            continue
        found = Limits.of(RoundTrip(*events.SYNC.unpack(event.data)) for event in source.events
                          if event.kind == Kind.SYNC and len(event.data) == events.SYNC.size)
        limits = edges.setdefault(pair, Limits([], []))
        limits.upper += found.upper
        limits.lower += found.lower
    return edges


def _paths(edges: Edges, domains: Sequence[str], reference: str) -> dict[str, list[ClockMap]]:
    """From each domain to the reference, over the fewest comparisons."""
    steps: dict[str, dict[str, Limits]] = defaultdict(dict)
    for (one, other), limits in edges.items():
        steps[other][one] = limits
        steps[one].setdefault(other, limits.inverse())
    found: dict[str, list[ClockMap]] = {reference: []}
    reached = [reference]
    for nearer in reached:
        for name, limits in steps[nearer].items():
            if name in found:
                continue
            try:
                found[name] = [ClockMap(limits), *found[nearer]]
            except ValueError:  # one way only
                continue
            reached.append(name)
    for name in domains:
        if name not in found:
            raise SpecError(f"the clock of domain {name} was never compared with that of {reference}, directly or over "
                            "other domains", hint="add the files of the domains between, or leave its own out")
    return found


def spans(number: int, source: Source, begin: Kind) -> Iterator[Span]:
    """The submissions that one source saw begin with SUBMIT, or with HANDLE."""
    under_way: dict[tuple[int, int, int], int] = {}
    for i, event in enumerate(source.events):
        what = event.lane, event.detail, event.value
        if event.kind == begin:
            if (before := under_way.pop(what, None)) is not None:
                yield Span(number, before, -1)  # its end was lost, or its connection was
            under_way[what] = i
        elif _ENDS.get(Kind(event.kind)) is begin and (before := under_way.pop(what, None)) is not None:
            yield Span(number, before, i)
    yield from (Span(number, i, -1) for i in under_way.values())


def _arrows(aligned: Aligned) -> Iterator[Arrow]:
    """Join each HANDLE to the last SUBMIT of its flow before it: tags come again, so a flow can be several."""
    submits: dict[int, list[tuple[int, Span]]] = defaultdict(list)
    for number, source in enumerate(aligned.sources):
        for span in spans(number, source, Kind.SUBMIT):
            event = source.events[span.begin]
            at, bound = aligned.at(source.file.domain, event.time)
            submits[event.flow].append((at - bound, span))
    for found in submits.values():
        found.sort()
    taken: set[Span] = set()
    for number, source in enumerate(aligned.sources):
        for span in sorted(spans(number, source, Kind.HANDLE), key=lambda span: span.begin):
            event = source.events[span.begin]
            found = submits.get(event.flow, [])
            at, bound = aligned.at(source.file.domain, event.time)
            last = bisect.bisect_right(found, at + bound, key=lambda each: each[0]) - 1
            if last >= 0 and found[last][1] not in taken:
                taken.add(found[last][1])
                yield Arrow(found[last][1], span)


def _tighten(edges: Edges, sources: Sequence[Source], arrows: Iterable[Arrow]) -> None:
    for submit, handle in arrows:
        one, other = sources[submit.source], sources[handle.source]
        pair = one.file.domain, other.file.domain
        there = one.events[submit.begin].time, other.events[handle.begin].time
        back = (other.events[handle.end].time, one.events[submit.end].time) if handle.end >= 0 <= submit.end else None
        if (limits := edges.get(pair)) is not None:
            limits.there(*there)
            if back is not None:
                limits.back(*back)
        elif (limits := edges.get((pair[1], pair[0]))) is not None:
            limits.back(*there)
            if back is not None:
                limits.there(*back)
