"""python side.py front|back ADDRESS SCENARIO...: one side of scenarios, in a process or VM of its own."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from remote_scenarios import REMOTE_SCENARIOS
from scenarios import SCENARIOS


def main() -> None:
    side, address, *names = sys.argv[1:]
    for name in names:
        getattr((SCENARIOS | REMOTE_SCENARIOS)[name], side)(address)
        sys.stdout.write(f"{name} ok\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
