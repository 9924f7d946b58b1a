"""The core's transactions against plain endpoints in both roles, and against a peer that means ill."""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import LocalRegion

from idc._core import ffi, lib
from idc.endpoint import Client, Completion, Endpoint, Quotas, Resources, Result, State, frames
from idc.endpoint.engine import Engine
from idc.endpoint.frames import Kind
from idc.errors import DisconnectedError, MisuseError, TooBigError
from idc.layout import ChannelSpec
from idc.layout import Kind as ChannelKind
from idc.transport.shared import SharedPort

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from idc.endpoint import IncomingMessage, IncomingTransaction
    from idc.transport.shared import SharedCarrier

CHANNELS = (ChannelSpec("calls", ChannelKind.MESSAGE, "front", "back", 64 * 256, 256),)
QUOTAS = Quotas(requests=4, messages=2, parameter_bytes=16, status_bytes=16)
ECHO = ffi.addressof(lib, "idc_handle_echo")


class Server(Client):
    """Answers at once, or keeps what came."""

    def __init__(self, *, keeps: bool = False) -> None:
        self.keeps = keeps
        self.held: list[IncomingTransaction] = []
        self.messages: list[bytes] = []

    def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
        if self.keeps:
            self.held.append(transaction)
        else:
            transaction.complete(transaction.parameters)

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        self.messages.append(message.body)
        message.complete()


@contextlib.contextmanager
def ports() -> Iterator[tuple[SharedPort, SharedPort]]:
    region = LocalRegion(CHANNELS)
    try:
        with region.join(0) as front, region.join(1) as back:
            pair = tuple(SharedPort(mapped, "calls", spin=0.0, release=lambda: None) for mapped in (front, back))
            try:
                yield pair[0], pair[1]
            finally:
                for port in pair:
                    port.close()
    finally:
        region.close()


def settle(*endpoints: Endpoint, until: Callable[[], bool] = lambda: False) -> None:
    for _ in range(200):
        if not any(endpoint.pump(0.0) for endpoint in endpoints) or until():
            return


def connect(*endpoints: Endpoint) -> None:
    for _ in range(50):
        for endpoint in endpoints:
            endpoint.pump(0.002)
        if all(endpoint.state is State.CONNECTED for endpoint in endpoints):
            return
    raise AssertionError([(endpoint.state, endpoint.reason) for endpoint in endpoints])


def kinds(pair: tuple[SharedPort, SharedPort], engine: Engine, plain: Client) -> tuple[Endpoint, Endpoint]:
    ends = engine.endpoint(pair[0]), Endpoint(pair[1], plain, Resources(QUOTAS, requests=8))
    connect(*ends)
    return ends


def test_the_core_submits_to_a_plain_endpoint() -> None:
    with ports() as pair:
        engine = Engine(8, QUOTAS)
        front, back = kinds(pair, engine, Server())
        assert [engine.submit(bytes([n]) * n, 100 + n) for n in range(4)] == [Result.OK] * 4
        assert engine.submit(b"") is Result.BACK_PRESSURED
        assert engine.outstanding == 4
        settle(front, back)
        assert sorted(engine.poll()) == [(100 + n, Completion(Result.OK, 0, bytes([n]) * n)) for n in range(4)]
        assert engine.outstanding == 0
        with pytest.raises(TooBigError, match="17 bytes in a request, the peer accepts 16"):
            engine.submit(bytes(17))


def test_a_plain_endpoint_submits_to_a_handler_in_the_core() -> None:
    with ports() as pair:
        front, back = kinds(pair, Engine(8, QUOTAS, handler=ECHO), Client())
        for _ in range(3):  # slots serve again
            done: list[Completion] = []
            assert all(back.submit_transaction(bytes([n]), done.append) is Result.OK for n in range(4))
            settle(front, back)
            assert done == [Completion(Result.OK, 0, bytes([n])) for n in range(4)]
        assert front.state is back.state is State.CONNECTED


def test_a_handler_that_fails_is_told_of() -> None:
    with ports() as pair:
        engine = Engine(8, Quotas(4, 2, 64, 16), handler=ECHO)
        front = engine.endpoint(pair[0])
        back = Endpoint(pair[1], Client(), Resources(Quotas(4, 2, 16, 8)))
        connect(front, back)
        done: list[Completion] = []
        back.submit_transaction(bytes(9), done.append)  # its own status may have 8
        settle(front, back)
        assert done == [Completion(Result.ERROR, 0xFFFF, b"", "the handler failed")]


def test_both_sides_in_the_core_and_messages_beside_them() -> None:
    with ports() as pair:
        server = Server()
        one, two = Engine(8, QUOTAS), Engine(8, QUOTAS, handler=ECHO)
        front, back = one.endpoint(pair[0]), two.endpoint(pair[1], server)
        connect(front, back)
        sent: list[Completion] = []
        for round_ in range(100):
            for n in range(4):
                assert one.submit(b"abcd", round_ * 4 + n) is Result.OK
            if round_ % 10 == 0:
                front.submit_message(bytes([round_]), sent.append)
            back.pump(0.1)
            assert {cookie for cookie, _ in one.poll(0.1)} == {round_ * 4 + n for n in range(4)}
        settle(front, back)
        assert server.messages == [bytes([n]) for n in range(0, 100, 10)]
        assert len(sent) == 10


def test_python_has_slots_of_its_own_beside_the_core() -> None:
    with ports() as pair:
        engine = Engine(8, QUOTAS, python_requests=2)
        front, back = kinds(pair, engine, Server())
        done: list[Completion] = []
        assert front.submit_transaction(b"p", done.append) is Result.OK
        assert [engine.submit(b"c", n) for n in range(3)] == [Result.OK, Result.OK, Result.BACK_PRESSURED]
        settle(front, back)
        assert done == [Completion(Result.OK, 0, b"p")]
        assert len(engine.poll()) == 2


def test_what_a_lost_connection_had_under_way_is_unknown_and_the_next_one_is_clean() -> None:
    with ports() as pair:
        engine = Engine(8, QUOTAS)
        server = Server(keeps=True)
        front, back = kinds(pair, engine, server)
        assert engine.submit(b"x", 7) is Result.OK
        settle(front, back)
        assert len(server.held) == 1
        back.disconnect("enough")
        settle(front)
        assert engine.poll() == [(7, Completion(Result.OUTCOME_UNKNOWN, reason=front.reason))]
        assert "enough" in front.reason
        assert engine.submit(b"x") is Result.NOT_CONNECTED
        assert server.held.pop().complete() is Result.CLOSED
        server.keeps = False
        connect(front, back)
        assert engine.submit(b"y", 8) is Result.OK
        settle(front, back)
        assert engine.poll() == [(8, Completion(Result.OK, 0, b"y"))]
        front.destroy()
        assert engine.submit(b"z") is Result.CLOSED


def test_requests_that_the_core_leaves_open_are_the_clients() -> None:
    with ports() as pair:
        server = Server(keeps=True)
        engine = Engine(0, QUOTAS)
        front = engine.endpoint(pair[0], server)
        back = Endpoint(pair[1], Client(), Resources(QUOTAS))
        connect(front, back)
        done: list[Completion] = []
        for round_ in range(3):
            for n in range(4):
                assert back.submit_transaction(bytes([n]), done.append) is Result.OK
            settle(front, back)
            for transaction in reversed(server.held):
                transaction.complete(transaction.parameters)
            server.held.clear()
            settle(front, back)
            assert [one.status for one in done] == [b"\3", b"\2", b"\1", b"\0"] * (round_ + 1)


def test_an_engine_serves_one_endpoint_at_a_time_and_then_another() -> None:
    with ports() as pair, ports() as other:
        engine = Engine(8, QUOTAS)
        front, back = kinds(pair, engine, Server())
        with pytest.raises(MisuseError, match="serve another endpoint"):
            engine.endpoint(other[0])
        assert engine.submit(b"a", 1) is Result.OK
        settle(front, back)
        assert len(engine.poll()) == 1
        front.destroy()
        again = engine.endpoint(other[0])
        connect(again, Endpoint(other[1], Server(), Resources(QUOTAS)))
        again.destroy()


@pytest.mark.parametrize(("requests", "mine"), [(-1, 0), (0, -1), (40000, 0), (32768, 1)])
def test_slots_that_cannot_be_are_refused(requests: int, mine: int) -> None:
    with pytest.raises(MisuseError):
        Engine(requests, python_requests=mine)


# -- a peer that means ill: the plain endpoint is the reference


class Party:
    """An endpoint, plain or with an engine, and a peer that sends it what it likes."""

    def __init__(self, pair: tuple[SharedPort, SharedPort], kind: str) -> None:
        self.server = Server(keeps=kind.endswith("keeps"))
        self.log: list[object] = []
        self.engine: Engine | None = None
        self.cookie = 0
        self.tags: dict[int, int] = {}
        if kind.startswith("engine"):
            handler = ffi.NULL if kind.endswith("keeps") else ECHO
            self.engine = Engine(4, QUOTAS, handler=handler, messages=2)
            self.endpoint = self.engine.endpoint(pair[0], self.server)
        else:
            self.endpoint = Endpoint(pair[0], self.server, Resources(QUOTAS, requests=4, messages=2))
        self.peer = self._meet(pair[1])
        self.peer.post(frames.hello(QUOTAS))
        self.peer.flush()
        connect(self.endpoint)
        assert [frame[0] for frame in self._taken()] == [Kind.HELLO]

    def _meet(self, port: SharedPort) -> SharedCarrier:
        for _ in range(50):
            self.endpoint.pump(0.0)
            port.look()
            if (carrier := port.connection()) is not None:
                return carrier
        raise AssertionError("they do not meet")

    def _taken(self) -> Sequence[bytes]:
        try:
            return self.peer.take(0.0)
        except DisconnectedError:
            return ()

    def submit(self, length: int) -> None:
        number, self.cookie = self.cookie, self.cookie + 1
        if self.engine is not None:
            result = self.engine.submit(bytes(length), number)
            self.engine.notify()
        else:
            result = self.endpoint.submit_transaction(bytes(length), lambda done: self.log.append((number, done)))
        self.log.append(result)
        for frame in self._taken():
            kind, error, tag, body = frames.parse(frame)
            self.log.append((kind, error, body))
            if kind == Kind.REQUEST:
                self.tags[number] = tag

    def send(self, frame: bytes) -> None:
        with contextlib.suppress(DisconnectedError):
            self.peer.post(frame)
            self.peer.flush()
        self.look()

    def finish(self, index: int) -> None:
        if self.server.held:
            one = self.server.held.pop(index % len(self.server.held))
            self.log.append(one.complete(one.parameters))
            self.look()

    def look(self) -> None:
        was = self.endpoint.connections
        for _ in range(3):
            if self.endpoint.state is State.CONNECTED:
                self.endpoint.pump(0.0)
        if self.engine is not None:
            done, self.engine.completed = self.engine.completed, []
            self.log += done
        assert self.endpoint.connections == was
        self.log += [frames.parse(frame) for frame in self._taken()]
        self.log.append((self.endpoint.state, self.endpoint.reason, [t.parameters for t in self.server.held],
                         list(self.server.messages)))


BODY = st.integers(0, 18).map(bytes)
TAG = st.one_of(st.sampled_from([0, 1, 2, 5, 0x10000, 0x10001, 0x8000FFFF, 0xFFFFFFFF]), st.integers(0, 2**32 - 1))
OPERATION = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 16)),
    st.tuples(st.just("answer"), st.integers(0, 5), st.sampled_from([0, 0, 0, 7, 0xFFFF]), BODY),
    st.tuples(st.just("request"), TAG, BODY),
    st.tuples(st.just("request"), st.integers(0, 3), st.integers(0, 16).map(bytes)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("frame"), st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 255]), st.sampled_from([0, 0, 0, 1]),
              st.sampled_from([0, 1, 0xFFFF]), TAG, BODY),
    st.tuples(st.just("raw"), st.binary(max_size=40)),
)  # fmt: skip


def play(party: Party, operations: Sequence[tuple[object, ...]]) -> list[object]:
    for name, *arguments in operations:
        if party.endpoint.state is not State.CONNECTED:
            break
        if name == "submit":
            party.submit(arguments[0])  # type: ignore[arg-type]
        elif name == "answer":
            number, error, body = arguments
            if number in party.tags:  # it may have been answered before
                party.send(frames.encode(Kind.REPLY, party.tags[number], body, error))  # type: ignore[arg-type]
        elif name == "request":
            party.send(frames.encode(Kind.REQUEST, *arguments))  # type: ignore[arg-type]
        elif name == "finish":
            party.finish(arguments[0])  # type: ignore[arg-type]
        elif name == "frame":
            kind, flags, error, tag, body = arguments
            party.send(frames.HEADER.pack(kind, flags, error, tag) + body)  # type: ignore[operator]
        else:
            party.send(arguments[0])  # type: ignore[arg-type]
    return party.log


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATION, max_size=25), st.sampled_from(["echoes", "keeps"]))
def test_the_core_and_the_session_judge_alike(operations: list[tuple[object, ...]], client: str) -> None:
    logs: deque[list[object]] = deque()
    for kind in ("plain", "engine"):
        with ports() as pair:
            party = Party(pair, f"{kind} {client}")
            try:
                logs.append(_comparable(play(party, operations)))
            finally:
                party.endpoint.abandon()
                party.peer.close()
    assert logs[0] == logs[1]


def _comparable(log: list[object]) -> list[object]:
    """Slots are reused in another order: so tags of this side's requests may differ, where the peer names them back,
    and the order in which those complete that were outstanding at the end."""
    kept = [str(entry) for entry in log if "not outstanding" not in str(entry)]
    unknown = sorted(entry for entry in kept if "OUTCOME_UNKNOWN" in entry)
    rest = [entry for entry in kept if "OUTCOME_UNKNOWN" not in entry]
    return [*rest, *unknown, "not outstanding" in str(log)]


def test_the_core_does_not_wait_for_a_frame_that_it_could_not_take() -> None:
    with ports() as pair:
        engine = Engine(8, QUOTAS, handler=ECHO)
        front, back = kinds(pair, engine, Client())
        core, room, second = engine._core, ffi.new("char[]", 4096), 10**9
        events = ffi.new("struct idc_event[]", 4)
        core.budget = 0
        assert lib.idc_engine_run(core, room, 4096, events, 4, 0, second) == 0
        core.budget = 100
        assert lib.idc_engine_run(core, room, 4096, events, 0, 0, second) == lib.IDC_EINVAL
        assert lib.idc_engine_run(core, room, 8, events, 4, 0, second) == lib.IDC_EINVAL
        assert lib.idc_engine_run(core, room, 4096, events, 4, 0, 1000) == lib.IDC_TIMEOUT
        assert front.state is back.state is State.CONNECTED


@pytest.mark.parametrize("length", [0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 65, 72, 100])
def test_small_and_other_frames_pass_whole(length: int) -> None:
    quotas = Quotas(requests=4, messages=2, parameter_bytes=128, status_bytes=128)
    with ports() as pair:
        one, two = Engine(8, quotas), Engine(8, quotas, handler=ECHO)
        front, back = one.endpoint(pair[0]), two.endpoint(pair[1])
        connect(front, back)
        for round_ in range(70):  # more than the ring has slots
            body = bytes((round_ + at) % 251 for at in range(length))
            assert one.submit(body, round_) is Result.OK
            back.pump(0.1)
            assert list(one.poll(0.1)) == [(round_, Completion(Result.OK, 0, body))]
