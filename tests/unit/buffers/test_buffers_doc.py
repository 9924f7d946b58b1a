"""Keeps docs/buffers.md honest: its example runs, its tables are compared with what the registry does."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from buffer_support import bench

from idc.errors import HiddenError

TEXT = (Path(__file__).parents[3] / "docs" / "buffers.md").read_text()
NAMES = {"process memory": "process", "region pages": "region", "hidden pages": "hidden", "file range": "file",
         "copy-on-write pages": "cow"}


def test_the_example_prints_what_is_told() -> None:
    example = TEXT.partition("<!-- example -->\n```python\n")[2].partition("```")[0]
    (told,) = re.findall(r"^It prints `(.*)`\.$", TEXT, re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "docs/buffers.md", "exec"), {})
    assert printed.getvalue() == told + "\n"


def _table(title: str) -> list[list[str]]:
    section = TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [rows[0], *rows[2:]]


def test_every_type_is_told() -> None:
    assert [row[0] for row in _table("Types")[1:]] == list(NAMES)


def test_copies_are_as_many_as_told() -> None:
    head, *rows = _table("Copies")
    assert [row[0] for row in rows] == head[1:] == list(NAMES)
    for source, *cells in rows:
        for target, told in zip(head[1:], cells, strict=True):
            with bench() as b:
                pair = b.make(NAMES[source], b"x" * 4096, 0), b.make(NAMES[target], bytes(4096), 0)
                if told == "-":
                    with pytest.raises(HiddenError):
                        b.registry.copy(*pair)
                else:
                    assert b.registry.copy(*pair) == int(told) * 4096, (source, target)
