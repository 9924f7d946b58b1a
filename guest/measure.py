"""`python3 -m guest.measure ping|echo`: round trips and a stream over a region, with the C core's own loops.

The side that pings prints one JSON line for each measurement: round trips polled and by doorbell, with percentiles in
nanoseconds, and the stream from memory to memory. May import `idc` and `guest`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from guest.ivshmem import open_region
from guest.vfio import VfioError
from idc.channel import ByteChannel, MessageChannel
from idc.errors import IdcError
from idc.loops import echo, percentiles, ping, stream_in, stream_out

if TYPE_CHECKING:
    from idc.region import Region

#: Names of the channels that carry round trips and the stream.
ROUND_TRIPS, BULK = "rtt", "bulk"


@dataclass(frozen=True)
class Mode:
    """How both sides wait.

    Attributes:
        name: "poll" or "doorbell".
        spin: see `idc.loops.ping`.
        count: samples.
        per: round trips in each sample.
    """

    name: str
    spin: float
    count: int
    per: int


#: A polled round trip takes well under a microsecond, less than reading the clock in an emulated guest: so ten each.
MODES = (Mode("poll", -1.0, 10_000, 10), Mode("doorbell", 0.0, 4_000, 1))
#: Samples thrown away in the beginning: caches, translation and the doorbell's first use.
WARM_UP = 200
#: Seconds that one measurement may take.
LIMIT = 30.0
#: The stream: bytes in all, bytes of one write, and how long either side polls before it sleeps.
STREAM_BYTES, STREAM_CHUNK, STREAM_SPIN = 512 << 20, 64 << 10, 100e-6


def say(**fields: object) -> None:
    """Write one JSON line to standard output."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def round_trips(region: Region, role: str, size: int, timeout: float) -> None:
    """Every mode in turn."""
    with MessageChannel.attach(region, ROUND_TRIPS, timeout=timeout) as channel:
        for mode in MODES:
            if role == "echo":
                echo(channel, mode.per * (mode.count + WARM_UP), spin=mode.spin, limit=LIMIT)
                continue
            ping(channel, size, WARM_UP, per=mode.per, spin=mode.spin, limit=LIMIT)
            samples = ping(channel, size, mode.count, per=mode.per, spin=mode.spin, limit=LIMIT)
            say(name="rtt", mode=mode.name, size=size, samples=mode.count, per=mode.per, unit="ns",
                late=channel.receiver.counters.late, **percentiles(samples))


def stream(region: Region, role: str, timeout: float) -> None:
    """One warm-up of an eighth, then the stream."""
    with ByteChannel.attach(region, BULK, timeout=timeout) as channel:
        for total in (STREAM_BYTES // 8, STREAM_BYTES):
            if role == "echo":
                stream_in(channel, total, STREAM_CHUNK, spin=STREAM_SPIN, limit=LIMIT)
                continue
            seconds = stream_out(channel, total, STREAM_CHUNK, spin=STREAM_SPIN, limit=LIMIT)
        if role == "ping":
            say(name="stream", size=STREAM_CHUNK, samples=1, unit="B/s", value=STREAM_BYTES / seconds)


def main() -> None:
    """Run one side through all measurements."""
    parser = argparse.ArgumentParser(prog="guest.measure", description=__doc__)
    parser.add_argument("role", choices=["ping", "echo"])
    parser.add_argument("--region", required=True)
    parser.add_argument("--size", type=int, default=64, help="bytes of a message")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for device and peer")
    options = parser.parse_args()
    try:
        with open_region(options.region, options.timeout) as region:
            round_trips(region, options.role, options.size, options.timeout)
            stream(region, options.role, options.timeout)
    except (IdcError, VfioError, OSError) as error:
        say(error=str(error))
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
