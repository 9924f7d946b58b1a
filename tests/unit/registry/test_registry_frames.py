"""What anybody may send: parsed, or refused with a reason; nothing else."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.registry import tree
from host.registry.desk import Desk
from idc.errors import MisuseError
from idc.registry import frames
from idc.registry.frames import Fault, FrameError, Op, Permissions, Permit, Request

names = st.from_regex(r"\A[A-Za-z0-9_.@:-]{1,12}\Z")
permits = st.sampled_from(list(Permit))
permissions = st.builds(lambda owner, default, named: Permissions(owner, default, tuple(named.items())),
                        names, permits, st.dictionaries(names, permits, max_size=16))


@given(st.lists(names, max_size=8), st.integers(0, (1 << 32) - 1), st.binary(max_size=40), st.booleans())
def test_a_request_is_parsed_as_it_was_packed(parts: list[str], number: int, value: bytes, ephemeral: bool) -> None:
    request = Request(Op.WRITE, tree.text(tuple(parts)), number, number, value, ephemeral)
    assert frames.parse(request.pack()) == request


@given(permissions, st.lists(names, max_size=5), st.booleans(), st.integers(0, (1 << 32) - 1))
def test_answers_and_events_are_parsed_as_they_were_packed(
        permissions: Permissions, parts: list[str], more: bool, number: int) -> None:
    assert frames.parse_permissions(frames.pack_permissions(permissions)) == permissions
    assert frames.parse_names(frames.pack_names(parts, more=more)) == (parts, more)
    assert frames.parse_number(frames.pack_number(number)) == number
    path = tree.text(tuple(parts))
    assert frames.parse_event(frames.pack_event(number, 3, path)) == (number, 3, path, None)
    assert frames.parse_event(frames.pack_event(number, 3, path, b"")) == (number, 3, path, {})
    nodes = {name: b"\0" + name.encode() for name in parts}
    packed = frames.pack_nodes(nodes.items(), 1 << 16)
    assert frames.parse_event(frames.pack_event(number, 3, path, packed)) == (number, 3, path, nodes)
    with contextlib.suppress(FrameError):
        assert frames.parse_event(frames.pack_event(number, 3, path, b"\1" + packed[1:])) is None


@pytest.mark.parametrize("parse", [frames.parse, frames.parse_permissions, frames.parse_names, frames.parse_number,
                                   frames.parse_event, frames.parse_hello])
@given(data=st.binary(max_size=80))
def test_rubbish_is_refused(parse: object, data: bytes) -> None:
    assert callable(parse)
    with contextlib.suppress(FrameError):
        parse(data)


class _Nowhere:
    room = 2400

    def event(self, body: bytes, done: object) -> bool:
        return False


heads = st.builds(lambda op, flags, path, tx, number, zero, rest: bytes([op, flags]) + len(path).to_bytes(2, "little")
                  + tx.to_bytes(4, "little") + number.to_bytes(4, "little") + zero.to_bytes(4, "little") + path + rest,
                  st.integers(0, 15), st.sampled_from([0, 0, 0, 1, 2, 4, 6]), st.sampled_from([
                      b"", b"/", b"/domain", b"/domain/a", b"/domain/a/x", b"/domain/b", b"/domain/a//", b"/\xff"]),
                  st.integers(0, 3), st.integers(0, 3), st.sampled_from([0, 0, 0, 7]),
                  st.one_of(st.just(b""), st.just(bytes(16)), st.binary(max_size=30)))


@given(st.lists(st.one_of(heads, heads, st.binary(max_size=60)), max_size=30))
def test_whatever_is_asked_is_answered_once_and_leaves_others_alone(bodies: list[bytes]) -> None:
    desk = Desk(tree.empty(), clock=lambda: 0.0)
    for name in "ab":
        desk.admit(name, name.encode() * 16)
    seat = desk.arrive("a", _Nowhere())
    answers: list[list[int]] = []
    for body in bodies:
        answers.append([])

        def answered(error: int, status: bytes, told: list[int] = answers[-1]) -> None:
            told.append(error)
            assert status or not error

        desk.request(seat, body, answered)
    batch = desk.batch()
    while desk.work() or batch is not None:
        if batch is not None:
            desk.written(batch)
        desk.tell()
        batch = desk.batch()
    assert all(len(told) == 1 and told[0] in (0, *Fault) and told[0] != Fault.FAILED for told in answers)
    other = tree.look(desk.durable.root, "/domain/b")
    assert other is not None
    assert (other.value, other.permissions, dict(other.children)) == (b"", Permissions("b"), {})


def test_what_permissions_cannot_be() -> None:
    with pytest.raises(MisuseError, match="name 17 domains"):
        Permissions("a", named=tuple((f"d{n}", Permit.READ) for n in range(17)))
    with pytest.raises(MisuseError, match="a domain twice"):
        Permissions("a", named=(("b", Permit.READ), ("b", Permit.WRITE)))
    with pytest.raises(MisuseError, match="no name of a domain"):
        Permissions("a/b")
