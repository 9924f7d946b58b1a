"""A file from one running VM to another: over a shared region or over TCP, verified at both ends.

Starts one end in each VM through the management agents (`python3 -m guest.transfer`) and follows both, so that the
death of either is known at once and ends the other. Depends on `testbed.vm` and `testbed.errors`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import stat
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from testbed.errors import SpecError, TestbedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from testbed.calls import Process
    from testbed.vm import Vm

    Side = Literal["source", "target"]
    #: which side, phase ("checksum", "transfer", "verify"), bytes done, bytes in all
    Progress = Callable[[Side, str, int, int], None]

#: Seconds a side may stay silent. Longer than the ends' own limit, which gives the better message.
SILENCE = 90.0
#: Seconds that the other side gets to tell its own reason after one side failed.
LAST_WORDS = 3.0


class TransferFailed(TestbedError):
    """The file did not arrive, and nothing stands under its final name. The message has both ends' reasons."""


@dataclass(frozen=True)
class OverRegion:
    """Through shared memory: the name of a region that both VMs are members of."""

    region: str
    path: str = "ivshmem"

    def arguments(self) -> list[str]:
        """For `guest.transfer`."""
        return ["--region", self.region]


@dataclass(frozen=True)
class OverTcp:
    """Through the network: the target's address and a port that is free there."""

    address: str
    port: int = 7000
    path: str = "tcp"

    def arguments(self) -> list[str]:
        """For `guest.transfer`."""
        return ["--tcp", f"{self.address}:{self.port}"]


@dataclass(frozen=True)
class Transferred:
    """A finished transfer.

    Attributes:
        source: name of the sending VM.
        target: name of the receiving VM.
        path: "ivshmem" or "tcp".
        accel: accelerator the VMs ran under.
        name: of the file.
        size: bytes.
        sha256: at both ends.
        seconds: from acceptance to the last byte in the target's file, on the sender's clock; no checksums.
    """

    source: str
    target: str
    path: str
    accel: str
    name: str
    size: int
    sha256: str
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.size / self.seconds if self.seconds else 0.0


def file_size(file: Path) -> int:
    """Bytes of a file of this machine that is to be sent. Raises SpecError if it cannot be."""
    try:
        status = file.stat()
    except OSError as error:
        raise SpecError(f"cannot send {file}: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise SpecError(f"cannot send {file}: it is {'a directory' if file.is_dir() else 'no regular file'}",
                        hint="pack it with tar first" if file.is_dir() else "")
    if not os.access(file, os.R_OK):
        raise SpecError(f"cannot send {file}: this user may not read it")
    return status.st_size


def transfer(source: Vm, path: str, target: Vm, destination: str, over: OverRegion | OverTcp, *,
             progress: Progress | None = None, size: int | None = None, stall: float = 30.0) -> Transferred:
    """Send a file of one running VM to another.

    Args:
        source: VM that has the file.
        path: absolute path in `source`; a regular file, or a block device if `size` is given.
        target: VM that gets it.
        destination: absolute path in `target`: a file, replaced if it exists, or a directory.
        over: which way the bytes go.
        progress: told of every phase at both ends, a few times a second.
        size: bytes to send of a block device.
        stall: seconds without progress after which an end gives up.

    Raises:
        TransferFailed: with the reasons of both ends.
        VmError: one of the VMs died; the message has its console.
    """
    ends: list[_End] = []
    wait = 120.0 + (size or 0) / 5e6  # the receiver waits while the sender computes its checksum
    shared = [*over.arguments(), "--stall", f"{stall:g}"]
    sending = ["send", path, *shared, *(["--size", str(size)] if size is not None else [])]
    receiving = ["receive", destination, *shared, "--wait", f"{wait:g}"]
    events: queue.SimpleQueue[_End] = queue.SimpleQueue()
    try:
        ends.append(_End("target", target, receiving, progress, events))
        if isinstance(over, OverTcp):
            ends[0].wait_listening()
        ends.append(_End("source", source, sending, progress, events))
        first = events.get()
        if first.error is not None:
            _last_words(ends, first)
            raise _failure(ends, first, path)
        second = events.get()
        if second.error is not None:
            raise _failure(ends, second, path)
    finally:
        for end in ends:
            end.stop()
    sent, got = ends[1].outcome, ends[0].outcome
    if sent["sha256"] != got["sha256"]:
        raise TransferFailed(f"checksums differ: {sent['sha256']} at {source.name}, {got['sha256']} at {target.name}")
    return Transferred(source.name, target.name, over.path, source.spec.accel, sent["name"], sent["size"],
                       sent["sha256"], sent["seconds"])


class _End:
    """One end's process, and the thread that reads its JSON lines."""

    def __init__(self, side: Side, vm: Vm, arguments: Sequence[str], progress: Progress | None,
                 events: queue.SimpleQueue[_End]) -> None:
        self.side, self.vm = side, vm
        self.outcome: dict[str, Any] = {}
        self.error: Exception | None = None
        self._progress, self._events = progress, events
        self._listening = threading.Event()
        self.process: Process = vm.spawn(["python3", "-m", "guest.transfer", *arguments])
        self._thread = threading.Thread(target=self._follow, name=f"transfer {side}", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        try:
            for line in self.process.lines(timeout=SILENCE):
                self._take(json.loads(line))
            if not self.outcome and self.error is None:
                result = self.process.wait(timeout=SILENCE)
                said = result.err.strip().splitlines()
                self.error = TransferFailed(
                    f"its process ended with {result.exit_code}{': ' + said[-1] if said else ''}")
        except TimeoutError:
            self.error = TransferFailed(f"it said nothing for {SILENCE:g} s")
        except (TestbedError, ValueError) as error:
            self.error = error
        self._listening.set()
        self._events.put(self)

    def _take(self, line: dict[str, Any]) -> None:
        if "error" in line:
            self.error = TransferFailed(line["error"])
        elif "outcome" in line:
            self.outcome = line["outcome"]
        elif line["phase"] == "listening":
            self._listening.set()
        elif self._progress is not None:
            self._progress(self.side, line["phase"], line["done"], line["size"])

    def wait_listening(self) -> None:
        """Until the receiver accepts connections, or has failed."""
        self._listening.wait(SILENCE)

    def finished(self) -> bool:
        """Whether its process has said its last."""
        return not self._thread.is_alive()

    def join(self, timeout: float) -> None:
        """Wait for that."""
        self._thread.join(timeout)

    def stop(self) -> None:
        """End its process if it still runs. What it had half written has no name and goes with it."""
        if not self.finished():
            if self.vm.alive:
                self.process.kill(signal.SIGKILL)
            self.join(LAST_WORDS)


def _last_words(ends: Sequence[_End], first: _End) -> None:
    """Give the other end a moment: when one end failed, the other was often told why, or is why."""
    if isinstance(first.error, TransferFailed):  # not for a dead VM: that is reason enough
        for end in ends:
            end.join(LAST_WORDS)


def _failure(ends: Sequence[_End], first: _End, path: str) -> Exception:
    """The exception for the caller: a dead VM's own, or one with the reasons of both ends."""
    for end in ends:
        if end.error is not None and not isinstance(end.error, TransferFailed):
            return end.error
    reasons = [f"{end.vm.name}: {end.error}" for end in (first, *ends) if end.error is not None]
    return TransferFailed(f"{path} was not transferred. " + "; ".join(dict.fromkeys(reasons)))
