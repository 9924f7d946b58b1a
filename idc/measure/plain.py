"""The same loops as a user of the Python API would write them: no batching, no tuning beyond the mode.

Each returns nanoseconds on this side's monotonic clock. A dead peer ends them with PeerGoneError. Depends on
`idc.channel`.
"""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from idc.channel import ByteChannel, MessageChannel

#: Messages of one call where the API offers batches.
BATCH = 32


def ping(channel: MessageChannel, size: int, count: int, per: int) -> array[int]:
    """`count` samples, each the mean of `per` round trips of `size` bytes."""
    message, send, receive, now = bytes(size), channel.sender.send, channel.receiver.recv, time.monotonic_ns
    samples = array("Q", bytes(8 * count))
    before = now()
    for index in range(count):
        for _ in range(per):
            send(message)
            receive()
        after = now()
        samples[index] = (after - before) // per
        before = after
    return samples


def echo(channel: MessageChannel, rounds: int) -> None:
    """Send back whatever comes, `rounds` times."""
    send, receive = channel.sender.send, channel.receiver.recv
    for _ in range(rounds):
        send(receive())


def send_messages(channel: MessageChannel, size: int, count: int) -> int:
    """`count` messages one way, then wait for the receiver's word that it has them all; the time of that."""
    message, send = bytes(size), channel.sender.send
    began = time.monotonic_ns()
    for _ in range(count):
        send(message)
    channel.receiver.recv()
    return time.monotonic_ns() - began


def receive_messages(channel: MessageChannel, count: int) -> None:
    """The other end of `send_messages`."""
    receive = channel.receiver.recv
    for _ in range(count):
        receive()
    channel.sender.send(b"!")


def send_batches(channel: MessageChannel, size: int, count: int) -> int:
    """`send_messages`, BATCH messages in a call."""
    batch, send, left = [bytes(size)] * BATCH, channel.sender.send_batch, count
    began = time.monotonic_ns()
    while left:
        left -= send(batch if left >= BATCH else batch[:left])
    channel.receiver.recv()
    return time.monotonic_ns() - began


def receive_batches(channel: MessageChannel, count: int) -> None:
    """The other end of `send_batches`."""
    receive, left = channel.receiver.recv_batch, count
    while left:
        left -= len(receive(min(BATCH, left)))
    channel.sender.send(b"!")


def stream_out(channel: ByteChannel, total: int, chunk: int) -> int:
    """Write `total` bytes, `chunk` at a time, then wait until the other end has read them all; the time of that."""
    data, write = bytes(chunk), channel.sender.write
    began = time.monotonic_ns()
    for _ in range(total // chunk):
        write(data)
    channel.receiver.read_exactly(1)
    return time.monotonic_ns() - began


def stream_in(channel: ByteChannel, total: int, chunk: int) -> None:
    """Read `total` bytes into the same buffer, `chunk` at a time. See `stream_out`."""
    buffer, read = bytearray(chunk), channel.receiver.read_into
    for _ in range(total // chunk):
        read(buffer, chunk)
    channel.sender.write(b"!")
