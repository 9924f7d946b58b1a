"""Runs as files that other programs read. Pure.

JSON is that of `testbed bench --json`, one object, with its number as `run`; several runs are a list. CSV has a line
for each row of each run, so that every line names the accelerator it was measured under.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from typing import TYPE_CHECKING, Final

from testbed.bench.rows import Row

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.bench.rows import Result

_RUN: Final = ("run", "started", "accel", "quick", "commit", "dirty", "version")
_ROW: Final = tuple(field.name for field in dataclasses.fields(Row))


def as_json(runs: Sequence[tuple[int, Result]]) -> str:
    """One object, or a list of several."""
    found = [{"run": number} | json.loads(result.as_json()) for number, result in runs]
    return json.dumps(found[0] if len(found) == 1 else found, indent=1)


def as_csv(runs: Sequence[tuple[int, Result]]) -> str:
    """RFC 4180 with one heading. What was not measured is empty; several values are one field of JSON."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow((*_RUN, *_ROW))
    for number, result in runs:
        host = result.host
        own = (number, result.started, result.accel, int(result.quick), host.get("commit", ""),
               int(bool(host.get("dirty"))), result.version)
        for row in result.results:
            writer.writerow((*own, *(_field(getattr(row, name)) for name in _ROW)))
    return text.getvalue()


def _field(value: object) -> object:
    if value is None:
        return ""
    if isinstance(value, bool):
        return int(value)
    return json.dumps(value) if isinstance(value, (dict, tuple)) else value
