"""Rings against the plainest model there is: a deque of messages, a run of bytes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st
from ring_support import byte_ring, message_ring

from idc.errors import BackPressuredError

if TYPE_CHECKING:
    from idc.ring import ByteReceiver, ByteSender

SIZES = st.sampled_from([2, 4, 8, 32])
MESSAGE = st.binary(max_size=120)
MESSAGE_STEP = st.one_of(
    st.tuples(st.just("send"), MESSAGE),
    st.tuples(st.just("parts"), st.lists(st.binary(max_size=30), max_size=4)),
    st.tuples(st.just("post"), MESSAGE),
    st.tuples(st.just("batch"), st.lists(MESSAGE, min_size=1, max_size=40)),
    st.tuples(st.just("flush"), st.none()),
    st.tuples(st.just("recv"), st.none()),
    st.tuples(st.just("recv_batch"), st.integers(1, 40)),
    st.tuples(st.just("recv_into"), st.none()),
)


@settings(max_examples=150, deadline=None)
@given(slots=SIZES, steps=st.lists(MESSAGE_STEP, max_size=80))
def test_messages_arrive_whole_in_order_and_only_when_there_is_room(slots: int, steps: list[tuple[str, Any]]) -> None:
    model: deque[bytes] = deque()
    sent = 0
    with message_ring(slots, 128) as ring:
        for kind, value in steps:
            room = slots - len(model)
            if kind == "send":
                assert ring.tx.try_send(value) == (room > 0)
                model.extend([value][:room])
            elif kind == "post":
                assert ring.tx.post(value) == (room > 0)
                model.extend([value][:room])
            elif kind == "parts" and room:
                ring.tx.send_parts(value, timeout=0)
                model.append(b"".join(value))
            elif kind == "batch" and room:
                assert ring.tx.send_batch(value, timeout=0) == min(room, len(value))
                model.extend(value[:room])
            elif kind == "flush":
                ring.tx.flush()
            elif kind == "recv":
                assert ring.rx.try_recv() == (model.popleft() if model else None)
            elif kind == "recv_batch" and model:
                expected = [model.popleft() for _ in range(min(value, len(model)))]
                assert ring.rx.recv_batch(value, timeout=0) == expected
            elif kind == "recv_into" and model:
                buffer = bytearray(120)
                assert buffer[: ring.rx.recv_into(buffer, timeout=0)] == model.popleft()
            sent = ring.tx.counters.messages
            assert sent - ring.rx.counters.messages == len(model)
        if model:
            assert ring.rx.recv_batch(slots) == list(model)
        assert ring.rx.try_recv() is None
        assert ring.tx.counters.doorbells == ring.rx.counters.doorbells == 0, "nobody slept, nobody is rung"


BYTE_STEP = st.one_of(
    st.tuples(st.just("write"), st.binary(max_size=300)),
    st.tuples(st.just("read"), st.integers(1, 300)),
    st.tuples(st.just("reserve"), st.binary(min_size=1, max_size=100)),
    st.tuples(st.just("peek"), st.integers(0, 100)),
)


@settings(max_examples=150, deadline=None)
@given(size=st.sampled_from([64, 128, 256]), steps=st.lists(BYTE_STEP, max_size=80))
def test_bytes_arrive_in_order_whatever_the_way_in_and_out(size: int, steps: list[tuple[str, Any]]) -> None:
    model = bytearray()
    with byte_ring(size) as ring:
        for kind, value in steps:
            _byte_step(kind, value, ring.tx, ring.rx, model, size)
            assert ring.tx.available() == size - len(model)
            assert ring.rx.available() == len(model)
        if model:
            assert ring.rx.read_exactly(len(model), timeout=0) == model


def _byte_step(kind: str, value: Any, tx: ByteSender, rx: ByteReceiver, model: bytearray, size: int) -> None:
    room = size - len(model)
    if kind == "write":
        half = len(value) // 2
        count = tx.try_write(value[:half], value[half:])
        assert count == min(len(value), room)
        model += value[:count]
    elif kind == "read":
        expected = bytes(model[:value])
        try:
            assert rx.read(value, timeout=0) == expected
        except BackPressuredError:
            assert not expected
        del model[: len(expected)]
    elif kind == "reserve" and room:
        with tx.reserve(timeout=0) as span:
            count = min(len(value), len(span.memory))
            assert 0 < len(span.memory) <= room
            span.memory[:count] = value[:count]
            span.commit(count)
        model += value[:count]
    elif kind == "peek" and model:
        with rx.peek(timeout=0) as span:
            assert bytes(span.memory) == model[: len(span.memory)]
            count = min(value, len(span.memory))
            span.consume(count)
        del model[:count]
