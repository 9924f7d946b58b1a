"""Keeps docs/remote-buffers.md and the frames of docs/idc.md honest: the example runs, tables are compared."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from pathlib import Path
from uuid import UUID

from idc.endpoint.frames import Kind
from idc.remote import Refusal, Route, wire
from idc.remote.reference import REFERENCE_BYTES, Access, Reference, mint

DOCS = Path(__file__).parents[3] / "docs"
TEXT = (DOCS / "remote-buffers.md").read_text()


def tables(text: str, title: str) -> list[list[list[str]]]:
    """The tables of a section: rows of cells, the first is the head."""
    section = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found: list[list[list[str]]] = []
    inside = False
    for line in section.splitlines():
        if line[:1] == "|":
            if not inside:
                found.append([])
            if set(line) - set("|- "):
                found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line[:1] == "|"
    return found


def test_the_example_prints_what_is_told() -> None:
    example = TEXT.partition("<!-- example -->\n```python\n")[2].partition("```")[0]
    (told,) = re.findall(r"^It prints `(.*)`\.$", TEXT, re.MULTILINE)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "docs/remote-buffers.md", "exec"), {})
    assert printed.getvalue() == told + "\n"


def test_every_refusal_is_told() -> None:
    (table,) = tables(TEXT, "Results")
    assert [(int(code), name) for code, name, _ in table[1:]] == [(one.value, one.name) for one in Refusal]


def test_every_route_is_told_in_the_order_of_preference() -> None:
    assert [row[0] for row in tables(TEXT, "Routes")[0][1:]] == [route.value for route in Route]


def test_every_kind_of_frame_is_told() -> None:
    told = [(int(row[0]), row[1]) for row in tables(TEXT, "Frames")[0][1:]]
    plain = [(int(row[0]), row[1]) for row in tables((DOCS / "idc.md").read_text(), "Frames")[1][1:]]
    assert plain[-1] == (7, "RESOLVE to ANSWER, 7 to 13")
    assert plain[:-1] + told == [(kind.value, kind.name) for kind in Kind]


def test_the_bytes_of_a_reference_are_where_they_are_told() -> None:
    (table,) = tables(TEXT, "References")
    ends = [0] + [int(row[0]) + int(row[1]) for row in table[1:]]
    assert ends[:-1] == [int(row[0]) for row in table[1:]]
    assert ends[-1] == REFERENCE_BYTES
    owner = bytes(range(16))
    data = mint(Reference(UUID(bytes=owner), 1, 2, 3, Access.WRITE, 4, 5, 6), b"secret")
    fields = {row[2].partition(":")[0]: data[int(row[0]):int(row[0]) + int(row[1])] for row in table[1:]}
    assert fields.pop("`IDR1`") == b"IDR1"
    assert fields.pop("owner") == owner
    fields.pop("code")
    numbers = {name: int.from_bytes(value, "little") for name, value in fields.items()}
    assert numbers == {"access": 2, "0": 0, "offset in its page of the first byte": 6, "incarnation of the owner": 1,
                       "slot": 2, "generation of the slot": 3, "offset within the registration": 4, "length": 5}


def _size(body: str) -> int:
    """Bytes of the fixed fields that a text lists."""
    sizes = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
    fields = re.findall(r"\b(u8|u16|u32|u64)\b|(\d+) bytes", body)
    return sum(sizes[kind] if kind else int(count) for kind, count in fields)


def test_bodies_are_as_long_as_told() -> None:
    (request,) = re.findall(r"A \*request\* is a reference \((.*?); both are 0", TEXT, re.DOTALL)
    assert _size(request.replace("u64 offset and u64 length", "u64 u64")) == wire.REQUEST_BYTES
    bodies = [(row[0], _size(row[1])) for row in tables(TEXT, "Frames")[1][1:]]
    lease = wire._RESOLVED.size + wire._LEASE.size
    assert bodies == [("RESOLVE", lease), ("RESOLVE", wire._RESOLVED.size + 16), ("PULL", wire.MOVED_BYTES),
                      ("PUSH", wire.MOVED_BYTES), ("RELEASE, REVOKE, FILLED", 0)]
    assert len(wire.lease_id(1)) == struct.calcsize("<Q")


def test_no_module_is_told_that_is_not_there() -> None:
    told = set(re.findall(r"`(\w+\.py)`", "".join(row[0] for row in tables(TEXT, "Data flow")[0])))
    there = {path.name for path in (DOCS.parent / "idc" / "remote").glob("*.py")}
    assert told <= there
