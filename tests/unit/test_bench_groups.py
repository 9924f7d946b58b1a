"""Turns, variants and rows, with subjects that are made up; what other programs print; the tables."""

import io
from array import array
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from rich.console import Console

from testbed.bench.errors import BenchFailed
from testbed.bench.groups import Group, Pace, measure
from testbed.bench.names import load
from testbed.bench.names.net import parse_ping, ways
from testbed.bench.peers import parse_sockperf_log
from testbed.bench.rows import Result
from testbed.bench.runner import chosen
from testbed.bench.show import show
from testbed.bench.subjects import Key, Taken
from testbed.errors import SpecError

if TYPE_CHECKING:
    from testbed.bench.ends import Pair

PACE = Pace(rounds=3, seconds=0.1, scout_seconds=0.1, kept=1, quick=True)
PAIR = cast("Pair", SimpleNamespace(domains="process", clock_ns=20.0))


class Made:
    """A subject that takes what it is told."""

    def __init__(self, log: list[str], key: Key, takes: list[Taken], variant: str = "", per: int = 1) -> None:
        self.key, self.variant, self.note, self.per = key, variant, "", per
        self._log, self._takes = log, takes

    def prepare(self, seconds: float) -> int:
        assert seconds == PACE.seconds
        return 5

    def take(self, seconds: float) -> Taken:
        assert seconds == PACE.seconds
        self._log.append(f"{self.key.path}{self.variant}")
        return self._takes.pop(0)


def timed(*samples: int) -> Taken:
    return Taken(samples=array("Q", samples), warmup=1, late=1)


def test_all_take_turns_and_each_round_counts_the_same() -> None:
    log: list[str] = []
    rtt = [Made(log, Key("rtt", path, "poll", "core", 64, "ns"), [timed(base, base), timed(base), timed(2 * base)],
                per=per) for path, base, per in (("limit", 10, 3), ("ivshmem", 20, 2))]
    found = measure(Group("a", PAIR, list(rtt)), PACE)
    assert log == ["limit", "ivshmem"] * 3
    limit, ours = (each.row for each in found)
    assert (limit.samples, limit.p50, limit.max, limit.rounds) == (4, 10, 20, (10, 10, 20)), "no sample is left out"
    assert (limit.warmup, limit.late, limit.clock_ns, limit.domains) == (8, 3, 20.0, "process")
    assert limit.per == ours.per == 3, "the same mean for what is compared"
    assert found[0].histogram is not None


def test_the_best_variant_is_the_row_and_names_the_others() -> None:
    key = Key("stream", "tcp", None, "core", 64, "B/s")
    made = [Made([], key, [Taken(value=value + turn) for turn in (0.0, 2.0, 1.0)], name)
            for name, value in (("slow", 10.0), ("fast", 20.0))]
    (found,) = measure(Group("a", PAIR, list(made)), PACE)
    assert (found.row.variant, found.row.value, found.row.rounds) == ("fast", 21.0, (20.0, 22.0, 21.0))
    assert found.row.variants == {"slow": 11.0, "fast": 21.0}
    assert found.histogram is None


def spent(host: float, own: float) -> Taken:
    used = {"near": own, "far": own, "host_near": host, "host_far": host}
    return Taken(value=1.0, used=used, host_units=2.0, own_units=1.0)


def test_processor_time_is_that_of_all_takes_and_none_beside_a_load() -> None:
    key = Key("rate", "ivshmem", "poll", "core", 64, "msg/s")
    takes = [(0.01, 0.005), (0.03, 0.02), (0.05, 0.02)]
    (found,) = measure(Group("a", PAIR, [Made([], key, [spent(*take) for take in takes])]), PACE)
    assert found.row.cpu_s == pytest.approx(2 * 0.09 / 6)
    assert found.row.cpu == pytest.approx({"near": 0.015, "far": 0.015, "host_near": 0.015, "host_far": 0.015})
    loaded = Group("a", PAIR, [Made([], key, [spent(*take) for take in takes])], during=partial(nullcontext))
    (beside,) = measure(loaded, PACE)
    assert (beside.row.cpu_s, beside.row.cpu) == (None, {})
    (short,) = measure(Group("a", PAIR, [Made([], key, [spent(0.005, 0.0) for _ in takes])]), PACE)
    assert (short.row.cpu_s, short.row.cpu) == (None, {})


def test_a_failure_names_the_row() -> None:
    class Fails(Made):
        def take(self, seconds: float) -> Taken:
            raise BenchFailed("near: it broke")

    with pytest.raises(BenchFailed, match="rtt ivshmem process poll core 64 bytes: near: it broke"):
        measure(Group("a", PAIR, [Fails([], Key("rtt", "ivshmem", "poll", "core", 64, "ns"), [])]), PACE)


def test_the_tables_hold_every_row() -> None:
    log: list[str] = []
    keys = [Key("rtt", "limit", "poll", "core", 64, "ns"), Key("rtt", "ivshmem", "poll", "core", 64, "ns")]
    values = [Key("stream", "limit", "pipeline", "core", 65536, "B/s"), Key("stream", "ivshmem", "poll", "core", 65536,
                                                                            "B/s")]  # fmt: skip
    subjects = [Made(log, key, [timed(1000)] * 3) for key in keys]
    subjects += [Made(log, key, [Taken(value=2e9)] * 3) for key in values]
    found = measure(Group("a", PAIR, list(subjects)), PACE)
    out = io.StringIO()
    show(Result("none", {}, tuple(each.row for each in found), absent=("iceoryx2: none [here]",)),
         Console(file=out, width=120, highlight=False))
    text = out.getvalue()
    assert "bare cache line" in text
    assert "bare copy pipeline" in text
    assert "2.00 GB/s" in text
    assert "not measured: iceoryx2: none [here]" in text
    assert text.count("holds") == 2


def test_sockperf_is_read_round_trip_by_round_trip() -> None:
    log = "------------------------------\ntest was performed using the following parameters: --mps=0\n" \
          "packet, txTime(sec), rxTime(sec)\n1, 0.000100000, 0.000400500\n2, 1.000000000, 1.000300000\n"
    assert list(parse_sockperf_log(log)) == [300500, 300000]
    with pytest.raises(BenchFailed, match="logged no round trip"):
        parse_sockperf_log("sockperf: ERROR")


def test_names_are_files() -> None:
    assert list(load()) == ["rtt", "rate", "stream", "idc", "trace", "block", "net", "boot", "connect"]
    assert [bench.name for bench in chosen([])] == ["rtt", "rate", "stream", "idc"]
    assert [bench.name for bench in chosen(["boot"])] == ["boot"]
    with pytest.raises(SpecError, match="no benchmark is called 'rt'"):
        chosen(["rt"])


def test_the_far_vm_sends_in_reverse_also_where_the_device_polls() -> None:
    turned = {(way.path, way.mode): way.reverse for way in ways("10.77.0.3") if way.name == "net"}
    assert {mode for (_, mode), reverse in turned.items() if reverse} == {
        f"ipv{version}-reverse{poll}" for version in (4, 6) for poll in ("", "-poll")}
    assert len(turned) == 12


def test_ping_is_each_answer_but_the_first() -> None:
    text = ("64 bytes from fd79::2: seq=0 ttl=64 time=9.123 ms\n64 bytes from fd79::2: seq=1 ttl=64 time=0.312 ms\n"
            "64 bytes from fd79::2: seq=2 ttl=64 time=1.004 ms\n")
    assert parse_ping(text) == [312_000, 1_004_000]
    with pytest.raises(BenchFailed, match="ping had no answer"):
        parse_ping("PING 10.0.0.1")
