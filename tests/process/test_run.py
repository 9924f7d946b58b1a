"""Runs and their keeper: whatever way the owner ends, nothing of the run is left."""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed import keeper
from testbed.bed import Testbed
from testbed.errors import RunError, SpecError
from testbed.run import Run

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import os, signal, sys, time
from pathlib import Path
from testbed.run import Run
run = Run(base=Path(sys.argv[1]), keep=sys.argv[2])
(run.directory / "vm.log").write_text("last words")
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
child = run.popen([sys.executable, "-c", stubborn], stdout=1)
if len(sys.argv) > 3:
    os.fork() or time.sleep(1000)  # holds the pipe to the keeper open
print(run.id, flush=True)
with run:
    time.sleep(1000)
"""


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.02)


def start_owner(base: Path, keep: str, *more: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(base), keep, *more], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    words = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    process.stdout.close()
    (run_id,) = words - {"up"}
    return process, run_id


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def test_a_run_marks_its_processes_and_ends_them(base: Path) -> None:
    with Run(base=base) as run:
        process = run.popen(["sleep", "1000"])
        assert run.processes() == [process.pid]
        assert run.directory.stat().st_mode & 0o777 == 0o700
    assert process.wait(5) == -signal.SIGTERM
    assert [p.name for p in base.iterdir()] == [".lock"]
    with pytest.raises(RunError, match="is closed"):
        run.popen(["true"])


def test_a_process_is_found_as_soon_as_it_was_started(base: Path) -> None:
    with Run(base=base) as run:
        for _ in range(50):  # one in four had no environment yet, when only one look was taken
            process = run.popen(["sleep", "1000"])
            assert run.processes() == [process.pid]
            process.kill()
            process.wait(5)


def test_huge_pages_are_kept_from_one_process_alone(base: Path) -> None:
    def enabled(*, huge_pages: bool) -> str:
        command = ["grep", "THP_enabled", "/proc/self/status"]
        process = run.popen(command, stdout=subprocess.PIPE, huge_pages=huge_pages)
        return process.communicate(timeout=5)[0].decode().split()[1]

    with Run(base=base) as run:
        assert [enabled(huge_pages=huge) for huge in (True, False, True)] == ["1", "0", "1"]


def test_a_failed_run_keeps_its_logs_but_no_socket(base: Path) -> None:
    def work() -> None:
        with Run(base=base) as run:
            kept.append(run)
            (run.directory / "vm.log").write_text("last words")
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(run.path("vm.qmp")))
            raise ValueError

    kept: list[Run] = []
    with pytest.raises(ValueError, match=r"^$"):
        work()
    assert sorted(p.name for p in kept[0].directory.iterdir()) == [keeper.KEPT_NAME, "vm.log"]
    Run(base=base, keep="never").close()
    assert (kept[0].directory / "vm.log").exists(), "swept away although it is kept"


@pytest.mark.parametrize(("keep", "stays"), [("never", False), ("failed", False), ("always", True)])
def test_kill_9_of_the_owner_leaves_nothing_but_what_is_always_kept(base: Path, keep: str, stays: bool) -> None:
    owner, run_id = start_owner(base, keep)
    assert keeper.find(run_id)
    owner.kill()
    owner.wait()
    eventually(lambda: not keeper.find(run_id))
    eventually(lambda: (base / run_id / keeper.KEPT_NAME).exists() if stays else not (base / run_id).exists())


def test_ctrl_c_ends_the_run_though_it_reaches_the_whole_group(base: Path) -> None:
    owner, run_id = start_owner(base, "failed")
    os.killpg(owner.pid, signal.SIGINT)
    owner.wait(20)
    assert keeper.find(run_id) == []
    assert not (base / run_id).exists()


def test_a_forked_child_of_the_owner_does_not_keep_the_run_alive(base: Path) -> None:
    owner, run_id = start_owner(base, "never", "fork")
    owner.kill()
    owner.wait()
    eventually(lambda: not keeper.find(run_id) and not (base / run_id).exists())
    os.killpg(owner.pid, signal.SIGKILL)


def test_when_the_keeper_is_killed_too_the_next_run_sweeps(base: Path) -> None:
    owner, run_id = start_owner(base, "never")
    keepers = [
        pid
        for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
        if f"keeper.py\0{run_id}".encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    assert len(keepers) == 1
    pidfd = os.pidfd_open(keepers[0])
    os.kill(keepers[0], signal.SIGKILL)
    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)
    owner.kill()
    owner.wait()
    assert keeper.find(run_id)
    Run(base=base, keep="never").close()
    assert keeper.find(run_id) == []
    assert not (base / run_id).exists()


def test_runs_side_by_side_do_not_touch_each_other(base: Path) -> None:
    with Run(base=base) as one, Run(base=base) as two:
        process = one.popen(["sleep", "1000"])
        two.popen(["sleep", "1000"])
        two.close()
        assert process.poll() is None
        assert one.processes() == [process.pid]


def test_a_directory_of_somebody_else_is_refused(base: Path, tmp_path: Path) -> None:
    base.mkdir(mode=0o777)
    base.chmod(0o777)
    with pytest.raises(RunError, match="this user's alone"):
        Run(base=base)
    link = tmp_path / "link"
    link.symlink_to(base)
    with pytest.raises(RunError, match="this user's alone"):
        Run(base=link)


def test_a_path_too_long_for_a_socket_is_refused(base: Path) -> None:
    with Run(base=base, keep="never") as run, pytest.raises(RunError, match="too long"):
        run.path("x" * 108)


def test_who_wants_a_registry_of_a_testbed_without_one_is_told_how_to_have_it() -> None:
    with Testbed() as bed:
        wishes: list[Callable[[], str]] = [lambda: bed.registry_address, lambda: bed.control("front")]
        for wish in wishes:
            with pytest.raises(SpecError, match=r"this testbed has no (registry|broker)") as caught:
                wish()
            assert "a line [broker] in the topology file (`testbed config show` prints that" in caught.value.hint
