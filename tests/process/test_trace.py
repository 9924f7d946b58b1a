"""Two host processes as domains, whose clocks differ by hours: nothing lost, or exactly what is said; one clock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import running
from trace_support import check_perfetto

from host.region import Region, RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from idc.trace import store
from idc.trace.events import Kind as What
from testbed.errors import SpecError
from testbed.trace.align import align, load
from testbed.trace.merge import merge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from idc.trace.events import TraceEvent

ROOT = Path(__file__).resolve().parents[2]
SIDE = Path(__file__).with_name("trace_side.py")
LIMIT = 60
HOURS = 3 * 3600 * 1_000_000_000
RING = 64 << 10


def spawn(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, *map(str, argv)], stdout=subprocess.PIPE, text=True, cwd=ROOT,
                            env={**os.environ, "PYTHONPATH": str(ROOT)})


class Bed:
    """A region with a trace ring and one with a service, who records at the back, and who answers."""

    def __init__(self, trace: Region, service: Region, directory: Path, offset: int) -> None:
        self.directory = directory
        self._regions = {"trace": trace, "service": service}
        self.recorder = spawn("-m", "idc.trace.record", self.place("back", "trace"), "--domain", "front", "--here",
                              "back", "--directory", directory, "--clock-offset", offset)
        self.back = spawn(SIDE, "back", self.place("back", "service"), "back", directory, offset)
        assert self.back.stdout is not None
        assert self.back.stdout.readline() == "ready\n"

    def place(self, member: str, channel: str) -> str:
        return f"member:{self._regions[channel].socket(member)}/{channel}"

    def front(self, *arguments: object) -> subprocess.Popen[str]:
        return spawn(SIDE, "front", self.place("front", "service"), self.place("front", "trace"), *arguments)

    def run_front(self, *arguments: object) -> dict[str, int]:
        front = self.front(*arguments)
        out, _ = front.communicate(timeout=LIMIT)
        assert front.returncode == 0
        found: dict[str, int] = json.loads(out)
        assert self.recorder.stdout is not None
        assert "connected, into" in self.recorder.stdout.readline()
        self.why = self.recorder.stdout.readline()
        return found

    def stop(self) -> None:
        for process in (self.back, self.recorder):
            process.send_signal(signal.SIGTERM)
        for process in (self.back, self.recorder):
            process.communicate(timeout=LIMIT)

    def files(self, domain: str) -> list[Path]:
        return store.of_domain(self.directory, domain)


@contextmanager
def domains(directory: Path, offset: int = HOURS) -> Iterator[Bed]:
    channels = [ChannelSpec("trace", Kind.BYTE, "front", "back", RING),
                ChannelSpec("service", Kind.MESSAGE, "front", "back", 128 * 512, 512)]
    with ExitStack() as stack:
        server = stack.enter_context(running())
        trace, service = (server.create(RegionSpec(channel.name, 1 << 20, {"front": Rights.RW, "back": Rights.RW},
                                                   [channel])) for channel in channels)
        bed = Bed(trace, service, directory, offset)
        try:
            yield bed
        finally:
            for process in (bed.back, bed.recorder):
                process.kill()
                process.communicate()


def numbers(listed: list[TraceEvent]) -> list[int]:
    return [int.from_bytes(event.data[:4], "little") for event in listed if event.text == "number"]


def test_lossless_loses_nothing_under_load(tmp_path: Path) -> None:
    with domains(tmp_path) as bed:
        said = bed.run_front("lossless", 20_000, 100)
        assert said["dropped"] == said["refused"] == 0
        (path,) = bed.files("front")
    file = store.read(path)
    listed = list(file.logged())
    assert path.stat().st_size > 20 * RING, "the ring was full again and again"
    assert numbers(listed) == list(range(20_000))
    assert [event.sequence for event in listed] == list(range(said["sequence"]))
    assert (file.unread, file.broken) == (0, "")


def test_lossy_counts_exactly_what_it_dropped(tmp_path: Path) -> None:
    with domains(tmp_path) as bed:
        front = bed.front("lossy", 20_000, 1000)
        assert bed.recorder.stdout is not None
        assert "connected" in bed.recorder.stdout.readline()
        bed.recorder.send_signal(signal.SIGSTOP)  # the ring holds 60 of the events
        time.sleep(0.5)
        bed.recorder.send_signal(signal.SIGCONT)
        out, _ = front.communicate(timeout=LIMIT)
        assert "closed the connection" in bed.recorder.stdout.readline()
        said = json.loads(out)
        (path,) = bed.files("front")
    source = load(store.read(path))
    there = numbers(source.events)
    assert there == sorted(set(there))
    assert said["dropped"] > 0
    assert source.dropped == said["dropped"]
    assert source.missing == 0
    assert len(there) == 20_000 - said["refused"]
    assert len(list(source.file.logged())) == said["sequence"] - said["dropped"]


def test_one_clock_for_both_and_no_effect_before_its_cause(tmp_path: Path) -> None:
    with domains(tmp_path / "traces") as bed:
        bed.run_front("lossless", 3000, 0, -HOURS // 7)
        bed.stop()
        paths = bed.files("front") + bed.files("back")
    aligned = align([load(store.read(path)) for path in paths])
    assert aligned.reference == "back"
    front, back = aligned.sources
    at, bound = aligned.at("front", front.events[500].time)
    truth = front.events[500].time + HOURS // 7 + HOURS  # both read one clock, each shifted by its own
    assert abs(at - truth) <= bound < 5_000_000
    for event in front.events:
        at, bound = aligned.at("front", event.time)
        assert abs(at - (event.time + HOURS // 7 + HOURS)) <= bound
    assert len(aligned.arrows) == 300
    for submit, handle in aligned.arrows:
        cause, bound = aligned.at("front", front.events[submit.begin].time)
        assert cause - bound <= back.events[handle.begin].time
        assert back.events[handle.end].time <= sum(aligned.at("front", front.events[submit.end].time))
    report = merge(paths, tmp_path / "all.pftrace")
    checked = check_perfetto(tmp_path / "all.pftrace")
    assert (report.reference, report.arrows, report.across) == ("back", 300, 300)
    assert sorted(checked.processes.values()) == ["back", "front"]
    arrows = checked.arrows()
    assert len(arrows) == 300
    for (sent, one), (handled, other) in arrows:
        assert (one, other) == ("front", "back")
        assert sent <= handled, "drawn in the order of cause and effect"
    assert sum(name == "number" for _, _, name in checked.instants) == 3000


def test_a_front_end_that_is_killed_leaves_what_it_logged(tmp_path: Path) -> None:
    with domains(tmp_path) as bed:
        front = bed.front("lossless", 10_000_000, 10)
        assert bed.recorder.stdout is not None
        assert "connected" in bed.recorder.stdout.readline()
        while not (paths := bed.files("front")) or paths[0].stat().st_size < 100_000:
            assert front.poll() is None
        front.send_signal(signal.SIGKILL)
        front.communicate()
        assert "closed the connection, died or started again" in bed.recorder.stdout.readline()
        first = list(store.read(paths[0]).events())
        there = numbers(first)
        assert there == list(range(len(there)))
        bed.run_front("lossless", 100, 0)  # the next one is a connection and a file of its own
        assert len(bed.files("front")) == 2


def test_a_recorder_that_is_killed_holds_nobody_up_and_its_file_is_good(tmp_path: Path) -> None:
    with domains(tmp_path) as bed:
        front = bed.front("lossless", 60_000, 100)
        while not (paths := bed.files("front")) or paths[0].stat().st_size < 200_000:
            assert front.poll() is None
        bed.recorder.kill()
        out, _ = front.communicate(timeout=LIMIT)
        assert front.returncode == 0
        said = json.loads(out)
        assert said["dropped"] > 0
        file = store.read(paths[0])
        there = numbers(list(file.events()))
        assert there == list(range(len(there)))
        assert file.ended == ""


COMMAND = [sys.executable, "-m", "testbed.cli", "trace"]


def test_the_command_merges_files_and_says_how_well(tmp_path: Path) -> None:
    with domains(tmp_path / "traces") as bed:
        bed.run_front("lossless", 100, 0)
        bed.stop()
        paths = bed.files("front") + bed.files("back")
    run = subprocess.run([*COMMAND, "-o", str(tmp_path / "all"), *map(str, paths)], capture_output=True, text=True,
                         cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    assert "10 arrows, 10 of them between domains" in run.stdout
    check_perfetto(tmp_path / "all")
    run = subprocess.run([*COMMAND, "-o", str(tmp_path / "other"), "--json", "--clock", "front", *map(str, paths)],
                         capture_output=True, text=True, cwd=ROOT, check=False)
    found = json.loads(run.stdout)
    assert found["reference"] == "front"
    back = found["domains"][0]
    assert (back["name"], back["dropped"], back["missing"], back["unread"]) == ("back", 0, 0, 0)
    assert 0 < back["best"] <= back["worst"]


@pytest.mark.parametrize(("arguments", "said"), [
    (["-o", "/nowhere/x", "a"], "error: -o /nowhere/x: /nowhere is no directory that this user may write in"),
    (["-o", "x", "/etc/hostname"], "error: /etc/hostname is no trace: it does not begin with IDCTRC01"),
    (["-o", "x", "/nowhere.idctrace"], "error: No such file or directory: /nowhere.idctrace"),
])
def test_what_cannot_be_merged_is_one_clear_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(said)
    assert len(run.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_clocks_that_were_never_compared_are_not_merged(tmp_path: Path) -> None:
    for name, recorder in (("a", "b"), ("c", "c")):
        with store.StoreWriter(tmp_path, name, recorder) as writer:
            from idc.trace.events import TraceEvent, Type, encode

            writer.append(encode(TraceEvent(1, 0, 0, 0, Type.INSTANT, What.USER, b"x", b"", 0, 0)))
    with pytest.raises(SpecError, match="the clock of domain a was never compared with that of c"):
        merge(sorted(tmp_path.glob("*")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
