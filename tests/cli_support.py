"""What tests of the `testbed` command share: running it in a place of its own, finding what it may have left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
#: Of one command, also where programs start slowly in emulated guests.
LIMIT = 600


class Cli:
    """The command, with a runtime directory of its own."""

    def __init__(self, runtime: str) -> None:
        self.words = [sys.executable, "-P", "-m", "testbed.cli"]
        self.env = {**os.environ, "XDG_RUNTIME_DIR": runtime, "PYTHONPATH": str(ROOT)}

    def __call__(self, *words: str, code: int = 0) -> str:
        """What it printed; of a command that must fail, what it said of that."""
        run = subprocess.run([*self.words, *words], env=self.env, text=True, capture_output=True, timeout=LIMIT,
                             check=False, stdin=subprocess.DEVNULL)
        assert run.returncode == code, run
        return run.stdout if code == 0 else run.stderr


@contextlib.contextmanager
def running(topology: str) -> Iterator[Cli]:
    """A testbed that was made by `testbed up`, and is alone in its runtime directory."""
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as runtime:  # pytest's is too long for sockets
        cli, file = Cli(runtime), Path(runtime, "topology.toml")
        file.write_text(topology)
        try:
            cli("up", str(file))
            yield cli
        finally:
            cli("down", "--all")


def processes_with(setting: str) -> list[str]:
    """Command lines of the processes that have `NAME=value` in their environment: all that a command started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if setting.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name} {(process / 'cmdline').read_bytes().decode(errors='replace')}")
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found
