"""The `testbed` command where no VM is needed: exit codes, one clear message, nothing else on standard output."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import processes_with

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "testbed.cli"]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A cache and a run directory of this test's own."""
    return {**os.environ, "IDC_TESTBED_CACHE": str(tmp_path / "cache"), "XDG_RUNTIME_DIR": str(tmp_path),
            "NO_COLOR": "1", "COLUMNS": "100"}


@pytest.fixture
def testbed(environment: dict[str, str]) -> Command:
    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*COMMAND, *map(str, words)], env=environment, cwd=ROOT, stdin=subprocess.DEVNULL,
                              capture_output=True, text=True, timeout=60, check=False)
    return run


@pytest.mark.parametrize(("words", "why"), [
    ("demo {}/absent", "cannot send {}/absent: No such file or directory"),
    ("demo {}", "cannot send {}: it is a directory"),
    ("demo /dev/null", "cannot send /dev/null: it is no regular file"),
    ("transfer {}/absent --from a --to b", "cannot send {}/absent: No such file or directory"),
    ("transfer {}/absent --from a --to b --dry-run", "cannot send {}/absent: No such file or directory"),
    ("transfer {}/file --from a --to a", "--from and --to are both 'a'"),
    ("transfer {}/file --from a --to ../b", "'../b' cannot be the name of a VM"),
    ("transfer {}/file --from a --to b --save {}", "--save {} is a directory"),
    ("transfer {}/file --from a --to b --save {}/absent/x", "{}/absent is no directory that this user may write in"),
    ("image show nothing", "no image matches 'nothing' (there are: none); try: testbed image build"),
])
def test_what_cannot_be_is_one_message_and_exit_code_1(testbed: Command, tmp_path: Path, words: str, why: str) -> None:
    (tmp_path / "file").write_text("x")
    done = testbed(*words.replace("{}", str(tmp_path)).split())
    assert done.returncode == 1
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert why.replace("{}", str(tmp_path)) in first
    assert all(line.startswith("hint: ") for line in rest), done.stderr
    assert not (tmp_path / "cache" / "images").exists(), "an image was built for nothing"


@pytest.mark.parametrize("words", [
    "nonsense", "demo --accel bogus", "transfer", "transfer x --from a", "image prune --keep -1"])
def test_wrong_usage_is_exit_code_2(testbed: Command, words: str) -> None:
    done = testbed(*words.split())
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cache_that_cannot_be_used_is_named(testbed: Command, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    done = testbed("demo")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"the cache directory {tmp_path}/cache cannot be used" in done.stderr
    assert "IDC_TESTBED_CACHE" in done.stderr


def test_an_empty_cache_lists_nothing(testbed: Command) -> None:
    assert json.loads(testbed("image", "list", "--json").stdout) == []
    assert testbed("image", "prune").stdout == "removed 0 items, freed 0 MiB\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_it_waits_ends_it_with_its_own_code(
    environment: dict[str, str], tmp_path: Path, number: int, code: int
) -> None:
    # Another build holds the cache, so this one waits for as long as it is given.
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from images.cache import Cache\n"
         "with Cache(Path(sys.argv[1])).locked(print):\n print('held', flush=True); sys.stdin.read()",
         str(tmp_path / "cache")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with subprocess.Popen([*COMMAND, "image", "build"], env=environment, cwd=ROOT, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as waiter:
            assert waiter.stderr is not None
            assert "waiting for it" in waiter.stderr.readline()
            waiter.send_signal(number)
            out, err = waiter.communicate(timeout=30)
        assert (waiter.returncode, out) == (code, "")
        assert err == f"interrupted ({signal.Signals(number).name}); everything that was started is ended\n"


def test_a_build_that_is_interrupted_leaves_no_process_and_can_be_resumed(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["IDC_TEST_MARK"] = str(tmp_path)
    with subprocess.Popen([*COMMAND, "image", "build"], env=environment, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as build:
        assert build.stderr is not None
        assert "looking up packages" in build.stderr.readline()
        build.send_signal(signal.SIGINT)
        build.communicate(timeout=60)
    assert build.returncode == 130
    deadline = time.monotonic() + 20  # a group that was signalled dies a moment later
    while left := processes_with(f"IDC_TEST_MARK={tmp_path}"):
        assert time.monotonic() < deadline, left
        time.sleep(0.02)
    assert subprocess.run([*COMMAND, "image", "prune", "--all"], env=environment, cwd=ROOT, check=False).returncode == 0
