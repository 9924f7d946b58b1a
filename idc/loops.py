"""Native loops over a connected channel, round trips and streams: what the rings cost without Python in the way.

Each call is one crossing into the C core and ends at its limit at the latest, so a dead peer cannot hang it.
Depends on idc._core, idc.channel and idc.errors.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.errors import IdcError, TimedOutError

if TYPE_CHECKING:
    from idc.channel import ByteChannel, MessageChannel
    from idc.ringbase import Ring


def ping(channel: MessageChannel, size: int, count: int, *, per: int = 1, spin: float, limit: float) -> array[int]:
    """Send messages of `size` bytes and wait for each echo.

    Args:
        channel: whose other end runs `echo`.
        size: bytes of a message.
        count: samples to take.
        per: round trips of one sample, which is their mean: for round trips shorter than the clock is fine.
        spin: seconds to poll before sleeping; 0 sleeps at once (a doorbell each way), below 0 only polls.
        limit: seconds after which the loop ends with TimedOutError.

    Returns:
        Nanoseconds of each sample, on this side's monotonic clock.
    """
    samples = array("Q", bytes(8 * count))
    view = ffi.from_buffer("uint64_t[]", samples, require_writable=True)
    done = lib.idc_loop_ping(channel.sender._ring, channel.receiver._ring, size, view, count, per,
                             _nanoseconds(spin), _deadline(limit))
    _check((channel.receiver, channel.sender), done, count, limit)
    return samples


def echo(channel: MessageChannel, rounds: int, *, spin: float, limit: float) -> None:
    """Send back whatever comes, `rounds` times. See `ping`."""
    done = lib.idc_loop_echo(channel.receiver._ring, channel.sender._ring, rounds, _nanoseconds(spin),
                             _deadline(limit))
    _check((channel.receiver, channel.sender), done, rounds, limit)


def stream_out(channel: ByteChannel, total: int, chunk: int, *, spin: float, limit: float) -> float:
    """Copy `total` bytes into the ring in writes of `chunk`, then wait until the other end has taken them all.

    Returns:
        Seconds that took.
    """
    started = int(lib.idc_now_ns())
    done = lib.idc_loop_stream_out(channel.sender._ring, total, chunk, _nanoseconds(spin), _deadline(limit))
    _check((channel.sender,), done, total, limit)
    # one byte back: the clock stops when the last byte was read, not when it was written
    channel.receiver.read_exactly(1, timeout=limit)
    return (int(lib.idc_now_ns()) - started) / 1e9


def stream_in(channel: ByteChannel, total: int, chunk: int, *, spin: float, limit: float) -> None:
    """Copy `total` bytes out of the ring in reads of up to `chunk`. See `stream_out`."""
    done = lib.idc_loop_stream_in(channel.receiver._ring, total, chunk, _nanoseconds(spin), _deadline(limit))
    _check((channel.receiver,), done, total, limit)
    channel.sender.write(b"!", timeout=limit)


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _deadline(limit: float) -> int:
    return int(lib.idc_now_ns()) + _nanoseconds(limit)


def _check(rings: tuple[Ring, ...], done: int, wanted: int, limit: float) -> None:
    if done == lib.IDC_INTR:
        raise IdcError("the loop was interrupted: a signal came, or the peer rings without end")
    if done < 0:
        raise next((ring for ring in rings if ring._ring.ended), rings[0])._fail(done)
    if done < wanted:
        raise TimedOutError(f"{done} of {wanted} in {limit:g} s")


def percentiles(samples: array[int]) -> dict[str, int]:
    """p50, p90, p99, p99.9 and the maximum (nearest rank), in the unit of the samples."""
    ordered = sorted(samples)
    ranks = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {name: ordered[max(0, -(-int(rank * 1000) * len(ordered) // 1000) - 1)] for name, rank in ranks.items()}
