"""The worker's commands, at two ends of a region within this process: that loops count right and give up in time."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
from support import local_region

from idc.layout import ChannelSpec, Kind
from idc.measure.worker import Worker, serve, unpack_samples

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHANNELS = (
    ChannelSpec("small", Kind.MESSAGE, "front", "back", 64 * 128, 128),
    ChannelSpec("bulk", Kind.BYTE, "front", "back", 64 << 10),
    ChannelSpec("bare", Kind.BYTE, "front", "back", 64 << 10),
    ChannelSpec("calls", Kind.MESSAGE, "front", "back", 256 * 256, 256),
    ChannelSpec("pump", Kind.MESSAGE, "front", "back", 256 * 256, 256),
)
LIMIT = 5.0


class Two:
    """Two workers, each with a thread of its own."""

    def __init__(self, near: Worker, far: Worker, pool: ThreadPoolExecutor) -> None:
        self.near, self.far, self.pool = near, far, pool

    def run(self, near: dict[str, Any], far: dict[str, Any],
            late: float = 0.0) -> tuple[dict[str, Any], dict[str, Any]]:
        """Both; far `late` seconds after near."""
        ours = self.pool.submit(self.near.answer, dict(near))
        time.sleep(late)
        theirs = self.pool.submit(self.far.answer, dict(far))
        return ours.result(), theirs.result()

    def both(self, **command: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same for both, each in its role; both must do it."""
        ours, theirs = self.run(command | {"role": "near"}, command | {"role": "far"})
        assert "ok" in ours, ours
        assert "ok" in theirs, theirs
        return ours["ok"], theirs["ok"]

    def samples(self) -> list[int]:
        return list(unpack_samples(self.near.answer({"do": "samples"})["ok"]))


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    with (local_region(CHANNELS, 8 << 20) as local, local.join(0) as front, local.join(1) as back,
          ThreadPoolExecutor(2) as pool):
        workers = Two(Worker(front, limit=LIMIT), Worker(back, limit=LIMIT), pool)
        for channel in ("small", "bulk"):
            attach = {"do": "attach", "channel": channel}
            assert [answer.keys() for answer in workers.run(attach, attach)] == [{"ok"}, {"ok"}]
        yield workers
        workers.near.close()
        workers.far.close()


@pytest.mark.parametrize("mode", ["poll", "doorbell", "adaptive"])
@pytest.mark.parametrize("api", ["core", "python"])
def test_every_round_trip_is_counted(two: Two, mode: str, api: str) -> None:
    near, _ = two.both(do="rtt", channel="small", api=api, mode=mode, size=64, count=20, per=3, warm=6)
    samples = two.samples()
    assert len(samples) == 20
    assert min(samples) > 0
    assert 3 * sum(samples) <= near["ns"]
    assert near["late"] == 0


@pytest.mark.parametrize("command", ["line", "bell"])
def test_bare_loops_start_from_cleared_words(two: Two, command: str) -> None:
    for _ in range(2):
        assert two.far.answer({"do": "drain"}) == {"ok": {}}
        assert two.near.answer({"do": "clear"}) == {"ok": {}}
        two.both(do=command, count=30, per=2, warm=4)
        assert len(two.samples()) == 30


def test_a_timetable_counts_a_stall_for_each_message_that_was_due_in_it(two: Two) -> None:
    far = {"do": "rtt", "role": "far", "channel": "small", "api": "core", "mode": "poll", "size": 64, "count": 100,
           "per": 1, "warm": 0}
    near = {"do": "paced", "channel": "small", "mode": "poll", "size": 64, "count": 100, "interval": 1_000_000,
            "warm": 0}
    assert [answer.keys() for answer in two.run(near, far, late=0.06)] == [{"ok"}, {"ok"}]
    slow = [sample for sample in two.samples() if sample > 10_000_000]
    assert len(slow) >= 40, "a closed loop would have seen one"
    assert max(slow) > 50_000_000


@pytest.mark.parametrize("mode", ["poll", "doorbell"])
@pytest.mark.parametrize(("api", "batch"), [("core", False), ("python", False), ("python", True)])
def test_messages_one_way_are_all_there(two: Two, mode: str, api: str, batch: bool) -> None:
    near, _ = two.both(do="rate", channel="small", api=api, mode=mode, size=64, count=333, warm=7, batch=batch)
    assert near["ns"] > 0


@pytest.mark.parametrize("api", ["core", "python"])
def test_streams_are_whole(two: Two, api: str) -> None:
    near, _ = two.both(do="stream", channel="bulk", api=api, mode="adaptive", chunk=4096, total=100 * 4096, warm=4096)
    assert near["ns"] > 0


def test_many_pipelines_are_one_command(two: Two) -> None:
    two.near.answer({"do": "clear"})
    tries = [{"chunk": 1024, "slots": slots, "routine": 0, "total": 1024 * 50} for slots in (2, 8, 64)]
    near, _ = two.both(do="pipe", tries=tries)
    assert len(near["each"]) == 3
    assert sum(near["each"]) == near["ns"]
    assert len(two.near.answer({"do": "copy", "tries": tries})["ok"]["each"]) == 3


@pytest.mark.parametrize("api", ["core", "python"])
def test_sockets_do_the_same(two: Two, api: str, tmp_path: Path) -> None:
    where = str(tmp_path / "peer")
    two.far.answer({"do": "listen", "name": api, "family": "unix", "address": where})
    two.run({"do": "connect", "name": api, "family": "unix", "address": where}, {"do": "accept", "name": api})
    for polls in (False, True) if api == "core" else (False,):
        two.both(do="socket_rtt", name=api, api=api, size=64, count=20, per=2, warm=2, polls=polls)
        assert len(two.samples()) == 20
    near, _ = two.both(do="socket_stream", name=api, api=api, chunk=1000, total=100_000, warm=1000)
    assert near["ns"] > 0


def test_a_loop_that_nobody_answers_gives_up_and_says_so() -> None:
    with local_region(CHANNELS) as local, local.join(0) as front, local.join(1) as back, ThreadPoolExecutor(2) as pool:
        workers = Two(Worker(front, limit=0.1), Worker(back, limit=0.1), pool)
        began = time.monotonic()
        workers.near.answer({"do": "drain"})  # the host rang when the members came
        for command in ({"do": "line", "role": "near", "count": 1, "per": 1, "warm": 0},
                        {"do": "bell", "role": "near", "count": 1, "per": 1, "warm": 0}):
            assert workers.near.answer(dict(command)) == {"error": "TimedOutError: the loop took longer than 0.1 s"}
        assert time.monotonic() - began < 5
        workers.near.close()
        workers.far.close()


def test_each_line_is_answered_by_one() -> None:
    commands = io.StringIO('{"do": "hello"}\n{"do": "nonsense"}\n{"do": "rtt"}\n{"do": "hello"}\n')
    answers = io.StringIO()
    with local_region(CHANNELS) as local, local.join(0) as front:
        serve(front, commands, answers)
    first, second, third, last = map(json.loads, answers.getvalue().splitlines())
    assert first["ok"]["clock_ns"] > 0
    assert first["ok"].keys() == last["ok"].keys()
    assert second == {"error": "no such command"}
    assert third["error"].startswith("TypeError: ")


def meet(two: Two, name: str, **where: str) -> None:
    command = {"do": "meet", "name": name, **where}
    assert two.run(command | {"role": "near"}, command | {"role": "far"}) == ({"ok": {}}, {"ok": {}})


@pytest.fixture(scope="module")
def calling(two: Two) -> Two:
    for name in ("calls", "pump"):
        meet(two, name)
    return two


@pytest.mark.parametrize("mode", ["poll", "doorbell", "adaptive"])
@pytest.mark.parametrize("api", ["core", "python"])
def test_transactions_are_counted_one_at_a_time_and_many(calling: Two, mode: str, api: str) -> None:
    calling.both(do="transact", api=api, mode=mode, size=64, count=20, per=2, warm=4)
    assert len(calling.samples()) == 20
    near, _ = calling.both(do="transact", api=api, mode=mode, size=64, count=333, per=1, warm=7, outstanding=8)
    assert near["ns"] > 0


@pytest.mark.parametrize("strategy", ["copy", "map", "handover"])
@pytest.mark.parametrize("touched", [False, True])
def test_bulk_by_every_strategy_and_the_consumer_sees_what_was_sent(calling: Two, strategy: str, touched: bool) -> None:
    for size in (4096, 64 << 10):
        near, _ = calling.both(do="bulk", api="python", strategy=strategy, size=size, touched=touched, count=40, warm=3,
                               outstanding=2, mode="adaptive")
        assert near["ns"] > 0


@pytest.mark.parametrize("touched", [False, True])
def test_bulk_by_a_handler_in_the_core(calling: Two, touched: bool) -> None:
    for size in (4096, 64 << 10):
        calling.both(do="bulk", api="core", strategy="copy", size=size, touched=touched, count=40, warm=3,
                     outstanding=2, mode="adaptive")
    calling.both(do="transact", api="core", mode="adaptive", size=64, count=20, per=1, warm=4)  # as before
