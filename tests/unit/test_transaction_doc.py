"""docs/transaction.md shows what was recorded, the record is what the code makes, and the figure is drawn from it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from idc import layout
from idc.endpoint import frames
from idc.endpoint.frames import Kind

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "transaction.md").read_text()
SEEN: dict[str, Any] = json.loads((DOCS / "figures/transaction.json").read_text())


def shown(name: str) -> set[str]:
    """What the page says at its marks of that name."""
    return set(re.findall(rf"<!-- {name} -->(.*?)<!-- end -->", PAGE))


def block(name: str) -> bytes:
    (text,) = re.findall(rf"<!-- {name} -->\n```\n(.*?)\n```", PAGE, re.DOTALL)
    return bytes.fromhex(text)


@pytest.mark.parametrize(("name", "kind", "body"), [
    ("request", Kind.REQUEST, b"hello"), ("reply", Kind.REPLY, b"HELLO")])
def test_the_bytes_are_those_recorded_and_what_the_code_makes(name: str, kind: Kind, body: bytes) -> None:
    seen = SEEN[name]
    data = bytes.fromhex(seen["bytes"])
    assert block(name) == data
    seq, length = int.from_bytes(data[:4], "little"), int.from_bytes(data[4:8], "little")
    assert (seq, length) == (seen["index"] + 1, len(data) - layout.SLOT_HEADER_BYTES)
    tag = frames.parse(data[8:])[2]
    assert data[8:] == frames.encode(kind, tag, body)
    assert shown("request tag") == {f"{tag:#x}"}, "the reply has the request's tag"


def test_places_and_words_are_those_recorded() -> None:
    channel, index = SEEN["channel"], SEEN["request"]["index"]
    entry = layout.ChannelEntry("service", layout.Kind.MESSAGE, 0, 1, 1, channel["offset"],
                                channel["slots"] * channel["slot_size"], channel["slot_size"])
    assert shown("index") == {str(index)} == {str(SEEN["reply"]["index"])}
    assert shown("slot") == {str(index % entry.slots)}
    for name, data in (("request", entry.data_ab), ("reply", entry.data_ba)):
        at = data + index % entry.slots * entry.slot_size
        assert SEEN[name]["offset"] == at
        assert shown(f"{name} at") == {f"{at:#x}"}
        for word in ("tail", "head"):
            assert shown(f"{name} {word}") == {str(SEEN[name]["ring"][word])}
    assert shown("request seq") == {str(index + 1)}
    assert bytes.fromhex(SEEN["region"])[:8] == layout.MAGIC


def test_the_order_of_what_happened() -> None:
    ns, bells = SEEN["ns"], SEEN["doorbells_ns"]
    assert 0 == ns["submit"] < ns["handle"] + SEEN["bound_ns"]
    assert ns["handle"] < ns["answer"] < ns["complete"] + SEEN["bound_ns"]
    assert ns["submit"] < ns["complete"]
    assert set(bells) <= {"request rung", "reply rung"}
    assert "request rung" in bells


def test_the_figure_is_drawn_from_the_record() -> None:
    spec = importlib.util.spec_from_file_location("figure", DOCS / "figures/transaction.py")
    assert spec is not None
    assert spec.loader is not None
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    assert figure.draw(SEEN) == (DOCS / "figures/transaction.svg").read_text(), "run docs/figures/transaction.py --draw"
    assert SEEN["command"] in PAGE
