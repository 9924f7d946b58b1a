"""python side.py front|back ADDRESS [SCENARIO...]: one side of scenarios, in a process or VM of its own.

Without scenarios it reads their names from standard input, a line each, and runs each in a process of its own: forked,
because in an emulated guest another interpreter takes longer than a scenario. It answers "NAME ok", or
"NAME failed: ..." after what that process wrote to standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from remote_scenarios import REMOTE_SCENARIOS
from scenarios import SCENARIOS

if TYPE_CHECKING:
    from collections.abc import Iterable


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def forked(side: str, address: str, names: Iterable[str]) -> None:
    """This process has imported the scenarios and does nothing else, so its children have met nobody before."""
    for name in names:
        child = os.fork()
        if not child:
            getattr((SCENARIOS | REMOTE_SCENARIOS)[name], side)(address)
            return  # and ends as an interpreter does, with all that may go wrong then
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        say(f"{name} ok" if code == 0 else f"{name} failed: exit code {code}")


def main() -> None:
    side, address, *names = sys.argv[1:]
    if not names:
        forked(side, address, (line.strip() for line in iter(sys.stdin.readline, "")))
        return
    for name in names:
        getattr((SCENARIOS | REMOTE_SCENARIOS)[name], side)(address)
        say(f"{name} ok")


if __name__ == "__main__":
    main()
