"""`python3 -m guest.roundtrip ping|echo`: round trips of messages over a region, polled and by doorbell.

The side that pings prints one JSON line for each mode, with percentiles in nanoseconds. May import `idc` and `guest`.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass

from guest.ivshmem import open_region
from guest.vfio import VfioError
from idc.channel import MessageChannel
from idc.errors import IdcError
from idc.loops import echo, percentiles, ping

#: Name of the channel that carries round trips.
CHANNEL = "rtt"


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
#: Seconds that one mode may take.
LIMIT = 30.0


def main() -> None:
    """Run one side through all modes."""
    parser = argparse.ArgumentParser(prog="guest.roundtrip", description=__doc__)
    parser.add_argument("role", choices=["ping", "echo"])
    parser.add_argument("--region", required=True)
    parser.add_argument("--size", type=int, default=64, help="bytes of a message")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for device and peer")
    options = parser.parse_args()
    try:
        with (open_region(options.region, options.timeout) as region,
              MessageChannel.attach(region, CHANNEL, timeout=options.timeout) as channel):
            for mode in MODES:
                if options.role == "echo":
                    echo(channel, mode.per * (mode.count + WARM_UP), spin=mode.spin, limit=LIMIT)
                    continue
                ping(channel, options.size, WARM_UP, per=mode.per, spin=mode.spin, limit=LIMIT)
                samples = ping(channel, options.size, mode.count, per=mode.per, spin=mode.spin, limit=LIMIT)
                counters = channel.receiver.counters
                sys.stdout.write(json.dumps({
                    "mode": mode.name, "size": options.size, "samples": mode.count, "per": mode.per, "unit": "ns",
                    "late": counters.late, **percentiles(samples)}) + "\n")
                sys.stdout.flush()
    except (IdcError, VfioError) as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
