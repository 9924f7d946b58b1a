"""A writer and who records, in one process: numbering, drops, hostile ends, and what an endpoint tells."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from support import LocalRegion
from trace_support import RING, trace_ring

from idc._core import ffi, lib
from idc.endpoint import Client, Endpoint, IncomingTransaction, Quotas, Resources, Result
from idc.endpoint.engine import Engine
from idc.endpoint.lifecycle import State
from idc.errors import MisuseError
from idc.layout import ChannelSpec
from idc.layout import Kind as ChannelKind
from idc.ring import load_u64
from idc.trace import Kind, RingSink, StoreWriter, Tracer, Type, file_tracer
from idc.trace.record import Recorder
from idc.trace.store import read
from idc.transport.local import meeting
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from idc.trace.events import TraceEvent

#: Transactions that the core moves.
COUNT = 10_000


@contextmanager
def recording(directory: Path, **limits: int) -> Iterator[tuple[Callable[[bool], Tracer], Callable[[], str]]]:
    """(make the tracer, wait until who records has ended: why)."""
    with trace_ring() as (channel, region, other):
        recorder = Recorder(region, other, StoreWriter(directory, "front", "back", **limits))
        reasons: list[str] = []
        stop = threading.Event()
        thread = threading.Thread(target=lambda: reasons.append(recorder.run(stop.is_set)))
        thread.start()
        try:
            def finished() -> str:
                thread.join(20)
                return reasons[0]

            yield lambda lossless: Tracer(RingSink(channel, lossless=lossless)), finished
        finally:
            stop.set()
            thread.join(20)


def recorded(directory: Path) -> list[TraceEvent]:
    (path,) = directory.glob("*.idctrace")
    found = read(path)
    assert found.unread == 0
    return list(found.events())


def users(listed: list[TraceEvent]) -> list[TraceEvent]:
    return [event for event in listed if event.kind == Kind.USER]


def test_lossless_loses_nothing_though_the_ring_is_far_too_small(tmp_path: Path) -> None:
    with recording(tmp_path) as (make, finished), make(True) as tracer:
        for n in range(5000):
            assert tracer.instant("n", b"%d" % n + bytes(n % 200))
        tracer.close()
        finished()
    listed = recorded(tmp_path)
    assert [int(event.data.split(b"\0")[0]) for event in users(listed)] == list(range(5000))
    assert [event.sequence for event in listed] == list(range(len(listed)))
    assert tracer.dropped == 0
    assert sum(event.kind == Kind.SYNC for event in listed) >= 8


def test_lossy_never_waits_and_says_exactly_what_it_dropped(tmp_path: Path) -> None:
    with trace_ring() as (channel, region, other):
        tracer = Tracer(RingSink(channel, lossless=False))
        went = [tracer.instant("n", b"%d" % n + bytes(100)) for n in range(2000)]  # nobody reads meanwhile
        assert not all(went)
        assert channel.trips.struct.dropped == tracer.dropped == went.count(False), "observers are shown it meanwhile"
        recorder = Recorder(region, other, StoreWriter(tmp_path, "front", "back"))
        while recorder.pump(0.0):
            pass
        assert tracer.instant("after")
        while recorder.pump(0.0):
            pass
        more = [tracer.instant("n", bytes(4000)) for _ in range(40)]
        thread = threading.Thread(target=recorder.run)
        thread.start()
        tracer.close()  # waits for room to say so
        thread.join(20)
    listed = recorded(tmp_path)
    told = [event.value for event in listed if event.kind == Kind.DROPPED]
    assert 2 <= len(told) < 10
    assert sum(told) == tracer.dropped
    assert len(users(listed)) == sum(went) + 1 + sum(more)
    assert tracer.sequence == len(listed) + tracer.dropped
    expected = 0
    for event in listed:
        if event.kind == Kind.DROPPED:
            expected += event.value
        assert event.sequence == expected
        expected += 1


def test_what_was_begun_ends_and_counters_count(tmp_path: Path) -> None:
    with recording(tmp_path) as (make, finished), make(True) as tracer:
        lane = tracer.lane("pump")
        with tracer.slice("outer", lane=lane):
            tracer.counter("level", -5, lane=lane)
        with pytest.raises(MisuseError, match="64 bits"):
            tracer.counter("level", 1 << 63)
        with pytest.raises(MisuseError, match="4097"):
            tracer.instant("x", bytes(4096))
        tracer.close()
        assert not tracer.instant("late")
        finished()
    found = [(event.type, event.text, event.lane) for event in users(recorded(tmp_path))]
    assert found == [(Type.BEGIN, "outer", 1), (Type.COUNTER, "level", 1), (Type.END, "", 1)]


def test_threads_of_a_domain_may_log_at_once(tmp_path: Path) -> None:
    with recording(tmp_path) as (make, finished), make(True) as tracer:
        threads = [threading.Thread(target=lambda k=k: [tracer.instant(f"{k}", b"%d" % n) for n in range(500)])
                   for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tracer.close()
        finished()
    listed = users(recorded(tmp_path))
    for k in range(4):
        assert [int(event.data) for event in listed if event.text == f"{k}"] == list(range(500))


def test_a_writer_that_writes_rubbish_loses_its_connection_and_no_more(tmp_path: Path) -> None:
    with trace_ring() as (channel, region, other):
        tracer = Tracer(RingSink(channel, lossless=True))
        tracer.instant("good")
        channel.sender.write(b"\xff" * 64)
        recorder = Recorder(region, other, StoreWriter(tmp_path, "front", "back"))
        reason = recorder.run()
        assert reason.startswith("the writer broke the rules: no trace event: type 255")
        assert not any([tracer.instant("more", bytes(4000)) for _ in range(40)][30:])
    (path,) = tmp_path.glob("*")
    assert read(path).ended == reason


def test_an_index_that_no_honest_writer_stores_ends_the_connection(tmp_path: Path) -> None:
    with trace_ring() as (channel, region, other):
        recorder = Recorder(region, other, StoreWriter(tmp_path, "front", "back"))
        channel._region.memory[channel.entry.offset + 256:channel.entry.offset + 4096] = b"\xee" * (4096 - 256)
        assert load_u64(region.memory, channel.entry.offset + 256) == 0xEEEEEEEEEEEEEEEE
        assert "broke the rules" in (reason := recorder.run()) or "died or started again" in reason


def test_a_full_file_ends_the_connection_with_the_reason(tmp_path: Path) -> None:
    with recording(tmp_path, most_bytes=50_000) as (make, finished), make(True) as tracer:
        went = [tracer.instant("n", bytes(1000)) for _ in range(200)]
        assert not went[-1]
        assert tracer.dropped > 0
        assert "reached their limit" in finished()


def test_a_writer_that_goes_in_the_middle_of_an_event_is_said_to(tmp_path: Path) -> None:
    with trace_ring() as (channel, region, other):
        tracer = Tracer(RingSink(channel, lossless=True))
        tracer.instant("whole", bytes(50))
        channel.sender.write(bytes(20))
        channel.close()
        reason = Recorder(region, other, StoreWriter(tmp_path, "front", "back")).run()
        assert "20 bytes of an unfinished event" in reason
    assert [event.text for event in users(recorded(tmp_path))] == ["whole"]


def test_who_records_may_answer_rubbish(tmp_path: Path) -> None:
    with trace_ring() as (channel, region, other):
        other.sender.write(b"\xa5" * 4000)
        tracer = Tracer(RingSink(channel, lossless=True))
        tracer.instant("first")
        recorder = Recorder(region, other, StoreWriter(tmp_path, "front", "back"))
        while recorder.pump(0.0):
            pass
        tracer.close()
        recorder.run()
    listed = recorded(tmp_path)
    assert users(listed)
    assert not [event for event in listed if event.kind == Kind.SYNC]


def test_too_small_a_ring_is_refused() -> None:
    with trace_ring(16 << 10) as (channel, _, _), pytest.raises(MisuseError, match="32768 at least"):
        RingSink(channel, lossless=True)
    assert RING > 32768


class Echo(Client):
    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        transaction.complete(transaction.parameters)


def test_both_ends_of_a_transaction_name_the_same_flow(tmp_path: Path) -> None:
    tracers = [file_tracer(name, tmp_path / name) for name in ("front", "back")]
    ends = [Endpoint(port, Echo(), Resources()) for port in meeting()]
    for end, tracer in zip(ends, tracers, strict=True):
        end.trace = tracer.endpoint("echo")
    while any(end.state is not State.CONNECTED for end in ends):
        for end in ends:
            end.pump()
    told: list[bytes] = []
    for n in range(5):
        ends[0].submit_transaction(b"%d" % n, lambda completion: told.append(completion.status))
    ends[1].submit_message(b"note", lambda completion: told.append(b"message"))
    while len(told) < 6:
        for end in ends:
            end.pump()
    ends[0].trace = None
    ends[0].submit_transaction(b"unseen")
    ends[0].destroy()
    ends[1].pump()
    ends[1].pump()
    for tracer in tracers:
        tracer.close()
    front, back = (recorded(tmp_path / name) for name in ("front", "back"))

    def flows(listed: list[TraceEvent], kind: Kind) -> list[int]:
        return [event.flow for event in listed if event.kind == kind]

    submitted, handled = flows(front, Kind.SUBMIT), flows(back, Kind.HANDLE)
    assert len(set(submitted)) == 5
    assert handled[:5] == submitted == flows(back, Kind.ANSWER)[:5]
    assert flows(front, Kind.COMPLETE) == submitted
    assert flows(back, Kind.SUBMIT) == flows(front, Kind.HANDLE) == flows(back, Kind.COMPLETE)
    assert flows(back, Kind.SUBMIT)[0] not in submitted
    states = [event.text for event in front if event.kind in (Kind.STATE, Kind.CONNECT)]
    assert states == ["absent", "present", "connected"]
    assert [event.text for event in back if event.kind == Kind.DISCONNECT]
    assert any(event.kind == Kind.DOORBELL for event in front)
    assert [event.text for event in front if event.kind == Kind.LANE] == ["echo"]


@pytest.mark.parametrize("turned_on", ["before", "meanwhile"])
def test_transactions_that_the_core_moves_are_logged_too(tmp_path: Path, turned_on: str) -> None:
    region = LocalRegion([ChannelSpec("calls", ChannelKind.MESSAGE, "front", "back", 64 * 256, 256)])
    tracers = [file_tracer(name, tmp_path / name) for name in ("front", "back")]
    quotas = Quotas(requests=8, messages=2, parameter_bytes=64, status_bytes=64)
    engines = Engine(8, quotas), Engine(8, quotas, handler=ffi.addressof(lib, "idc_handle_echo"))
    completed = 0

    def run(count: int) -> None:
        nonlocal completed
        sent, wanted = 0, completed + count
        while completed < wanted:
            while sent < count and engines[0].submit(b"x" * 40) is Result.OK:
                sent += 1
            for engine in engines:
                completed += len(engine.poll(0.0))

    ends: list[Endpoint] = []
    try:
        with ExitStack() as held:
            front, back = (held.enter_context(region.join(member)) for member in (0, 1))

            def abandon() -> None:
                for end in ends:
                    end.abandon()

            held.callback(abandon)
            ends += [engine.endpoint(SharedPort(mapped, "calls", spin=0.0, release=lambda: None))
                    for engine, mapped in zip(engines, (front, back), strict=True)]
            if turned_on == "before":
                for end, tracer in zip(ends, tracers, strict=True):
                    end.trace = tracer.endpoint("calls")
            while not all(end.state is State.CONNECTED for end in ends):
                for end in ends:
                    end.pump(0.001)
            if turned_on == "meanwhile":
                run(100)
                for end, tracer in zip(ends, tracers, strict=True):
                    end.trace = tracer.endpoint("calls")
                for engine in engines:
                    engine.poll(0.0)
            run(COUNT)
            for end in ends:
                end.trace = None
            for engine in engines:
                engine.poll(0.0)
            run(100)
            for tracer in tracers:
                tracer.close()
    finally:
        region.close()
    front_, back_ = (recorded(tmp_path / name) for name in ("front", "back"))
    found = [[event for event in listed if event.kind == kind] for listed, kind in (
        (front_, Kind.SUBMIT), (back_, Kind.HANDLE), (back_, Kind.ANSWER), (front_, Kind.COMPLETE))]
    assert [len(listed) for listed in found] == [COUNT] * 4
    for submit, handle, answer, complete in zip(*found, strict=True):
        assert submit.flow == handle.flow == answer.flow == complete.flow
        assert submit.time <= handle.time <= answer.time <= complete.time  # one clock, here
