"""The benchmark of docs/writing-benchmarks.md is one: measured between two processes, beside its limit."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.bench import names, places
from testbed.bench.groups import QUICK, measure

if TYPE_CHECKING:
    import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs/writing-benchmarks.md"


def test_the_example_is_found_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, mark, rest = PAGE.read_text().partition("<!-- runs as a test -->\n```python\n")
    assert mark
    (tmp_path / "mine.py").write_text(rest.partition("```")[0])
    monkeypatch.setattr(names, "__path__", [*names.__path__, str(tmp_path)])
    try:
        bench = names.load()["mine"]
    finally:
        sys.modules.pop(f"{names.__name__}.mine", None)
        importlib.invalidate_caches()
    assert not bench.default
    assert bench.groups is not None
    with places.processes() as place:
        (group,) = bench.groups(place, QUICK)
        found = [each.row for each in measure(group, QUICK)]
    assert [(row.path, row.api, row.size) for row in found] == [
        ("limit", "core", 64), ("ivshmem", "core", 64), ("ivshmem", "python", 64)]
    for row in found:
        assert row.p50 is not None
        assert 0 < row.p50 <= (row.p99 or 0)
