"""What the core notes of frames that Python makes: all of it, in order, whoever takes it out meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from support import local_region

from idc._core import ffi, lib
from idc.endpoint import Client, Endpoint, IncomingTransaction, Quotas, Resources
from idc.endpoint.blocking import Caller
from idc.endpoint.frames import Kind as FrameKind
from idc.errors import OutcomeUnknownError, TransactionError
from idc.layout import ChannelSpec
from idc.layout import Kind as ChannelKind
from idc.trace import Kind, file_tracer
from idc.trace.hook import MANY, MOMENT, EndpointTrace
from idc.trace.store import read
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support import LocalRegion

    from idc.trace.events import TraceEvent

COUNT = 2000


class Echo(Client):
    """Refuses each third."""

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(transaction.parameters, error=7 if transaction.parameters[0] % 3 == 2 else 0)


@pytest.fixture
def region() -> Iterator[LocalRegion]:
    with local_region([ChannelSpec("calls", ChannelKind.MESSAGE, "front", "back", 1024 * 256, 256)]) as made:
        yield made


def listed(path: Path) -> list[TraceEvent]:
    (file,) = path.glob("*.idctrace")
    return list(read(file).events())


def flows(events: list[TraceEvent], kind: Kind) -> list[int]:
    return [event.flow for event in events if event.kind == kind]


@pytest.mark.parametrize("flushing", [False, True])
def test_every_call_is_listed_in_order(tmp_path: Path, region: LocalRegion, flushing: bool) -> None:
    tracers = [file_tracer(name, tmp_path / name) for name in ("front", "back")]
    quotas = Quotas(parameter_bytes=64, status_bytes=64)
    caller = Caller(SharedPort(region.join(0), "calls"), Resources(quotas))
    back = Endpoint(SharedPort(region.join(1), "calls"), Echo(), Resources(quotas))
    caller.endpoint.trace, back.trace = (tracer.endpoint("echo") for tracer in tracers)
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            back.pump(0.01)

    def flush() -> None:
        while not stop.is_set():
            for tracer in tracers:
                tracer.flush()

    threads = [threading.Thread(target=each) for each in ((answer, flush) if flushing else (answer,))]
    for thread in threads:
        thread.start()
    refused = 0
    try:
        for number in range(COUNT):
            try:
                assert caller.transact(bytes([number & 0xFF])) == bytes([number & 0xFF])
            except TransactionError:
                refused += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join(20)
    caller.close()
    back.destroy()
    for tracer in tracers:
        tracer.close()
    front, other = (listed(tmp_path / name) for name in ("front", "back"))
    assert refused > COUNT // 4
    submitted = flows(front, Kind.SUBMIT)
    assert len(set(submitted)) == COUNT
    assert submitted == flows(front, Kind.COMPLETE) == flows(other, Kind.HANDLE) == flows(other, Kind.ANSWER)
    for events in (front, other):
        moments = [event.time for event in events
                   if event.kind in (Kind.SUBMIT, Kind.HANDLE, Kind.ANSWER, Kind.COMPLETE)]
        assert moments == sorted(moments)
    for first, second in ((front, other), (other, front)):  # one clock here: nothing comes before it was sent
        sent = {event.flow: event.time for event in first if event.kind in (Kind.SUBMIT, Kind.ANSWER)}
        came = {event.flow: event.time for event in second if event.kind in (Kind.HANDLE, Kind.COMPLETE)}
        assert all(sent[flow] <= came[flow] for flow in sent)
    tracing = [event.kind for event in front]
    assert tracing.index(Kind.CONNECT) < tracing.index(Kind.SUBMIT)


def test_what_came_with_hello_is_named_by_its_own_connection(tmp_path: Path, region: LocalRegion) -> None:
    tracer = file_tracer("back", tmp_path)
    quotas = Quotas(parameter_bytes=64, status_bytes=64)
    back = Endpoint(SharedPort(region.join(1), "calls"), Echo(), Resources(quotas))
    back.trace = tracer.endpoint("echo")
    for _ in range(2):
        front = Endpoint(SharedPort(region.join(0), "calls"), Client(), Resources(quotas))
        told: list[object] = []
        while front.submit_transaction(b"1", told.append).value != "ok":
            front.pump()
            if front.state.value != "connected":
                back.pump()
        while not told:
            back.pump()
            front.pump()
        front.destroy()
        while back.state.value == "connected":
            back.pump()
    back.destroy()
    tracer.close()
    events = [event for event in listed(tmp_path) if event.kind in (Kind.CONNECT, Kind.HANDLE, Kind.ANSWER)]
    assert [event.kind for event in events] == 2 * [Kind.CONNECT, Kind.HANDLE, Kind.ANSWER]
    assert len({event.flow for event in events if event.kind == Kind.HANDLE}) == 2


def test_many_at_once_find_room_for_their_moments(tmp_path: Path, region: LocalRegion) -> None:
    """More than the core holds: it says so, and none is noted over another."""
    tracers = [file_tracer(name, tmp_path / name) for name in ("front", "back")]
    quotas = Quotas(requests=400, parameter_bytes=64, status_bytes=64)
    front, back = (Endpoint(SharedPort(region.join(side), "calls"), Echo(), Resources(quotas, requests=400))
                   for side in (0, 1))
    for end, tracer in zip((front, back), tracers, strict=True):
        end.trace = tracer.endpoint("echo")
    while any(end.state.value != "connected" for end in (front, back)):
        front.pump()
        back.pump()
    told: list[object] = []
    for number in range(400):
        assert front.submit_transaction(bytes([number & 0xFF]), told.append, notify=False).value == "ok"
    while len(told) < 400:
        front.pump()
        back.pump()
    front.destroy()
    back.destroy()
    for tracer in tracers:
        tracer.close()
    ours, theirs = (listed(tmp_path / name) for name in ("front", "back"))
    assert len(flows(ours, Kind.SUBMIT)) == 400
    assert flows(ours, Kind.SUBMIT) == flows(theirs, Kind.HANDLE) == flows(theirs, Kind.ANSWER)
    assert flows(ours, Kind.COMPLETE) == flows(ours, Kind.SUBMIT)


def test_a_call_whose_connection_ends_was_submitted_and_no_more(tmp_path: Path, region: LocalRegion) -> None:
    tracer = file_tracer("front", tmp_path)
    quotas = Quotas(parameter_bytes=64, status_bytes=64)

    class Leaving(Client):
        def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
            endpoint.disconnect("enough")

    caller = Caller(SharedPort(region.join(0), "calls"), Resources(quotas))
    caller.endpoint.trace = tracer.endpoint("echo")
    back = Endpoint(SharedPort(region.join(1), "calls"), Leaving(), Resources(quotas))
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [back.pump(0.01) for _ in iter(stop.is_set, True)])
    thread.start()
    try:
        with pytest.raises(OutcomeUnknownError):
            caller.transact(b"1")
    finally:
        stop.set()
        thread.join(20)
    caller.close()
    back.abandon()
    tracer.close()
    kinds = [event.kind for event in listed(tmp_path)]
    assert kinds.count(Kind.SUBMIT) == 1
    assert kinds.count(Kind.COMPLETE) == 0
    assert kinds.index(Kind.CONNECT) < kinds.index(Kind.SUBMIT) < kinds.index(Kind.DISCONNECT)


def test_who_is_interrupted_while_moments_are_logged_logs_none_twice() -> None:
    logged: list[int] = []

    class Interrupted:
        """A tracer whose second event is interrupted, once."""

        lock, shift, times = threading.RLock(), 0, 0

        def log(self, type_: int, kind: int, lane: int, name: bytes, data: bytes) -> None:
            self.times += 1
            if self.times == 2:
                raise KeyboardInterrupt
            logged.extend(tag for _, _, tag in MOMENT.iter_unpack(data))

    trace = EndpointTrace(Interrupted(), 0)  # type: ignore[arg-type]
    log = trace.log
    for tag in range(200):
        log.moments[3 * tag + 1], log.moments[3 * tag + 2] = int(FrameKind.REQUEST), tag
    lib.idc_store64(ffi.addressof(log, "noted"), 200)
    with pytest.raises(KeyboardInterrupt):
        trace.drain()
    trace.drain()
    assert logged == [*range(MANY), *range(2 * MANY, 200)]  # what was in hand is lost
