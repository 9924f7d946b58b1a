"""Endpoints against peers that misbehave, clients that raise, and ports that do not fit; statements of the example."""

from __future__ import annotations

import ast
import contextlib
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ports import free_port

from idc.domain import VARIABLE, Domain, Service
from idc.endpoint import Client, Completion, Endpoint, IncomingMessage, IncomingTransaction, Quotas, Resources, Result
from idc.endpoint.blocking import Caller
from idc.endpoint.frames import Kind, encode, hello
from idc.endpoint.lifecycle import State
from idc.endpoint.pauses import FIRST_PAUSE
from idc.endpoint.stream import Stream
from idc.errors import MisuseError, PeerGoneError, TimedOutError
from idc.transport import tcp
from idc.transport.address import open_port
from idc.transport.local import LocalCarrier, LocalPort, meeting

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[3]


class Hostile:
    """The other end of a meeting, frame by frame."""

    def __init__(self, port: LocalPort) -> None:
        self.port = port
        self.carrier: LocalCarrier | None = None

    def join(self, endpoint: Endpoint, accepts: Quotas | None = None) -> LocalCarrier:
        deadline = time.monotonic() + 10
        self.carrier = None
        while self.carrier is None:
            assert time.monotonic() < deadline
            self.port.look()
            endpoint.pump(0.01)
            self.carrier = self.port.connection()
        self.carrier.post(hello(accepts or Quotas()))
        self.carrier.flush()
        while endpoint.state is not State.CONNECTED:
            assert time.monotonic() < deadline
            endpoint.pump(0.01)
        return self.carrier


def connected(client: Client | None = None) -> tuple[Endpoint, Hostile, LocalCarrier]:
    mine, theirs = meeting()
    endpoint = Endpoint(mine, client or Client(), Resources())
    hostile = Hostile(theirs)
    return endpoint, hostile, hostile.join(endpoint)


@pytest.mark.parametrize("frame", [b"", b"\xff" * 40, encode(Kind.REPLY, 7), hello(Quotas())])
def test_a_broken_rule_ends_the_connection_with_a_reason_and_another_can_follow(frame: bytes) -> None:
    endpoint, hostile, carrier = connected()
    answers: list[Completion] = []
    assert endpoint.submit_transaction(b"?", answers.append) is Result.OK
    carrier.post(frame)
    carrier.flush()
    began = time.monotonic()
    endpoint.pump(1.0)
    assert time.monotonic() - began < 1.0
    assert endpoint.state is not State.CONNECTED
    assert endpoint.reason
    assert [answer.result for answer in answers] == [Result.OUTCOME_UNKNOWN]
    told = carrier.take(1.0)
    assert told[-1][0] == Kind.BYE
    assert endpoint.reason.encode() in told[-1]
    carrier.close()
    hostile.join(endpoint)
    assert endpoint.connections == 2
    endpoint.destroy()


def test_tries_grow_further_apart() -> None:
    endpoint, hostile, carrier = connected()
    for count in range(5):
        carrier.post(b"")
        carrier.flush()
        before = time.monotonic()
        while endpoint.state is State.CONNECTED:
            endpoint.pump(0.1)
        carrier = hostile.join(endpoint)
        assert time.monotonic() - before >= FIRST_PAUSE * 2**count
    endpoint.destroy()


class Raising(Client):
    """Raises where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def connect(self, endpoint: Endpoint) -> None:
        if self.where == "connect":
            raise RuntimeError("as asked")

    def disconnect(self, endpoint: Endpoint, done: Callable[[], None]) -> None:
        done()
        if self.where == "twice":
            done()

    def message(self, endpoint: Endpoint, message: IncomingMessage) -> None:
        raise RuntimeError("as asked")


def test_what_a_lifecycle_callback_raises_leaves_pump_and_the_state_is_right() -> None:
    mine, theirs = meeting()
    endpoint = Endpoint(mine, Raising("connect"), Resources())
    with pytest.raises(RuntimeError, match="as asked"):
        Hostile(theirs).join(endpoint)
    assert endpoint.state.name == "CONNECTED"
    endpoint.destroy()
    assert endpoint.state.name == "DESTROYED"


def test_done_twice_is_refused() -> None:
    endpoint, _, _ = connected(Raising("twice"))
    with pytest.raises(MisuseError, match="before"):
        endpoint.disconnect()
    assert endpoint.state is State.PRESENT


def test_a_message_whose_handler_raises_is_completed_and_the_connection_stands() -> None:
    endpoint, _, carrier = connected(Raising("message"))
    carrier.post(encode(Kind.MESSAGE, 3, b"x"))
    carrier.flush()
    endpoint.pump(1.0)
    assert carrier.take(1.0)[-1] == encode(Kind.DONE, 3)
    assert endpoint.state is State.CONNECTED
    endpoint.destroy()


def test_resources_serve_one_endpoint_at_a_time() -> None:
    resources, (one, other), (third, _) = Resources(), meeting(), meeting()
    endpoint = Endpoint(one, Client(), resources)
    with pytest.raises(MisuseError, match="another endpoint"):
        Endpoint(third, Client(), resources)
    endpoint.destroy()
    again = Endpoint(third, Client(), resources)
    again.destroy()
    other.close()


@pytest.mark.parametrize(("frames", "frame_bytes", "reason"), [(16, 1 << 16, "holds 16 frames"),
                                                               (1024, 100, "hold 100 bytes")])
def test_a_carrier_too_small_for_the_quotas_is_refused_with_both_numbers(
        frames: int, frame_bytes: int, reason: str) -> None:  # fmt: skip
    mine, theirs = meeting(frames=frames, frame_bytes=frame_bytes)
    endpoint = Endpoint(mine, Client(), Resources())
    theirs.look()
    endpoint.pump()
    assert theirs.connection() is not None
    endpoint.pump(0.1)
    assert reason in endpoint.reason
    assert endpoint.state is State.PRESENT
    endpoint.destroy()


def test_an_unfinished_transaction_holds_the_disconnect_back() -> None:
    held: list[IncomingTransaction] = []

    class Holding(Client):
        def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
            held.append(transaction)

    endpoint, hostile, carrier = connected(Holding())
    carrier.post(encode(Kind.REQUEST, 1, b"x"))
    carrier.flush()
    endpoint.pump(1.0)
    carrier.close()
    hostile.port.look()
    while endpoint.state is State.CONNECTED:
        endpoint.pump(0.1)
    endpoint.pump(0.05)
    assert endpoint.state.name == "DISCONNECTING"
    assert held[0].complete() is Result.CLOSED
    assert endpoint.state.name == "PRESENT"
    hostile.join(endpoint)
    endpoint.destroy()


def test_a_handler_that_loses_a_connection_of_its_own_keeps_this_one() -> None:
    """A middle of a stack, whose back end is gone."""

    class Middle(Client):
        def transaction(self, endpoint: Endpoint, transaction: IncomingTransaction) -> None:
            raise PeerGoneError("the back end of this middle")

    endpoint, _, carrier = connected(Middle())
    carrier.post(encode(Kind.REQUEST, 1))
    carrier.flush()
    endpoint.pump(1.0)
    assert b"PeerGoneError: the back end of this middle" in carrier.take(1.0)[-1]
    assert endpoint.state is State.CONNECTED
    endpoint.destroy()


def test_an_endpoint_that_waits_for_its_peer_says_that_nothing_happened() -> None:
    mine, _ = meeting()
    endpoint = Endpoint(mine, Client(), Resources())
    endpoint.pump()
    assert not endpoint.pump()
    assert endpoint.arm()
    endpoint.destroy()


def test_a_tcp_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "MOST_UNSENT", 1 << 20)
    listener = tcp.ListenPort("127.0.0.1", 0)
    endpoint = Endpoint(listener, Client(), Resources())
    with socket.create_connection(listener.address) as peer:
        greeting = hello(Quotas())
        peer.sendall(len(greeting).to_bytes(4, "little") + greeting)
        while endpoint.state is not State.CONNECTED:
            endpoint.pump(0.1)
        request = encode(Kind.REQUEST, 1, bytes(8))
        flood = (len(request).to_bytes(4, "little") + request) * 4096
        deadline = time.monotonic() + 30
        peer.setblocking(False)
        while endpoint.state.name == "CONNECTED":
            assert time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                peer.send(flood)
            endpoint.pump(0.0)
    assert "does not read" in endpoint.reason
    endpoint.destroy()


def test_waiting_for_nobody_ends_in_time() -> None:
    mine, _ = meeting()
    with Caller(mine) as caller, pytest.raises(TimedOutError, match="not connected in time"):
        caller.transact(b"", timeout=0.05)


def test_a_stream_whose_other_side_is_gone_says_so() -> None:
    mine, theirs = meeting()
    with Stream(mine) as stream:
        endpoint = Endpoint(theirs, Client(), Resources())
        while endpoint.state is not State.CONNECTED:
            endpoint.pump()
            stream._endpoint.pump()
        endpoint.destroy()
        assert stream.receive(1, timeout=5) == b""
        with pytest.raises(PeerGoneError):
            stream.send(b"x", timeout=1)


@pytest.mark.parametrize("address", ["", "carrier-pigeon:x", "tcp-dial:nowhere", "tcp-dial:127.0.0.1:0",
                                     "tcp-listen:x:y", "tcp-dial:127.0.0.1:99999"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(MisuseError, match=r"address|port"):
        open_port(address)


def test_three_at_one_local_place_are_one_too_many() -> None:
    ends = [open_port("local:crowded") for _ in range(2)]
    with pytest.raises(MisuseError, match="two endpoints meet there already"):
        open_port("local:crowded")
    for end in ends:
        end.close()


def test_the_environment_says_where_services_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "a=local:x  b=tcp-dial:127.0.0.1:5")
    domain = Domain.here()
    assert domain.place(Service("b")) == "tcp-dial:127.0.0.1:5"
    with pytest.raises(MisuseError, match=r"no address here \(there are: a, b\)"):
        domain.place(Service("c"))
    monkeypatch.setenv(VARIABLE, "nonsense")
    with pytest.raises(MisuseError, match="not NAME=ADDRESS"):
        Domain.here()


def example() -> str:
    """The complete example of the README: declaration, back end, front end."""
    found = re.search(r"<!-- idc example -->\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def test_connecting_takes_fewer_than_ten_statements() -> None:
    """All of them are counted, imports and the use of the connection too: there is no wrapper to hide one in."""
    statements = [node for node in ast.walk(ast.parse(example())) if isinstance(node, ast.stmt)]
    assert len(statements) < 10


def test_the_example_runs(tmp_path: Path) -> None:
    shared, back, front = re.split(r"\n\n# (?:back|front) end.*\n", example())
    for name, text in (("back", back), ("front", front)):
        (tmp_path / f"{name}.py").write_text(f"{shared}\n{text}")
    place = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen([sys.executable, str(tmp_path / "back.py")],
                              env={VARIABLE: f"shout=tcp-listen:{place}"})
    try:
        done = subprocess.run([sys.executable, str(tmp_path / "front.py")], capture_output=True, text=True, timeout=60,
                              env={VARIABLE: f"shout=tcp-dial:{place}"}, check=False)
    finally:
        server.kill()
        server.wait()
    assert (done.returncode, done.stdout) == (0, "b'HELLO'\n"), done.stderr


def test_nobody_is_connected_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give a dialling socket the number that it dials, and so connect it to itself."""
    port, prepare = free_port(), tcp._prepare

    def bound(connection: socket.socket) -> socket.socket:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        connection.bind(("127.0.0.1", port))
        return prepare(connection)

    monkeypatch.setattr(tcp, "_prepare", bound)
    dialling = tcp.dial_port(f"127.0.0.1:{port}")
    try:
        for _ in range(20):
            assert not dialling.look()
            dialling.wait(0.01)
    finally:
        dialling.close()
