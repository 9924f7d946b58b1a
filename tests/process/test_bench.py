"""A real quick run between two processes of this machine: its JSON, its database, and ends that fail."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import processes_with

from testbed.bench.errors import BenchFailed, PeerFailed
from testbed.bench.groups import Group, Pace, measure
from testbed.bench.iceoryx import Iceoryx
from testbed.bench.names import rtt
from testbed.bench.places import processes
from testbed.bench.rows import parse
from testbed.bench.store import Store
from testbed.bench.subjects import OpenLoop, round_trip

COMMAND = [sys.executable, "-m", "testbed.cli", "bench", "--quick", "--domains", "process"]
SHORT = Pace(rounds=2, seconds=0.01, scout_seconds=0.002, kept=1, quick=True)


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    # Not pytest's directory, which is too long for the names of sockets.
    with tempfile.TemporaryDirectory(prefix="b") as runtime:
        yield {**os.environ, "IDC_TESTBED_DATA": str(tmp_path / "data"), "XDG_RUNTIME_DIR": runtime}
        assert processes_with(f"XDG_RUNTIME_DIR={runtime}") == []
        assert list(Path(runtime).glob("idc-testbed/*/*")) == []


def test_a_quick_run_is_one_json_object_and_kept(environment: dict[str, str], tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, "rtt", "rate", "--json", str(tmp_path / "out.json")], env=environment,
                         capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    result = parse((tmp_path / "out.json").read_text(), "out.json")
    assert (result.accel, result.quick) == ("none", True)
    assert {"cpu", "kernel", "commit", "pinning", "ends"} <= result.host.keys()
    assert {row.domains for row in result.results} == {"process"}
    for mode in ("poll", "doorbell", "adaptive"):
        for api in ("core", "python"):
            row = result.find("rtt", "ivshmem", "process", mode, api, 64)
            assert row is not None
            assert row.samples > 50
            assert row.late == 0
            assert row.p50 is not None
            assert 0 < row.p50 <= (row.p90 or 0) <= (row.p99 or 0) <= (row.p999 or 0) <= (row.max or 0)
        assert result.find("rtt-open", "ivshmem", "process", mode, "core", 64) is not None
        assert result.find("rate", "ivshmem", "process", mode, "core", 64) is not None
    for path in ("limit", "unix"):
        assert result.find("rtt", path, "process", "poll" if path == "limit" else None, "core", 64) is not None
    other = result.find("rtt", "iceoryx2", "process", "poll", "python", 64)
    assert other is not None, result.absent
    assert other.cpu_s is not None
    assert other.cpu_s == pytest.approx(other.cpu["near"] + other.cpu["far"])
    assert 0 <= result.host["steal"] <= 1
    assert result.host["load_after"] > 0
    polled, rung = (result.find("rtt", "ivshmem", "process", mode, "core", 64) for mode in ("poll", "doorbell"))
    assert polled is not None
    assert rung is not None
    assert polled.figure < rung.figure
    assert "bare cache line" in run.stdout
    with Store(tmp_path / "data" / "bench.sqlite") as store:
        assert store.result(1) == result
        histogram = store.histogram(1, result.results.index(polled))
        assert histogram is not None
        assert (histogram.count, histogram.percentiles().p50) == (polled.samples, polled.p50)
    report = subprocess.run([*COMMAND[:3], "report", "-o", str(tmp_path / "out.html")], env=environment,
                            capture_output=True, text=True, timeout=60, check=False)
    assert report.stdout.startswith(f"{tmp_path / 'out.html'}: run 1, "), report.stderr
    page = (tmp_path / "out.html").read_text()
    assert all(f'"process-{each}"' in page for each in ("glance", "rtt-core-64-ecdf", "rtt-core-64-tail", "rate"))
    again = subprocess.run([*COMMAND[:4], "--bars", str(tmp_path / "out.json")], env=environment,
                           capture_output=True, text=True, timeout=60, check=False)
    assert "process: core polled 64 B by the bare cache line" in again.stdout


def test_interrupted_it_leaves_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen([*COMMAND, "--json", str(tmp_path / "out.json")], env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        while "round trips" not in (line := run.stderr.readline()):
            assert line, "it ended before that"
        time.sleep(0.5)  # somewhere in the middle of it
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (130, "")
    assert err.splitlines()[-1].startswith("interrupted (SIGINT)")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with Store(tmp_path / "data" / "bench.sqlite") as store:
        assert store.runs() == []


@pytest.mark.parametrize(("arguments", "said"), [
    (["nothing"], "error: no benchmark is called 'nothing' (there are: rtt, rate, stream, idc, trace, block"),
    (["--json", "/nowhere/out.json"], "error: --json /nowhere/out.json: /nowhere is no directory that this user may"),
    (["--bars", "/nowhere/in.json"], "error: No such file or directory: /nowhere/in.json"),
])
def test_what_cannot_be_is_said_before_anything_is_measured(
        environment: dict[str, str], arguments: list[str], said: str) -> None:
    run = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, timeout=60,
                         check=False)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(said)
    assert len(run.stderr.splitlines()) == 1


def test_iceoryx_that_fails_is_a_peers_failure() -> None:
    with processes() as place:
        assert place.run is not None
        subject = Iceoryx(place.run, "nothing of this name", 0, (None, None))
        with pytest.raises(PeerFailed, match="iceoryx2, nothing of this name of 0 B: it ended with 1: ") as caught:
            subject.prepare(0.01)
        assert caught.value.subject is subject


def test_an_end_that_dies_is_one_clear_line() -> None:
    with processes() as place:
        os.kill(place.pair.far.pid, signal.SIGKILL)
        with pytest.raises(BenchFailed, match="rtt ivshmem process poll core 64 bytes: ") as caught:
            measure(Group("a", place.pair, [round_trip(place.pair, "poll", "core", 64)]), SHORT)
        assert "\n" not in str(caught.value)


def test_a_command_that_there_is_not_is_an_answer() -> None:
    with processes() as place:
        with pytest.raises(BenchFailed, match="no such command"):
            place.pair.near.ask(do="nothing")
        with pytest.raises(BenchFailed, match="TypeError"):
            place.pair.near.ask(do="rtt")
        assert place.pair.near.ask(do="hello")["clock_ns"] > 0  # and it goes on


def test_a_timetable_counts_a_stall_for_each_that_was_due() -> None:
    with processes() as place:
        subject = OpenLoop(place.pair, "poll", 64)
        subject.prepare(0.02)
        taken = subject.take(0.05)
        assert taken.samples is not None
        assert taken.offered is not None
        # the mean time between starts is the timetable's, whatever the samples are
        assert len(taken.samples) >= 8
        assert min(taken.samples) > 0


def test_the_api_in_a_quick_run(environment: dict[str, str], tmp_path: Path) -> None:
    run = subprocess.run([*COMMAND, "idc", "--json", str(tmp_path / "out.json")], env=environment,
                         capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    result = parse((tmp_path / "out.json").read_text(), "out.json")
    found = {(row.name, row.path, row.mode, row.api, row.size, row.outstanding, row.strategy, row.touched)
             for row in result.results}
    for mode in ("poll", "doorbell", "adaptive"):
        assert {("transact", "ivshmem", mode, api, 64, depth, None, None)
                for api in ("core", "python") for depth in (1, 64)} <= found
    for size in (4096, 1 << 20):
        assert {("bulk", "ivshmem", "poll", "python", size, 2, strategy, touched)
                for strategy in ("copy", "map", "handover") for touched in (False, True)} <= found
        assert ("bulk", "ring", "poll", "core", size, None, None, None) in found
    for path in ("idc-tcp", "tcp"):
        assert ("transact", path, None, "python", 64, 1, None, None) in found
        assert ("face", path, None, "python", 1 << 20, None, None, None) in found
    assert all(row.route == "direct" for row in result.results if row.name == "bulk" and row.strategy)
    assert "map beats copy" in run.stdout
    assert "by the ring's round trip" not in run.stdout, "that bar is about VMs"
    assert "process: stream face over TCP" in run.stdout


def test_each_name_measures_what_is_compared_in_one_group() -> None:
    with processes() as place:
        first = rtt.groups(place, SHORT)[0]
    keys = {(subject.key.path, subject.key.mode, subject.key.api) for subject in first.subjects}
    assert {("limit", "poll", "core"), ("limit", "doorbell", "core"), ("ivshmem", "poll", "core"),
            ("ivshmem", "adaptive", "python"), ("unix", None, "core"), ("unix", None, "python")} <= keys


def test_json_alone_on_standard_output(environment: dict[str, str]) -> None:
    run = subprocess.run([*COMMAND, "rate", "--json", "-", "--quiet"], env=environment, capture_output=True,
                         text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["results"]
    assert run.stderr == ""
