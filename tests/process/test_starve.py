"""A process starved of CPU gets about its share, and is never left stopped."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from region_support import until

from testbed.errors import SpecError, TestbedError
from testbed.starve import starve, turns

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def busy() -> Iterator[int]:
    """A process that computes; its id."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def helper_of(parent: int) -> int:
    """The helper process that `parent` started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
            ppid = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if ppid == parent and b"starve.py" in words:
            return int(path.name)
    return 0


def test_it_gets_its_share() -> None:
    with busy() as pid:
        with starve(pid, 0.2, seed=3) as starved:
            before = cpu_seconds(pid)
            time.sleep(2)
            used = cpu_seconds(pid) - before
        assert state(pid) != "T"
        assert starved.turns > 10
        assert 0.1 < starved.share < 0.4
        assert used < 1.2  # of two seconds; on a loaded machine it gets less, never more
        time.sleep(0.2)
        before = cpu_seconds(pid)
        until("it runs again", lambda: cpu_seconds(pid) > before + 0.2)


def test_it_is_not_left_stopped_when_the_test_dies() -> None:
    program = ("import sys, time; from testbed.starve import starve\n"
               "with starve(int(sys.argv[1]), 0.01, period=5.0): print('x', flush=True); time.sleep(1000)")
    with busy() as pid:
        command = [sys.executable, "-c", program, str(pid)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as test:
            until("it is stopped", lambda: state(pid) == "T")
            helper = helper_of(test.pid)
            assert helper
            test.kill()
        until("it is let go", lambda: state(pid) != "T")
        until("the helper ends", lambda: not Path(f"/proc/{helper}").exists() or state(helper) == "Z")
        assert state(pid) != "T"


def test_it_is_not_left_stopped_when_the_helper_dies() -> None:
    with busy() as pid:

        def kill_the_helper() -> None:
            with starve(pid, 0.01, period=5.0):
                until("it is stopped", lambda: state(pid) == "T")
                os.kill(helper_of(os.getpid()), signal.SIGKILL)

        with pytest.raises(TestbedError, match="exit code -9"):
            kill_the_helper()
        until("it is let go", lambda: state(pid) != "T")


def test_it_may_end_meanwhile() -> None:
    with busy() as pid, starve(pid, 0.5) as starved:
        os.kill(pid, signal.SIGKILL)
        until("it is gone", lambda: state(pid) == "Z")
    assert starved.elapsed > 0


def test_the_seed_gives_the_turns() -> None:
    first, again, other = ([*itertools.islice(turns(0.25, 0.05, seed), 100)] for seed in (1, 1, 2))
    assert first == again != other
    assert sum(run for run, _ in first) == pytest.approx(0.25 * sum(run + stand for run, stand in first))


@pytest.mark.parametrize(("share", "period"), [(0.0, 0.05), (1.0, 0.05), (-1.0, 0.05), (0.5, 0.0), (0.5, 60.0)])
def test_a_share_that_makes_no_sense_is_refused(share: float, period: float) -> None:
    with pytest.raises(SpecError, match="cannot starve"), starve(os.getpid(), share, period=period):
        pass
