"""The drivers of a domain as a process: in a VM, and for a host process that is a domain.

    python3 -m guest.drivers [--registry ADDRESS] [--sockets DIRECTORY] [--path DIRECTORY]...

Runs in the foreground and logs to standard error. There are two processes: one keeps the other, which has the drivers,
and starts it again when it dies. SIGTERM unloads the drivers, closing all ends in order; SIGHUP loads them anew, their
code too. The address of the registry is by default that of IDC_REGISTRY; a --path is where Python looks for device
classes besides. Depends on idc.device and idc.registry.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from idc.device import driver
from idc.device.drivers import NAP, Drivers
from idc.errors import IdcError, MisuseError
from idc.registry import VARIABLE, Registry
from idc.registry.services import address
from idc.transport.address import open_port

if TYPE_CHECKING:
    from types import FrameType

#: Pause before the drivers are started again that ended by themselves, seconds: doubles from the first to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.02, 2.0
#: Drivers that ran this long, seconds, are started again after the first pause.
GOOD_AFTER: Final = 2.0
#: Seconds for the first word of the registry, before another try.
GREETING: Final = 10.0

log = logging.getLogger("guest.drivers")


class _Signals:
    """Signals as bytes of a pipe, which a poll sees."""

    def __init__(self, *numbers: int) -> None:
        self.read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._write = write
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, self._caught)

    @staticmethod
    def _caught(_number: int, _frame: FrameType | None) -> None:
        """The byte in the pipe says it."""

    def take(self) -> set[int]:
        """Those that came since the last look."""
        with contextlib.suppress(BlockingIOError):
            return set(os.read(self.read, 64))
        return set()

    def close(self) -> None:
        """Signals do what they do by default again."""
        signal.set_wakeup_fd(-1)
        os.close(self.read)
        os.close(self._write)


def run(registry_address: str, sockets: Path, lifeline: int) -> None:
    """The drivers, until SIGTERM or the end of the lifeline. Raises OSError, IdcError."""
    signals = _Signals(signal.SIGTERM)
    registry = Registry(open_port(registry_address), timeout=GREETING)
    try:
        drivers = Drivers(registry, lambda place: address(place, registry_address), sockets)
        log.info("domain %s: process %d has its drivers", registry.domain, os.getpid())
        registry.timeout = 2.0
        poller = select.poll()
        poller.register(lifeline, 0)
        while signal.SIGTERM not in signals.take() and not poller.poll(0):
            if not drivers.work():
                drivers.wait(NAP, signals.read, lifeline)
        drivers.unload()
    finally:
        registry.close()


def keep(registry_address: str, sockets: Path) -> int:
    """Run the drivers in a process of their own, and again when it dies. Returns the exit code, or replaces itself."""
    signals = _Signals(signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGCHLD)
    pause = FIRST_PAUSE
    while True:
        began = time.monotonic()
        child, lifeline = _fork(registry_address, sockets, signals)
        asked: set[int] = set()
        status = None
        while status is None:
            select.select([signals.read], [], [])
            came = signals.take() - {signal.SIGCHLD}
            if came and not asked:
                os.kill(child, signal.SIGTERM)
            asked |= came
            pid, code = os.waitpid(child, os.WNOHANG)
            status = code if pid else None
        os.close(lifeline)
        if asked - {signal.SIGHUP}:
            return 0
        if asked:
            log.info("loading the drivers anew")
            os.execv(sys.executable, [sys.executable, "-m", "guest.drivers", *sys.argv[1:]])
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == os.EX_USAGE:
            return os.EX_USAGE
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL  # by others: no fault of theirs
        good = killed or time.monotonic() - began >= GOOD_AFTER
        pause = FIRST_PAUSE if good else min(2 * pause, LONGEST_PAUSE)
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        log.warning("the drivers ended by %s; again in %g s", how, pause)
        ready, _, _ = select.select([signals.read], [], [], pause)
        if ready and signals.take() - {signal.SIGCHLD, signal.SIGHUP}:
            return 0


def _fork(registry_address: str, sockets: Path, signals: _Signals) -> tuple[int, int]:
    """(process, lifeline): all modules are loaded already, so it is there at once."""
    there, lifeline = os.pipe()
    child = os.fork()
    if child:
        os.close(there)
        os.set_inheritable(lifeline, False)
        return child, lifeline
    code = os.EX_SOFTWARE
    try:
        os.close(lifeline)
        signals.close()
        gc.freeze()  # what was loaded stays: to look through it in a collection takes an emulated guest tens of ms
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        run(registry_address, sockets, there)
        code = 0
    except MisuseError as error:
        log.error("%s", error)
        code = os.EX_USAGE
    except (OSError, IdcError) as error:
        log.error("%s", error)
    except Exception:
        log.exception("the drivers failed")
    finally:
        os._exit(code)


def main() -> int:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(prog="guest.drivers", description="the drivers of this domain")
    parser.add_argument("--registry", default=os.environ.get(VARIABLE, ""), metavar="ADDRESS",
                        help=f"of this domain's link to the registry; by default ${VARIABLE}")
    parser.add_argument("--sockets", type=Path, default=driver.SOCKETS, metavar="DIRECTORY",
                        help="where programs of this domain find front ends")
    parser.add_argument("--path", action="append", default=[], metavar="DIRECTORY", help="more device classes")
    args = parser.parse_args()
    if not args.registry:
        parser.error(f"no address of a registry: give --registry, or set {VARIABLE}")
    sys.path[:0] = args.path
    logging.basicConfig(level=logging.INFO, format="drivers: %(message)s", stream=sys.stderr)
    return keep(args.registry, args.sockets)


if __name__ == "__main__":
    sys.exit(main())
