"""The C core with two threads under AddressSanitizer, UBSan and ThreadSanitizer; and proof that this sees anything.

x86 orders most accesses by itself, so what a missing barrier does may never show in a run: ThreadSanitizer judges by
the C11 rules instead, and tests/model checks the fences.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CORE = HERE.parents[2] / "idc" / "core"
ENDPOINT, TRANSPORT = (HERE.parents[2] / "idc" / name for name in ("endpoint", "transport"))
GCC = shutil.which("gcc")


def build(core: Path, target: Path, sanitizer: str, program: str = "stress.c") -> Path:
    """Compile `program` with the core at `core`; a compiler error fails the test with its text."""
    assert GCC is not None, "gcc is missing: apt-get install gcc"
    command = [
        GCC, "-std=c11", "-g", "-O1", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror",
        "-Wno-tsan",  # fences: TSan takes none into account, and no order that it needs comes from one
        "-fno-sanitize-recover=all", f"-fsanitize={sanitizer}", "-pthread", f"-I{core}", f"-I{ENDPOINT}",
        f"-I{TRANSPORT}", *map(str, sorted(core.glob("*.c"))), str(ENDPOINT / "transact.c"),
        str(ENDPOINT / "lane.c"), str(TRANSPORT / "wire.c"), str(HERE / program), "-o", str(target),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def run(program: Path, rounds: int) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    return subprocess.run(
        [str(program), str(rounds)], capture_output=True, text=True, check=False, timeout=250, env=env
    )


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_two_threads_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    done = run(build(CORE, tmp_path / "stress", sanitizer), 2000)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.count("late 0") == 36


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_transactions_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    done = run(build(CORE, tmp_path / "engine", sanitizer, "engine_stress.c"), 3000)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.count("late 0") == 3


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_frames_over_a_socket_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    done = run(build(CORE, tmp_path / "wire", sanitizer, "wire_stress.c"), 1000)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.startswith("1000 frames")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_messages_of_a_lane_under_a_sanitizer(tmp_path: Path, sanitizer: str) -> None:
    done = run(build(CORE, tmp_path / "lane", sanitizer, "lane_stress.c"), 1000)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert done.stdout.startswith("1000 messages each way")


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("inner.h", "value, memory_order_release", "value, memory_order_relaxed"),
        ("inner.h", "    /* Release: the payload is complete", "    r->data[0]++; /*"),
    ],
    ids=["publish without release", "write outside the protocol"],
)
def test_thread_sanitizer_sees_a_broken_protocol(tmp_path: Path, file: str, old: str, new: str) -> None:
    core = tmp_path / "core"
    shutil.copytree(CORE, core, ignore=shutil.ignore_patterns("__pycache__"))
    text = (core / file).read_text()
    assert old in text, f"{file} has changed: give this test the new wording"
    (core / file).write_text(text.replace(old, new))
    done = run(build(core, tmp_path / "broken", "thread"), 200)
    assert done.returncode != 0
    assert "data race" in done.stderr


def test_a_lost_wakeup_is_noticed(tmp_path: Path) -> None:
    """A producer that never rings: the safety recheck keeps it going, and `late` gives it away."""
    core = tmp_path / "core"
    shutil.copytree(CORE, core, ignore=shutil.ignore_patterns("__pycache__"))
    text = (core / "ring.c").read_text()
    assert "return idc_bell_ring(&r->bell);" in text
    (core / "ring.c").write_text(text.replace("return idc_bell_ring(&r->bell);", "return IDC_OK;"))
    done = run(build(core, tmp_path / "mute", "undefined"), 20)
    assert done.returncode == 1
    assert "a wake-up was lost" in done.stderr


def test_the_core_stays_small() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in CORE.glob("*.[ch]"))
    assert lines < 1500
