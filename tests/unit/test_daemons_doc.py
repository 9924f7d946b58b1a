"""The units in the docs start what is there: each option of theirs is one that the daemon has."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
STARTS = [line for page in ("daemons.md", "registry.md")
          for line in re.findall(r"^ExecStart=/usr/bin/python3 (.+)$", (DOCS / page).read_text(), re.MULTILINE)]


def test_every_daemon_has_a_unit() -> None:
    assert {start.partition("-m ")[2].split()[0] for start in STARTS} == {
        "host.holder", "host.ivshmem.member", "host.registry", "host.broker", "guest.drivers"}


def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze here")
    for page in ("daemons.md", "registry.md"):
        for text in re.findall(r"```ini\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
            (tmp_path / text.partition("\n")[0].removeprefix("# ")).write_text(text)
    units = sorted(map(str, tmp_path.iterdir()))
    assert len(units) == 5
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True,
                          check=False)
    ours = [line for line in done.stderr.splitlines() if "idc-" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


@pytest.mark.parametrize("start", STARTS)
def test_a_units_command_is_one_that_the_daemon_takes(start: str) -> None:
    flags, _, command = start.partition("-m ")
    module, *words = command.split()
    told = subprocess.run([sys.executable, *flags.split(), "-m", module, "--help"], capture_output=True, text=True,
                          check=True, cwd=DOCS.parent, env={"PYTHONPATH": str(DOCS.parent)}).stdout
    assert all(word in told for word in words if word.startswith("--"))
