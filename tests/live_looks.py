"""Looks at a testbed, made up: one VM, one region, one channel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from idc import layout
from testbed.live.collect import BedNow, ProcessNow, RegionNow
from testbed.live.memory import ChannelNow, RingNow, SideNow
from testbed.live.proc import Cpu, Memory

ZERO = dict.fromkeys(layout.RING_RECORD, 0)


def side(member: str, samples: int = 0, total: int = 0, state: str = "open", **more: Any) -> SideNow:
    buckets = (samples, *([0] * (layout.TRIP_BUCKETS - 1)))
    return replace(SideNow(member, 7, 7, state, 0, samples, total, 0, buckets), **more)


def ring(producer: str, consumer: str, tail: int, head: int, sent: int = 0, **more: Any) -> RingNow:
    return replace(RingNow(producer, consumer, tail, head, 64, ZERO | {"doorbells": sent, "bytes": 10 * tail},
                           ZERO | {"bytes": 10 * head}), **more)


def bed(at: float, channel: ChannelNow, cpu: float = 1.0, **more: Any) -> BedNow:
    told = {"uuid": "u", "size": 1 << 20, "known": True, "doorbell_faults": [{"from": "a", "to": "b", "dropped": 2}],
            "members": [{"name": name, "rights": "rw", "present": True, "incarnation": 1, "plugged": True}
                        for name in ("a", "b")]}
    vm = ProcessNow("a", "running", 10, Cpu(cpu, 5), Memory(3 << 20, 2 << 20, 4 << 20, 0))
    return replace(BedNow("t", at, "tcg", "", (vm,), (), (RegionNow("link", told, 4096, (channel,)),)), **more)


def calls(tail: int, head: int, samples: int = 0, total: int = 0, doorbells: int = 0) -> ChannelNow:
    return ChannelNow("calls", "message", (side("a", samples, total), side("b")),
                      (ring("a", "b", tail, head, doorbells), ring("b", "a", head, head)))
