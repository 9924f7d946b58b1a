"""What tests of the `testbed` command share: finding what it may have left behind."""

from __future__ import annotations

from pathlib import Path


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
