"""Programs that are not ours: what they print, what they cost, and what becomes of a run in which one fails."""

from __future__ import annotations

import dataclasses
import json
from array import array
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from testbed.bench import groups, peers, runner
from testbed.bench.baton import ALONE
from testbed.bench.errors import BenchFailed, PeerFailed
from testbed.bench.groups import Group, Pace
from testbed.bench.peers import Iperf, Sockperf, Tool, parse_iperf_intervals, parse_sockperf_count
from testbed.bench.places import Place
from testbed.bench.subjects import Key, Taken
from testbed.errors import CommandFailed, TimedOut

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.bench.ends import Pair
    from testbed.bench.runner import _Run
    from testbed.bench.subjects import Subject
    from testbed.vm import Vm

PACE = Pace(rounds=2, seconds=0.1, scout_seconds=0.1, kept=1, quick=True)
TOTAL = ("sockperf: [Total Run] RunTime={0}.001 sec; Warm up time=400 msec; SentMessages={2}; ReceivedMessages={1}\n"
         "sockperf: [Valid Duration] RunTime=0.550 sec; SentMessages=9; ReceivedMessages=9\n")


class FakeVm:
    """Answers commands by `told`, and uses `burns` seconds for each of its clients."""

    def __init__(self, told: Callable[[list[str]], str], *, there: bool = True) -> None:
        self.alive, self.pid, self.used = True, id(self), 0.0
        self.told, self.there = told, there
        self.servers: list[list[str]] = []
        self.server_said = ""

    def execute(self, command: str) -> Any:
        assert command.startswith("command -v ")
        return SimpleNamespace(exit_code=0 if self.there else 127)

    def succeed(self, command: Any, timeout: float = 0.0) -> str:
        return self.told(command if isinstance(command, list) else [command])

    def wait_until_succeeds(self, *_: object, **__: object) -> str:
        return ""

    def spawn(self, argv: list[str]) -> Any:
        self.servers.append(argv)
        return SimpleNamespace(kill=lambda: None, wait=lambda _: SimpleNamespace(out=self.server_said))


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Processor seconds by pid."""
    found: dict[int, float] = {}
    monkeypatch.setattr(peers, "cpu_seconds", lambda pid: found.get(pid, 0.0))
    return found


def tool(kind: Callable[..., Tool], near: FakeVm, far: FakeVm, size: int, *options: str) -> Tool:
    return kind(cast("Vm", near), cast("Vm", far), "10.77.0.2", size, *options)


def intervals(*each: tuple[float, float, int]) -> str:
    return json.dumps({"intervals": [{"sum": {"start": start, "end": start + seconds, "seconds": seconds,
                                              "bytes": count}} for start, seconds, count in each]})


def test_the_start_of_a_stream_does_not_count() -> None:
    received = parse_iperf_intervals(intervals((0, 0.1, 1_000), (0.1, 0.2, 5_000), (0.3001, 0.1, 40_000),
                                               (0.4, 0.6, 180_000)))
    assert received.rate == pytest.approx(220_000 / 0.7)
    assert (received.total, received.before) == (226_000, 6_000)


@pytest.mark.parametrize("text", ["", "{}", '{"error": "no route"}', '{"intervals": [{}]}', intervals(),
                                  intervals((0, 0.1, 9), (0.3, 0.7, 0)), intervals((0, 0.1, 9), (0.9, 0.1, 9))])
def test_a_stream_without_a_figure_is_none(text: str) -> None:
    with pytest.raises(BenchFailed, match="iperf3"):
        parse_iperf_intervals(text)


def test_all_round_trips_are_those_of_the_warm_up_too() -> None:
    assert parse_sockperf_count(TOTAL.format(1, 18309, 18310)) == 18309
    with pytest.raises(BenchFailed, match="did not say how many"):
        parse_sockperf_count("sockperf: ERROR")


def test_a_round_trip_of_sockperf_costs_what_a_longer_run_costs_more(counted: dict[int, float]) -> None:
    def told(command: list[str]) -> str:
        if command[0] != "sockperf":
            return "packet, txTime(sec), rxTime(sec)\n1, 0.0001, 0.0004\n"
        seconds, log = int(command[command.index("-t") + 1]), "--full-log" in command
        # 2 s for the start and the end, 5 for a log, and in each VM half a millisecond for a round trip
        for vm in (near, far):
            counted[vm.pid] = counted.get(vm.pid, 0.0) + 2.0 + 5.0 * log + seconds * 1000 * 5e-4
        return TOTAL.format(seconds, seconds * 1000, seconds * 1000 + 1)

    near, far = FakeVm(told), FakeVm(told)
    subject = tool(Sockperf, near, far, 64, "--nonblocked")
    assert [subject.prepare(0.1), subject.prepare(0.1)] == [0, 0]
    assert len(far.servers) == 2, "weighed once, though it is prepared for a trial and for the turns"
    taken = subject.take(0.1)
    assert taken.samples == array("Q", [300_000])
    assert groups._cost([taken, taken]) == pytest.approx({"host_near": 0.5, "host_far": 0.5})
    assert far.servers[-1] == ["sockperf", "server", "--tcp", "-i", "10.77.0.2", "-p", "7001", "--nonblocked"]


def test_a_stream_of_iperf_costs_what_it_costs_more_than_one_write(counted: dict[int, float]) -> None:
    idle = iter([0.3, 9.0, 0.2])  # the middle one counts

    def told(command: list[str]) -> str:
        far.server_said = intervals((0, 0.3, 1 << 20), (0.3, 0.7, 15 << 20))
        used = next(idle) if "--bytes" in command else 0.3 + 1.0
        counted[near.pid] = counted.get(near.pid, 0.0) + used
        return "{}"

    near, far = FakeVm(told), FakeVm(told)
    subject = tool(Iperf, near, far, 65536)
    subject.prepare(0.1)
    taken = subject.take(0.1)
    assert taken.value == pytest.approx((15 << 20) / 0.7)
    assert taken.warmup == 16
    assert groups._cost([taken]) == pytest.approx({"host_near": 1.0 / ((16 << 20) / 1e9), "host_far": 0.0})


def test_what_it_says_when_it_fails_is_one_line(counted: dict[int, float]) -> None:
    def told(command: list[str]) -> str:
        raise CommandFailed(f"{command} ended with 139\nstderr: Segmentation fault", vm="front")

    near, far = FakeVm(told), FakeVm(told)
    subject = tool(Iperf, near, far, 65536, "--zerocopy")
    with pytest.raises(PeerFailed, match=r"iperf3 --zerocopy, stream of 64 KiB: .* 139 stderr: Segmentation") as caught:
        subject.take(0.1)
    assert caught.value.subject is subject
    with pytest.raises(PeerFailed, match="iperf3: the VMs' image does not have it"):
        tool(Iperf, FakeVm(told, there=False), far, 64).prepare(0.1)
    assert counted == {}


@pytest.mark.parametrize("kind", [CommandFailed, TimedOut])
def test_a_vm_that_is_gone_is_no_failure_of_its_program(kind: type[CommandFailed | TimedOut]) -> None:
    def told(_: list[str]) -> str:
        far.alive = False
        raise kind("it broke", vm="front")

    near, far = FakeVm(told), FakeVm(told)
    with pytest.raises(kind, match="it broke"):
        tool(Sockperf, near, far, 64).take(0.1)


class Made:
    """A subject that takes one value again and again, and fails at its take number `fails`."""

    def __init__(self, path: str, variant: str = "", fails: int = 0, error: type[Exception] = PeerFailed) -> None:
        self.key = Key("stream", path, None, "core", 64, "B/s")
        self.variant, self.note, self.per = variant, "", 1
        self._fails, self._takes, self._error = fails, 0, error

    def prepare(self, seconds: float) -> int:
        del seconds
        return 0

    def take(self, seconds: float) -> Taken:
        del seconds
        self._takes += 1
        if self._takes == self._fails:
            raise PeerFailed(f"{self.variant}: it broke", self) if self._error is PeerFailed else self._error("ours")
        return Taken(value=1e9)


def measured(subjects: list[Subject], rivals: list[list[Subject]]) -> tuple[list[str], list[str]]:
    pair = cast("Pair", SimpleNamespace(domains="vm-vm", clock_ns=20.0))
    place = Place(pair)
    state = cast("_Run", SimpleNamespace(pace=PACE, setting=SimpleNamespace(baton=ALONE)))
    found = runner._measured(Group("a", pair, subjects, rivals=rivals), place, state)
    return [f"{each.row.path} {each.row.variant}".strip() for each in found], place.absent


def test_a_peer_that_fails_is_absent_and_the_rest_is_measured() -> None:
    assert measured([Made("ivshmem")], [[Made("tcp", "one", fails=1), Made("tcp", "two")]]) == (
        ["ivshmem", "tcp two"], ["one: it broke"])
    assert measured([Made("ivshmem")], [[Made("tcp", "one", fails=1)], [Made("tcp", "two", fails=2)]]) == (
        ["ivshmem"], ["one: it broke", "two: it broke"])
    assert measured([Made("ivshmem"), Made("iceoryx2", "it", fails=2)], []) == (["ivshmem"], ["it: it broke"])
    assert measured([Made("tcp", "all", fails=1)], []) == ([], ["all: it broke"])


def test_what_is_ours_fails_the_run() -> None:
    with pytest.raises(BenchFailed, match="stream ivshmem vm-vm core 64 bytes: ours"):
        measured([Made("ivshmem", fails=2, error=BenchFailed), Made("tcp", "one")], [])


def test_a_group_less_one_is_otherwise_the_same() -> None:
    one, two, three = Made("ivshmem"), Made("tcp", "one"), Made("tcp", "two")
    pair = cast("Pair", SimpleNamespace(domains="vm-vm"))
    group = Group("a", pair, [one], rivals=[[two], [three]])
    less = runner.without(group, two)
    assert (less.subjects, less.rivals) == ([one], [[three]])
    assert dataclasses.replace(less, rivals=group.rivals) == group
