"""The `testbed` command with real VMs: what it prints, what it leaves behind however it ends, and README's example."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_support import processes_with

from images import Image
from testbed.ship import IN_MEMORY

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "testbed.cli"]


@pytest.fixture
def environment(tmp_path: Path, image: Image) -> Iterator[dict[str, str]]:
    """Runs and temporary files in a place of this test's own; fails the test if anything is left in the end."""
    assert image.rootfs.exists()  # so that no test measures the building of it
    runs = Path(tempfile.mkdtemp(prefix="idc-"))  # short: a socket's path has 107 bytes
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    interfaces, shared = set(os.listdir("/sys/class/net")), set(os.listdir("/dev/shm"))
    yield {**os.environ, "XDG_RUNTIME_DIR": str(runs), "TMPDIR": str(scratch), "IDC_TEST_MARK": str(tmp_path)}
    deadline = time.monotonic() + 30
    while True:
        left = [*processes_with(f"IDC_TEST_MARK={tmp_path}"),
                *(path.name for path in (runs / "idc-testbed").glob("[!.]*")), *os.listdir(scratch),
                *(set(os.listdir("/sys/class/net")) - interfaces), *(set(os.listdir("/dev/shm")) - shared)]
        if not left:
            shutil.rmtree(runs)
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def start(environment: dict[str, str], *words: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *map(str, words)], env=environment, cwd=ROOT, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_demo_prints_one_json_object(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file [1]").write_bytes(os.urandom(3_000_001))
    with start(environment, "demo", tmp_path / "file [1]", "--json") as demo:
        out, err = demo.communicate()
    assert demo.returncode == 0, err
    report = json.loads(out)
    assert report["sha256"] == hashlib.sha256((tmp_path / "file [1]").read_bytes()).hexdigest()
    assert (report["file"], report["size"]) == ("file [1]", 3_000_001)
    assert report["accel"] in {"kvm", "tcg"}
    assert f"accelerator: {report['accel']} ({report['accel_reason']})" in err.splitlines()
    assert report["network"].startswith(("tap", "stream"))
    found = {(row["name"], row["path"], row["mode"]): row for row in report["results"]}
    ways = [("file", path, mode) for path in ("ivshmem", "tcp") for mode in ("front to back", "back to front")]
    assert set(found) == {*ways, ("stream", "ivshmem", None), ("stream", "tcp", None), ("rtt", "tcp", None),
                          ("rtt", "ivshmem", "poll"), ("rtt", "ivshmem", "doorbell")}
    for (name, _, _), row in found.items():
        if name == "rtt":
            assert 0 < row["p50"] <= row["p90"] <= row["p99"] <= row["p999"] <= row["max"]
            assert (row["unit"], row["size"]) == ("ns", 64)
        else:
            assert row["value"] > 0
            assert row["unit"] == "B/s"


def test_two_commands_at_once_one_with_a_file_that_goes_from_disk_to_disk(
    environment: dict[str, str], tmp_path: Path
) -> None:
    large, small, saved = tmp_path / "large", tmp_path / "small", tmp_path / "saved"
    with large.open("wb") as file:  # not whole sectors, and with something at the end that must arrive
        file.seek(IN_MEMORY + (20 << 20) + 345)
        file.write(b"the end")
    small.write_bytes(os.urandom(100_001))
    ends = ("--from", "a" * 32, "--to", "b" * 32, "--json")  # the longest names
    with (start(environment, "transfer", large, *ends, "--path", "/mnt/scratch", "--save", saved) as one,
          start(environment, "transfer", small, *ends, "--tcp", "--quiet") as two):
        told = {process: process.communicate() for process in (one, two)}
    for process, file_sent, path in ((one, large, "ivshmem"), (two, small, "tcp")):
        out, err = told[process]
        assert process.returncode == 0, err
        done = json.loads(out)
        with file_sent.open("rb") as content:
            assert done["sha256"] == hashlib.file_digest(content, "sha256").hexdigest()
        assert (done["name"], done["size"], done["path"]) == (file_sent.name, file_sent.stat().st_size, path)
        assert done["accel"] in {"kvm", "tcg"}
    assert told[two][1] == "", "--quiet"
    with saved.open("rb") as content:
        assert hashlib.file_digest(content, "sha256").hexdigest() == json.loads(told[one][0])["sha256"]


@pytest.mark.parametrize("stage", ["booting", "plugged into"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ended_at_any_stage_it_leaves_nothing(environment: dict[str, str], stage: str, number: int) -> None:
    with start(environment, "demo") as demo:
        assert demo.stderr is not None
        while stage not in (line := demo.stderr.readline()):
            assert line, "it ended before that"
        demo.send_signal(number)
        out, err = demo.communicate(timeout=60)
    assert out == ""
    if number == signal.SIGKILL:
        assert demo.returncode == -number
    else:
        assert demo.returncode == 128 + number
        assert err.splitlines()[-1].startswith(f"interrupted ({signal.Signals(number).name})")


def test_a_qemu_that_fails_is_one_message(environment: dict[str, str]) -> None:
    with start(environment, "demo", "--accel", "tcg", "--qemu", "/bin/false") as demo:
        out, err = demo.communicate()
    assert (demo.returncode, out) == (1, "")
    assert "Traceback" not in err
    assert "error: VM front: QEMU ended (exit code 1)" in err
    log = re.search(r"^log: (.*)$", err, re.MULTILINE)
    assert log is not None
    assert Path(log.group(1)).exists(), "the log that the error names is gone"
    # Kept on purpose: a failed run's logs are for whoever reads the error.
    directory = Path(log.group(1)).parent
    assert not [path for path in directory.iterdir() if path.is_socket()]
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


@pytest.mark.parametrize("words", [["demo"], ["transfer", "{}", "--from", "left", "--to", "right"]])
def test_a_dry_run_prints_the_commands_and_starts_nothing(
    environment: dict[str, str], tmp_path: Path, words: list[str]
) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(IN_MEMORY + 1)
    with start(environment, *(word.format(tmp_path / "large") for word in words), "--dry-run", "--accel", "tcg") as dry:
        out, _ = dry.communicate()
    assert dry.returncode == 0
    assert out.count("qemu-system-x86_64 \\\n") == 2
    names = re.findall(r"^  -name (\w+),", out, re.MULTILINE)
    assert names == (["front", "back"] if words == ["demo"] else ["left", "right"])
    assert ("file=scratch.raw" in out) == (words != ["demo"])


def test_the_readmes_example_runs(environment: dict[str, str]) -> None:
    example, *_ = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], env=environment, cwd=ROOT, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[0-9a-f]{64} [\d.]+\n", done.stdout)
