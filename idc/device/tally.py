"""Counters of a driver, left in a file where a person, or a program, finds them.

Depends on the standard library.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

#: Seconds between two looks at the counters.
EVERY: Final = 0.5

log = logging.getLogger("idc.device")


class Tally:
    """A file of JSON, brought up to date when something has changed, whole at any time.

    Args:
        path: of it; its directory is made.
        counters: what goes into it.
    """

    def __init__(self, path: Path, counters: Callable[[], Mapping[str, object]]) -> None:
        self._path = path
        self._counters = counters
        self._text = b""
        self._due = 0.0
        self._why = ""  # it could not be written, when it was last to be

    def look(self) -> None:
        """Bring it up to date, if that is due. Where it cannot be written a device goes on, and its log says so."""
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + EVERY
        text = json.dumps(self._counters()).encode()
        if text != self._text:
            self._text = text
            try:
                self._write(text)
                self._why = ""
            except OSError as error:
                if str(error) != self._why:
                    self._why = str(error)
                    log.warning("counters cannot be left in %s: %s", self._path, error)

    def _write(self, text: bytes) -> None:
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        staged = self._path.with_suffix(".new")
        staged.write_bytes(text)
        staged.replace(self._path)

    def remove(self) -> None:
        """The driver goes."""
        for path in (self._path, self._path.with_suffix(".new")):  # the latter of a write that failed
            with contextlib.suppress(OSError):
                path.unlink()
