"""Which run is meant: a number, `latest`, `latest~2`; and runs in a line each. Depends on `testbed.bench.store`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from testbed.errors import SpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.bench.rows import Result
    from testbed.bench.store import Store, Summary

LATEST = "latest"


def find(store: Store, text: str) -> int:
    """Number of the run that `text` means. Raises SpecError that says which there are."""
    runs = store.runs()
    if not runs:
        raise SpecError(f"{store.path} holds no runs", hint="testbed bench --quick makes a first one")
    if re.fullmatch(r"\d{1,18}", text):
        if int(text) in runs:
            return int(text)
        raise SpecError(f"there is no run {text}", hint=f"`testbed results list` shows them; the last is {runs[-1]}")
    if found := re.fullmatch(rf"{LATEST}(?:~(\d{{0,9}}))?", text):
        back = 0 if "~" not in text else int(found[1] or 1)
        if back < len(runs):
            return runs[-1 - back]
        raise SpecError(f"{text} is before the first run: there {'is' if len(runs) == 1 else 'are'} {len(runs)}",
                        hint="`testbed results list` shows them")
    raise SpecError(f"{text!r} is no run", hint=f"a number of `testbed results list`, {LATEST}, or {LATEST}~1 for "
                    "the one before it")


def kind(result: Result) -> str:
    """How much was measured."""
    if result.session:
        return f"{result.version}, in turns"
    return "quick" if result.quick else "full"


def commit(result: Result) -> str:
    """Short name of the commit; + if the tree had changes."""
    return (str(result.host.get("commit") or "")[:10] or "unknown") + ("+" if result.host.get("dirty") else "")


def when(result: Result) -> str:
    """To the minute, UTC."""
    return result.started[:16].replace("T", " ")


def list_lines(summaries: Sequence[Summary]) -> list[list[str]]:
    """A line for each run."""
    return [[str(each.run), when(each.result), commit(each.result), each.result.accel, kind(each.result),
             " ".join(each.names), " ".join(each.domains), str(each.rows), f"{each.result.seconds:.0f}"]
            for each in summaries]
