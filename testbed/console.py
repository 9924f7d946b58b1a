"""The serial console: all of it into a log from the first byte, read by pexpect, and watched for the kernel's
last words.

Depends on pexpect. Nothing is ever run over the console.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import pexpect
import pexpect.fdpexpect

from testbed.errors import CONSOLE_LINES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

Severity = Literal["panic", "oops", "warning"]

# In this order: the first that fits a line names it.
_PATTERNS: tuple[tuple[Severity, re.Pattern[str]], ...] = (
    ("panic", re.compile(r"Kernel panic - not syncing: .*")),
    # Lockups and stalls are the machine's load as often as the guest's fault, above all under TCG.
    ("warning", re.compile(r"BUG: soft lockup.*|rcu: INFO: .*stall.*|INFO: task .* blocked for more.*")),
    ("warning", re.compile(r"Out of memory: Killed process.*|(erofs|EXT4-fs).* error.*")),
    ("oops", re.compile(r"(Oops: [0-9a-f]{4}|BUG: |kernel BUG at |general protection fault, ).*")),
)
# What a serial terminal would obey: firmware and shells send it, readers of a log do not want it.
_ESCAPES = re.compile(r"\x1b(\[[0-9;?=]*[A-Za-z]|[()][A-Z0-9]|c)|[\x00-\x08\x0b-\x1f]")
_TEXT_LIMIT = 1 << 20
_TRACE_END = re.compile(r"---\[ end ")
_TRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Finding:
    """A line of the console that means trouble: how bad, what it says, and when (time.monotonic)."""

    severity: Severity
    text: str
    at: float


class _Tee:
    """What pexpect calls a log file: writes to the log, and keeps the newest text for `wait_for_text`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self.changed = threading.Condition()
        self.text = ""
        self.dropped = 0  # characters of `text` that were cut off at its front
        self.first_byte: float | None = None
        self.sinks: list[Callable[[bytes], None]] = []

    def write(self, data: bytes) -> int:
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self._file.write(data)
        for sink in tuple(self.sinks):
            sink(data)
        with self.changed:
            self.text += _ESCAPES.sub("", data.decode("utf-8", "replace"))
            if len(self.text) > 2 * _TEXT_LIMIT:
                cut = len(self.text) - _TEXT_LIMIT
                self.text, self.dropped = self.text[cut:], self.dropped + cut
            self.changed.notify_all()
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the file has no buffer."""

    def close(self) -> None:
        self._file.close()


class Console:
    """Reads `sock` in a thread of its own until its end.

    `on_finding` is called in that thread for each panic and oops, for an oops once its trace is over, so that
    the tail shows it. `log` is the file with all bytes as they came.
    """

    def __init__(self, sock: socket.socket, log: Path, on_finding: Callable[[Finding], None]) -> None:
        self.log = log
        self.findings: list[Finding] = []
        self._sock = sock
        self._tee = _Tee(log)
        self._lines: deque[str] = deque(maxlen=CONSOLE_LINES)
        self._on_finding = on_finding
        self._pending: Finding | None = None
        self._ended = False
        # Not pexpect's spawn for sockets: that one writes no log. poll, because select ends at descriptor 1023.
        self._spawn = pexpect.fdpexpect.fdspawn(sock.fileno(), encoding=None, timeout=None, use_poll=True)
        self._spawn.logfile_read = self._tee
        self._thread = threading.Thread(target=self._watch, name=f"console {log.stem}", daemon=True)
        self._thread.start()

    @property
    def first_byte(self) -> float | None:
        """When the first byte came (time.monotonic), None before."""
        return self._tee.first_byte

    def tail(self) -> tuple[str, ...]:
        """The last lines, CONSOLE_LINES at most, with terminal sequences taken out."""
        with self._tee.changed:
            rest = self._tee.text.rpartition("\n")[2].strip()
        lines = list(self._lines)
        return tuple([*lines, rest][-CONSOLE_LINES:] if rest else lines)

    def warnings(self) -> list[str]:
        """Lines that are no failure by themselves, but may explain one: lockups, stalls, out of memory."""
        return [finding.text for finding in self.findings if finding.severity == "warning"]

    def position(self) -> int:
        """Where the console is now, in characters from its start."""
        with self._tee.changed:
            return self._tee.dropped + len(self._tee.text)

    def search(self, pattern: str, start: int = 0) -> re.Match[str] | None:
        """Look for a regular expression in what came after `start` (the newest megabyte of it)."""
        with self._tee.changed:
            return re.compile(pattern, re.MULTILINE).search(self._tee.text, max(0, start - self._tee.dropped))

    def wait_changed(self, seen: int, seconds: float) -> bool:
        """Wait for more text than `seen` characters, or the console's end. False after `seconds`."""
        with self._tee.changed:
            return self._tee.changed.wait_for(
                lambda: self._ended or self._tee.dropped + len(self._tee.text) > seen, seconds
            )

    def wait_end(self, seconds: float) -> bool:
        """Wait until QEMU has closed its end and all that it wrote is read: last words come last."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def send(self, data: bytes) -> None:
        """Type on it. For people only: nothing is ever run over the console. Raises OSError when QEMU is gone."""
        self._sock.sendall(data)

    @contextlib.contextmanager
    def shown(self, sink: Callable[[bytes], None]) -> Iterator[None]:
        """Give every byte to `sink` too, which must not block: QEMU, and so the guest, waits for it."""
        self._tee.sinks.append(sink)
        try:
            yield
        finally:
            self._tee.sinks.remove(sink)

    def close(self) -> None:
        """Stop reading. The log stays."""
        with contextlib.suppress(OSError):  # QEMU's end may be gone already
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._sock.close()
        self._tee.close()

    def _watch(self) -> None:
        # Line by line, so that pexpect's own buffer stays small.
        wanted = self._spawn.compile_pattern_list([rb"[^\n]{4096}|[^\n]*\n", pexpect.EOF, pexpect.TIMEOUT])
        try:
            while True:
                timeout = None
                if self._pending is not None:
                    timeout = max(0.01, self._pending.at + _TRACE_SECONDS - time.monotonic())
                found = self._spawn.expect_list(wanted, timeout=timeout)
                if found == 0:
                    self._line(cast("bytes", self._spawn.after))
                elif found == 1:
                    break
                else:
                    self._report()
        except ConnectionResetError:
            pass  # the end, when QEMU is killed with bytes of ours unread
        self._report()
        with self._tee.changed:
            self._ended = True
            self._tee.changed.notify_all()

    def _line(self, raw: bytes) -> None:
        line = _ESCAPES.sub("", raw.decode("utf-8", "replace")).rstrip()
        if line:
            self._lines.append(line)
        for severity, pattern in _PATTERNS:
            match = pattern.search(line)
            if match:
                self._found(Finding(severity, match.group(), time.monotonic()))
                break
        if self._pending is not None and _TRACE_END.search(line):
            self._report()

    def _found(self, finding: Finding) -> None:
        self.findings.append(finding)
        if finding.severity == "panic":
            self._pending = None
            self._on_finding(finding)
        elif finding.severity == "oops" and self._pending is None:
            self._pending = finding

    def _report(self) -> None:
        finding, self._pending = self._pending, None
        if finding is not None:
            self._on_finding(finding)
