"""`testbed bench --against`: another commit checked out, built and measured in turn, in a scratch clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cli_support import processes_with

from testbed.bench.errors import BenchFailed
from testbed.bench.facts import ROOT
from testbed.bench.setting import Setting
from testbed.bench.store import Store
from testbed.errors import SpecError
from testbed.progress import Steps
from testbed.results import against

if TYPE_CHECKING:
    from collections.abc import Iterator

#: A benchmark with a figure that the commit decides, so that what is measured is whether the right code ran.
FIXED = """
from testbed.accel import Verdict
from testbed.bench.groups import Found
from testbed.bench.names import Alone, Bench
from testbed.bench.rows import Row

VALUE = {value}

def measure(setting, pace):
    row = Row("fixed", "ivshmem", "process", "poll", "core", 64, "B/s", 1, value=VALUE, rounds=(VALUE,))
    return Alone(Verdict("tcg", "nothing ran"), [Found(row, None)])

BENCH = Bench("fixed", "a figure", alone=measure, default=False)
"""
#: Real ones, few enough that a turn takes a second or two: what will be slowed down, and two that will not.
FEW = """
from testbed.bench.groups import Group
from testbed.bench.names import Bench
from testbed.bench.subjects import round_trip, socket_round_trip

def groups(place, pace):
    pair = place.pair
    return [Group("few", pair, [round_trip(pair, "poll", "python", 64), round_trip(pair, "poll", "core", 64),
                                socket_round_trip(pair, "unix", "python", 64)])]

BENCH = Bench("few", "round trips", groups=groups, default=False)
"""
#: Where a message is about to go into the ring.
SEND = """        buffer = message if type(message) is bytes else ffi.from_buffer(message)
        if timeout is None:
"""
#: Makes a round trip in which each end sends once longer by a tenth of itself: by a loop that takes as long as a
#: twentieth of it. Each process finds out how many times round that is once it is warm, and counts instead of looking
#: at the clock, for the machine may be twice as fast a moment later, and the loop then is too.
SLOW = """
from time import perf_counter_ns as _now
_sent = []
def _spin(times):
    for _ in times: pass
def _timed(times):
    found = []
    for _ in range(50):
        start = _now()
        _spin(times)
        found.append(_now() - start)
    return sorted(found)[25]
def _wait():
    global _wait
    _sent.append(_now())
    if len(_sent) == 2500:
        part = sorted(two - one for one, two in zip(_sent[2000:], _sent[2001:]))[250] / 20
        none, many = _timed(range(0)), _timed(range(1000))
        times = range(max(0, round((part - none / 2) / (many - none) * 1000)))
        def _wait(): _spin(times)
"""


class Scratch:
    """A clone of this tree, as it is, with commits of its own."""

    def __init__(self, root: Path, environment: dict[str, str]) -> None:
        self.root = root
        self.environment = environment
        for name in ("guest", "host", "idc", "images", "testbed"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        (root / "idc/_core.abi3.so").touch()
        (root / ".gitignore").write_text("__pycache__\n*.so\n")
        self.git("init", "--quiet", "--initial-branch", "main")
        self.git("config", "user.name", "nobody")
        self.git("config", "user.email", "nobody@localhost")

    def git(self, *words: str) -> str:
        return subprocess.run(["git", *words], cwd=self.root, check=True, capture_output=True, text=True).stdout.strip()

    def commit(self, path: str, text: str) -> str:
        (self.root / path).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "Change it")
        return self.git("rev-parse", "HEAD")

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "testbed.cli", "bench", "--domains", "process", *words]

    def bench(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*words), cwd=self.root, env=self.environment, capture_output=True,
                              text=True, timeout=timeout, check=False)

    def compare(self, commit: str, turns: int, *names: str, timeout: float = 240) -> dict[str, Any]:
        run = self.bench(*names, "--against", commit, "--turns", str(turns), "--json", "-", timeout=timeout)
        assert run.returncode == 0, run.stderr
        found: dict[str, Any] = json.loads(run.stdout)
        return found


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    # Not pytest's directory, which is too long for the names of sockets.
    with tempfile.TemporaryDirectory(prefix="b") as runtime:
        environment = {**os.environ, "IDC_TESTBED_DATA": str(tmp_path / "data"), "XDG_RUNTIME_DIR": runtime}
        yield Scratch(tmp_path / "clone", environment)
        assert processes_with(f"XDG_RUNTIME_DIR={runtime}") == []
        assert list(Path(runtime).glob("idc-testbed/*/*")) == []


def test_two_commits_are_each_built_and_measured_in_turn(scratch: Scratch, tmp_path: Path) -> None:
    old = scratch.commit("testbed/bench/names/fixed.py", FIXED.format(value=100.0))
    scratch.commit("testbed/bench/names/fixed.py", FIXED.format(value=200.0))
    (scratch.root / "testbed/bench/names/fixed.py").write_text(FIXED.format(value=110.0))
    run = scratch.bench("fixed", "--against", "HEAD~1", "--turns", "2")
    assert run.returncode == 0, run.stderr
    turns = re.findall(r"^turn (\d) of 2: (\w+) and (\w+)(?:, \d+ seconds to go)? \.\.\.$", run.stderr, re.MULTILINE)
    assert turns == [("1", "base", "this"), ("2", "this", "base")]
    assert "+10.0%" in run.stdout
    assert "cannot tell for 1 rows: 2 and 2 turns show nothing at a level of 1%; at least 8 in turn" in run.stdout
    assert f"this ({scratch.git('rev-parse', 'HEAD')[:10]}+) against base ({old[:10]})" in run.stdout
    assert "note: the two measure by different code: 1 files of testbed/bench" in run.stdout
    with Store(tmp_path / "data" / "bench.sqlite") as store:
        base, this = (store.result(number) for number in store.runs())
    assert (base.version, this.version) == ("base", "this")
    assert base.session == this.session != ""
    assert (base.host["commit"], base.results[0].rounds) == (old, (100.0,) * 2)
    assert (this.host["dirty"], this.results[0].rounds) == (True, (110.0,) * 2)
    assert scratch.git("status", "--short") == "M testbed/bench/names/fixed.py"
    assert len(scratch.git("worktree", "list").splitlines()) == 1


def test_of_both_runs_of_a_turn_one_that_fails_is_said_and_ends_the_other(scratch: Scratch) -> None:
    path, measure = "testbed/bench/names/fixed.py", "def measure(setting, pace):\n"
    text = FIXED.format(value=1.0)
    long = "    import time\n    setting.baton.next()\n    time.sleep(600)\n"
    commit = scratch.commit(path, text.replace(measure, measure + long))
    fails = "    from testbed.bench.errors import BenchFailed\n    raise BenchFailed('no bench today')\n"
    (scratch.root / path).write_text(text.replace(measure, measure + fails))
    run = scratch.bench("fixed", "--against", commit, "--turns", "3")
    assert run.returncode == 1
    assert "this (this tree): `" in run.stderr
    assert "no bench today" in run.stderr.splitlines()[-1]
    assert "turn 2" not in run.stderr


def test_takes_of_both_are_kept_and_a_base_from_before_runs_whole(scratch: Scratch, tmp_path: Path) -> None:
    new = scratch.commit("testbed/bench/names/few.py", FEW)
    for path in scratch.root.glob("testbed/**/*.py"):
        path.write_text(path.read_text().replace("testbed.bench.baton", "testbed.bench.staff"))
    (scratch.root / "testbed/bench/baton.py").rename(scratch.root / "testbed/bench/staff.py")
    old = scratch.commit(".gitignore", "__pycache__\n*.so\n.old\n")
    scratch.git("checkout", "--quiet", new)
    note = "note: the base cannot take turns within a run yet: whole runs were alternated"
    for commit, takes in ((new, 12), (old, 0)):
        run = scratch.bench("few", "--against", commit, "--turns", "2")
        assert run.returncode == 0, run.stderr
        assert (note in run.stdout) == (takes == 0)
        assert run.stderr.count("\n  process: few ...\n") == (2 if takes else 4), "each turn says what it is about"
        with Store(tmp_path / "data" / "bench.sqlite") as store:
            for result in map(store.result, store.runs()[-2:]):
                for row in result.results:
                    assert len(row.rounds) == 2
                    assert [len(each) for each in row.takes] == ([takes] * 2 if takes else [])


def test_a_commit_that_does_not_build_is_one_clear_line(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = scratch.commit("idc/core/ring.c", "this is no C\n")
    monkeypatch.setattr(against, "ROOT", scratch.root)
    monkeypatch.setenv("XDG_RUNTIME_DIR", scratch.environment["XDG_RUNTIME_DIR"])
    with pytest.raises(BenchFailed, match=r"^base: `.*idc/core/build.py` ended with 1: .*") as caught:
        against.measure(Setting(("rate",), frozenset({"process"}), True, Steps(quiet=True)), broken, 1)
    assert "\n" not in caught.value.message
    with pytest.raises(SpecError, match=f"--against nothing: no commit of {scratch.root}"):
        against.resolve("nothing")
    assert against.resolve("HEAD") == broken
    os.utime(scratch.root / "idc/core/ring.c", (4e9, 4e9))
    with pytest.raises(SpecError, match="the C core of this tree is older than its sources"):
        against.check_core()
    shutil.rmtree(scratch.root / ".git")
    with pytest.raises(SpecError, match=f"--against needs a clone with its history, {scratch.root} is none"):
        against.resolve("HEAD")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_interrupted_it_leaves_nothing(scratch: Scratch, tmp_path: Path, number: signal.Signals) -> None:
    commit = scratch.commit("testbed/bench/names/few.py", FEW)
    with subprocess.Popen(scratch.command("few", "--against", commit), cwd=scratch.root, env=scratch.environment,
                          text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stderr is not None
        while "turn 1 of 12: base and this" not in (line := run.stderr.readline()):
            assert line, "it ended before that"
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (128 + number if number == signal.SIGTERM else -number, "")
    if number == signal.SIGTERM:
        assert err.splitlines()[-1].startswith("interrupted (SIGTERM)")
    # What was killed is cleared away by those that it had started: not at once.
    runtime = scratch.environment["XDG_RUNTIME_DIR"]
    wait_until_gone(runtime)
    with Store(tmp_path / "data" / "bench.sqlite") as store:
        assert store.runs() == []


def wait_until_gone(runtime: str) -> None:
    deadline = time.monotonic() + 60
    while processes_with(f"XDG_RUNTIME_DIR={runtime}") or any(Path(runtime).glob("idc-testbed/*/*")):
        assert time.monotonic() < deadline, processes_with(f"XDG_RUNTIME_DIR={runtime}")
        time.sleep(0.1)


@pytest.mark.soak
def test_a_commit_is_no_different_from_itself_and_a_tenth_is_found(scratch: Scratch, tmp_path: Path) -> None:
    """Real round trips between real processes: first of one commit twice, then of one whose Python sender is slower."""
    commit = scratch.commit("testbed/bench/names/few.py", FEW)
    same = scratch.compare(commit, 12, "few", timeout=900)
    assert {each["verdict"] for each in same["differences"]} == {"no difference"}, same["differences"]
    path = scratch.root / "idc/messages.py"
    text = path.read_text()
    assert text.count(SEND) == 1
    path.write_text(text.replace("from __future__ import annotations\n", f"from __future__ import annotations\n{SLOW}")
                    .replace(SEND, f"        _wait()\n{SEND}"))
    found = scratch.compare(commit, 12, "few", timeout=900)
    verdicts = {f"{each['path']} {each['api']}": each for each in found["differences"]}
    slowed = verdicts.pop("ivshmem python")
    assert slowed["verdict"] == "worse", found["differences"]
    assert 0.04 < slowed["change"] < 0.25
    assert {each["verdict"] for each in verdicts.values()} == {"no difference"}, found["differences"]
