"""Gives a process a share of the time it would have had: stopped and let go in turn, by a helper process.

    with starve(vm.pid, 0.25, seed=7) as starved: ...
    starved.share                                     # what it came to

A process of its own does it, so that a test that computes, or dies, does not leave the VM stopped: when this end of the
helper's pipe closes, however that comes about, it lets the process go and ends. The file is also that helper's program
(`python3 -I -S starve.py PIDFD SHARE PERIOD SEED`), so it depends on the standard library alone until it is imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PERIOD = 0.05
"""Seconds of one turn of running and standing still, on average. Far below what counts as a hang anywhere."""
_END_SECONDS = 10.0


@dataclass
class Starved:
    """What was done; complete when the block is left. `elapsed` and `stopped` in seconds; `turns` counts stops."""

    elapsed: float = 0.0
    stopped: float = 0.0
    turns: int = 0

    @property
    def share(self) -> float:
        """The part of the time in which the process could run."""
        return 1.0 - self.stopped / self.elapsed if self.elapsed else 1.0


@contextlib.contextmanager
def starve(pid: int, share: float, *, period: float = PERIOD, seed: int = 0) -> Iterator[Starved]:
    """Let the process run for `share` (above 0, below 1) of the time while the block runs.

    Each turn takes between half and one and a half `period` seconds, drawn from `seed`. Raises SpecError for a share or
    period that makes no sense, TestbedError when the helper was killed meanwhile, ProcessLookupError if there is no
    such process. It may end meanwhile.
    """
    from testbed.errors import SpecError, TestbedError

    if not 0.0 < share < 1.0 or not 0.001 <= period <= 5.0:
        raise SpecError(f"cannot starve process {pid} to a share of {share} in periods of {period} s",
                        hint="share: above 0 and below 1; period: 0.001 to 5 seconds; to stop a VM, pause it")
    starved = Starved()
    pidfd = os.pidfd_open(pid)
    try:
        command = [sys.executable, "-I", "-S", __file__, str(pidfd), str(share), str(period), str(seed)]
        helper = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(pidfd,),
                                  start_new_session=True)
        try:
            yield starved
        finally:
            try:
                told, _ = helper.communicate(timeout=_END_SECONDS)  # closes its pipe first
            finally:
                helper.kill()
                helper.wait()
                with contextlib.suppress(ProcessLookupError):  # the helper may have been killed at the wrong moment
                    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        if helper.returncode != 0:
            raise TestbedError(f"process {pid} was not starved to the end: the helper (process {helper.pid}) ended "
                               f"with exit code {helper.returncode}", hint="was it killed?")
        for name, value in json.loads(told).items():
            setattr(starved, name, value)
    finally:
        os.close(pidfd)


def turns(share: float, period: float, seed: int) -> Iterator[tuple[float, float]]:
    """(seconds running, seconds stopped) of one turn after the other. Endless."""
    dice = random.Random(seed)
    while True:
        length = period * dice.uniform(0.5, 1.5)
        yield length * share, length * (1 - share)


def main() -> None:
    """Take turns until standard input ends or the process does; then say what was done, as JSON."""
    pidfd, share, period, seed = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    done = Starved()
    began = time.monotonic()

    def wait(seconds: float) -> bool:
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        return not ready

    with contextlib.suppress(ProcessLookupError):
        try:
            for running, standing in turns(share, period, seed):
                if not wait(running):
                    break
                signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
                stopped = time.monotonic()
                more = wait(standing)
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
                done.stopped += time.monotonic() - stopped
                done.turns += 1
                if not more:
                    break
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    done.elapsed = time.monotonic() - began
    sys.stdout.write(json.dumps(vars(done)))


if __name__ == "__main__":
    main()
