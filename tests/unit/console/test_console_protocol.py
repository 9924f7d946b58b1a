"""Requests about terminals, from strangers too, and the output that is kept."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idc.console import protocol
from idc.console.output import Output
from idc.console.protocol import ConsoleError, Fault, Op, Request, Size, parse
from idc.errors import ProtocolError

#: How long one example takes says nothing on a machine that others use too.
PATIENT = settings(deadline=None)


@pytest.mark.parametrize("request_", [
    Request(Op.LIST), Request(Op.OPEN, 7, Size(1, 4096), "work", "xterm-256color"), Request(Op.OPEN, 7),
    Request(Op.ATTACH, 1 << 63, Size(50, 132), "3"), Request(Op.READ, 1, at=1 << 40),
    Request(Op.WRITE, 1, at=9, data=bytes(protocol.INPUT_BYTES)), Request(Op.RESIZE, 1, Size(2, 2)),
    Request(Op.DETACH, 1), Request(Op.CLOSE, name="work"), Request(Op.PART, 5),
])
def test_a_request_arrives_as_it_was_sent(request_: Request) -> None:
    packed = request_.pack()
    assert len(packed) <= protocol.PARAMETER_BYTES
    assert parse(packed).pack() == packed
    assert parse(packed).op is request_.op


@PATIENT
@given(st.binary(max_size=80))
def test_whatever_a_stranger_sends_is_a_request_or_refused(data: bytes) -> None:
    fault, request = None, None
    try:
        request = parse(data)
    except ConsoleError as error:
        fault = error.fault
    assert fault in (Fault.BAD_REQUEST, Fault.BAD_SIZE) or (request is not None and parse(request.pack()) == request)


@pytest.mark.parametrize(("size", "right"), [
    (Size(1, 1), True), (Size(4096, 4096), True), (Size(0, 80), False), (Size(24, 0), False), (Size(24, 4097), False),
    (Size(65535, 65535), False)])
def test_windows_of_absurd_sizes_are_refused_at_both_ends(size: Size, right: bool) -> None:
    for op in (Op.OPEN, Op.RESIZE):
        rest = b"\0dumb" if op is Op.OPEN else b""
        sent = struct.pack("<BQHH", op, 1, *size) + rest
        if right:
            assert parse(sent).size == size
            assert Request(op, 1, size).pack() == sent
            continue
        with pytest.raises(ConsoleError, match="1 to 4096 of each"):
            parse(sent)
        with pytest.raises(ConsoleError, match=f"a window of {size.rows} rows and {size.columns} columns"):
            Request(op, 1, size).pack()


@pytest.mark.parametrize("name", ["3", "3rd", "-x", "a b", "a" * 33, "a\n", "\u00e4", "a\0b"])
def test_names_that_could_be_numbers_or_worse_are_refused(name: str) -> None:
    with pytest.raises(ConsoleError, match="is no name of a terminal"):
        Request(Op.OPEN, 1, name=name).pack()


def test_what_a_peer_answers_is_checked_and_fit_to_be_shown() -> None:
    for wrong in (b"", b"[", b"{}x", b"[1]", b'[{"number": 1}]', b'[{"number":"x"}]', b"\xff"):
        with pytest.raises(ProtocolError):
            protocol.parse_list(wrong)
    (shown,) = protocol.parse_list(
        b'[{"number":1,"name":"\\u001b[2J","command":"x","rows":1,"columns":1,"attached":0,"code":null}]')
    assert shown["name"] == "?[2J"
    for call in (protocol.parse_opened, protocol.parse_output, protocol.parse_code):
        with pytest.raises(ProtocolError):
            call(b"12")
    assert str(protocol.fault(2, b"no \x1b[31m\xff")) == "no ?[31m\ufffd"
    assert "which this version does not know" in str(protocol.fault(99, b"odd"))


@PATIENT
@given(st.lists(st.tuples(st.sampled_from(["append", "trim", "read"]), st.integers(0, 300), st.integers(1, 100))))
def test_output_has_the_bytes_that_were_put_out_at_their_positions(steps: list[tuple[str, int, int]]) -> None:
    output, everything = Output(), b""
    for what, position, length in steps:
        if what == "append":
            data = bytes(byte & 0xFF for byte in range(len(everything), len(everything) + length))
            output.append(data)
            everything += data
        elif what == "trim":
            output.trim(position)
        else:
            at, data = output.read(position, length)
            assert at == max(position, output.start)
            assert data == everything[at:at + length]
        assert output.end == len(everything)
        assert 0 <= output.start <= output.end
