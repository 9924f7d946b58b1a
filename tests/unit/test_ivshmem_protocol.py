"""The ivshmem protocol without I/O: the server's messages as the specification has them, the client's checks."""

from __future__ import annotations

import argparse
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.errors import ProtocolError
from host.ivshmem import contrib
from host.ivshmem.protocol import Client, Joined, Left, Message, State, greeting, left, vectors_of


def bare(number: int) -> Message[int]:
    return Message(number)


def feed(client: Client, *messages: Message[int]) -> list[Joined | Left]:
    events = []
    for message in messages:
        event = client.feed(message.encode(), () if message.descriptor is None else (message.descriptor,))
        if event is not None:
            events.append(event)
    return events


def test_greeting_is_in_the_order_of_the_specification() -> None:
    messages = greeting(2, 50, [20, 21], {0: [10, 11], 7: [70, 71]})
    assert [(m.number, m.descriptor) for m in messages] == [
        (0, None), (2, None), (-1, 50), (0, 10), (0, 11), (7, 70), (7, 71), (2, 20), (2, 21),
    ]  # fmt: skip
    assert messages[2].encode() == b"\xff" * 8
    assert messages[1].encode() == bytes([2, 0, 0, 0, 0, 0, 0, 0])


def test_client_understands_the_greeting_and_what_follows() -> None:
    client = Client()
    events = feed(client, *greeting(2, 50, [20], {7: [70]}))
    assert (client.own, client.memory, client.vectors) == (2, 50, {7: [70], 2: [20]})
    assert events == [Joined(7, 0, 70), Joined(2, 0, 20)]
    assert feed(client, *vectors_of(9, [90, 91])) == [Joined(9, 0, 90), Joined(9, 1, 91)]
    assert feed(client, left(9)) == [Left(9, (90, 91))]
    assert client.vectors == {7: [70], 2: [20]}
    assert sorted(client.take_all()) == [20, 50, 70]
    assert client.take_all() == []


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.integers(1, 8), max_size=80))
def test_client_takes_messages_in_any_pieces(cuts: list[int]) -> None:
    client = Client()
    sizes = iter(cuts)
    for message in greeting(1, 50, [10], {0: [1]}):
        data = message.encode()
        fds = () if message.descriptor is None else (message.descriptor,)
        while data:
            n = min(next(sizes, 8), client.wanted)
            client.feed(data[:n], fds)
            data, fds = data[n:], ()
    assert (client.own, client.memory, client.vectors) == (1, 50, {0: [1], 1: [10]})


START = greeting(1, 50, [10], {0: [1]})


@pytest.mark.parametrize(
    ("match", "messages"),
    [
        ("version 1 instead", [bare(1)]),
        ("with a descriptor", [Message(0, 3)]),
        ("id 65536", [START[0], bare(65536)]),
        ("id -1", [START[0], bare(-1)]),
        ("without its descriptor", [*START[:2], bare(-1)]),
        ("where the shared memory", [*START[:2], Message(0, 3)]),
        ("peer -1", [*START, Message(-1, 3)]),
        ("peer 65536", [*START, Message(65536, 3)]),
        ("never there", [*START, bare(5)]),
        ("never there", [*START, bare(1)]),
        ("more than 2048", [*START, *vectors_of(4, range(100, 2149))]),
    ],
)
def test_client_refuses(match: str, messages: list[Message[int]]) -> None:
    with pytest.raises(ProtocolError, match=match):
        feed(Client(), *messages)


def test_a_refused_descriptor_can_still_be_closed() -> None:
    client = Client()
    with pytest.raises(ProtocolError):
        client.feed(Message(0, 33).encode(), (33,))
    assert client.take_all() == [33]


def test_two_descriptors_with_one_message_are_refused() -> None:
    client = Client()
    with pytest.raises(ProtocolError, match="2 descriptors"):
        client.feed(bytes(8), (3, 4))
    assert client.take_all() == [3, 4]


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 3), st.integers(0, 2)), max_size=40))
def test_arbitrary_messages_are_understood_or_one_error_and_no_descriptor_is_lost(
    messages: list[tuple[int, int]],
) -> None:
    client = Client()
    number = 100
    given_back: list[int] = []
    for value, count in [(0, 0), (1, 0), (-1, 1), *messages]:
        fds = list(range(number, number + count))
        number += count
        try:
            event = client.feed(struct.pack("<q", value), fds)
        except ProtocolError:
            break
        if isinstance(event, Left):
            given_back += event.descriptors
    assert sorted(given_back + client.take_all()) == list(range(100, number))


@settings(deadline=None)  # the machine may be busy
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_understood_or_one_error(data: bytes) -> None:
    client = Client()
    try:
        for at in range(0, len(data), 8):
            client.feed(data[at : at + 8])
    except ProtocolError:
        return
    assert client.state in (State.VERSION, State.ID, State.MEMORY)  # no further without a descriptor


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1K", 1024), ("4m", 4 << 20), ("1.5G", 3 << 29), ("0x1000", 4096), ("8b", 8), ("010", 10)],
)
def test_sizes_as_qemu_writes_them(text: str, size: int) -> None:
    assert contrib.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1X", "K", "0x10K", "1 K", "99E"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        contrib.parse_size(text)


@pytest.mark.parametrize(("size", "mapped"), [(1, 4096), (4096, 4096), (4097, 8192), (3 << 20, 4 << 20)])
def test_memory_is_what_a_bar_can_be(size: int, mapped: int) -> None:
    assert contrib.mapped_size(size) == mapped


def test_options_have_the_defaults_of_qemu() -> None:
    args = contrib.parser().parse_args([])
    assert (args.verbose, args.foreground, args.size, args.vectors, args.name, args.directory) == (
        False, False, 4 << 20, 1, "ivshmem", None,
    )  # fmt: skip
    assert str(args.pid_file) == "/var/run/ivshmem-server.pid"
    assert str(args.socket) == "/tmp/ivshmem_socket"


@pytest.mark.parametrize("options", [["-n", "65"], ["-n", "x"], ["-l", "huge"], ["-v"], ["-M", "a", "-m", "b"]])
def test_wrong_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        contrib.main(options)
    assert stop.value.code == 2
    assert "usage: ivshmem-server" in capsys.readouterr().err
