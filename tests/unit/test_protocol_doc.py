"""Keeps docs/protocol.md honest: its tables against idc.layout, the C core, and the models."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import UUID

import pytest
from model.spin import mutants

from idc import layout
from idc._core import ffi, lib
from idc.channel import SideState
from idc.endpoint import frames
from idc.layout import ChannelSpec, Kind, Rights
from idc.registry import frames as registry_frames
from idc.remote import controlframes, wire
from idc.remote.reference import MAGIC, Access, Reference, mint

DOCUMENT = Path(__file__).parents[2] / "docs" / "protocol.md"
Row = dict[str, str]


def _tables() -> dict[str, list[Row]]:
    """Every table, by the text that stands right above it up to its first colon, bracket or full stop."""
    found: dict[str, list[Row]] = {}
    above, title, head = "", "", list[str]()
    outside_code = re.sub(r"^```.*?^```$", "", DOCUMENT.read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in outside_code.splitlines():
        if not line.startswith("|"):
            head = []
            above = line.strip() or above
            continue
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if not head:
            head, title = cells, re.split(r"[:(.]", above.lstrip("# 0123456789."))[0].strip()
            assert title not in found, f"two tables are called {title!r}"
            found[title] = []
        elif set(line) - set("|- "):
            assert len(cells) == len(head), line
            found[title].append(dict(zip(head, cells, strict=True)))
    return found


TABLES = _tables()


def _table_with(column: str) -> list[Row]:
    return next(rows for rows in TABLES.values() if column in rows[0])


def _offsets(title: str, column: str) -> dict[str, int]:
    return {row[column]: int(row["offset"]) for row in TABLES[title]}


def _number(raw: bytes, row: Row, base: int = 0) -> int:
    at = base + int(row["offset"])
    return int.from_bytes(raw[at : at + int(row["size"])], "little")


HEADER = layout.RegionHeader(
    name="a-region", size=1 << 24, vectors=77,
    members=(layout.Member(0, "alpha", Rights.RW, 0x11223344, present=True), layout.Member(1, "beta", Rights.RW, 5),
             layout.Member(2, "gamma", Rights.RO)),
    channels=(layout.ChannelEntry("first", Kind.BYTE, 0, 1, 9, 4096, 8192, 0),
              layout.ChannelEntry("second", Kind.MESSAGE, 1, 0, 21, 1 << 16, 1 << 12, 256)),
    parts=(layout.Part(1, 1 << 20, 1 << 14),),
    uuid=UUID("00112233-4455-6677-8899-aabbccddeeff"), session=0x0102030405060708,
    protocol_min=1, protocol_max=3, error_code=42, error_by=1, error_text="gone",
)  # fmt: skip


@pytest.mark.parametrize(
    ("title", "base", "expected"),
    [
        ("Fixed for ever, in every layout version", 0, {
            "magic": int.from_bytes(layout.MAGIC, "little"), "layout version": layout.LAYOUT_VERSION,
            "header bytes": layout.HEADER_BYTES, "uuid": int.from_bytes(HEADER.uuid.bytes, "little"),
            "region name": b"a-region", "region size": HEADER.size, "protocol min": 1, "protocol max": 3,
            "session": HEADER.session, "error code": 42, "error by": 1, "error text": b"gone"}),
        ("Member entry", layout.MEMBERS_AT, {
            "live word": layout.member_word(0x11223344, present=True), "id": 0, "rights": Rights.RW, "name": b"alpha"}),
        ("Member entry", layout.MEMBERS_AT + 2 * layout.MEMBER_BYTES, {
            "live word": 0, "id": 2, "rights": Rights.RO, "name": b"gamma"}),
        ("Channel entry", 1536 + 64, {
            "name": b"second", "kind": Kind.MESSAGE, "member a": 1, "member b": 0, "first vector": 21,
            "offset": 1 << 16, "ring bytes": 1 << 12, "slot size": 256}),
        ("Part entry", 3072, {"owner": 1, "offset": 1 << 20, "length": 1 << 14}),
    ],
    ids=["stable", "member 0", "member 2", "channel 1", "part 0"],
)  # fmt: skip
def test_header_page_is_packed_as_documented(title: str, base: int, expected: dict[str, int | bytes]) -> None:
    page = layout.pack_header(HEADER)
    rows = {row["field"]: row for row in TABLES[title]}
    assert rows.keys() == expected.keys()
    for name, value in expected.items():
        number = int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
        assert _number(page, rows[name], base) == number, name


def test_header_tables_are_where_documented() -> None:
    page = layout.pack_header(HEADER)
    rows = {row["field"]: row for row in TABLES["Tables of layout version 1"]}
    assert [_number(page, rows[name]) for name in ("members", "channels", "parts", "vectors")] == [3, 2, 1, 77]
    assert int(rows["member table"]["offset"]) == layout.MEMBERS_AT
    for name, limit in (("member", layout.MAX_MEMBERS), ("channel", layout.MAX_CHANNELS), ("part", layout.MAX_PARTS)):
        row = rows[f"{name} table"]
        entries = re.fullmatch(r"(\d+) entries of (\d+) bytes", row["meaning"])
        assert entries is not None
        assert int(entries[1]) == limit
        assert int(row["size"]) == limit * int(entries[2])
    assert rows["vectors"]["meaning"].endswith(f"1 to {layout.MAX_VECTORS}")


def test_what_is_documented_covers_the_page() -> None:
    """Bytes that no table names are 0."""
    page = bytearray(layout.pack_header(HEADER))
    entries = {"Member entry": (layout.MEMBERS_AT, 64, 3), "Channel entry": (1536, 64, 2), "Part entry": (3072, 32, 1)}
    spans = [(0, row) for row in TABLES["Fixed for ever, in every layout version"]]
    spans += [(0, row) for row in TABLES["Tables of layout version 1"] if int(row["size"]) == 4]
    spans += [(at + n * size, row) for title, (at, size, count) in entries.items() for n in range(count)
              for row in TABLES[title]]  # fmt: skip
    for base, row in spans:
        at = base + int(row["offset"])
        page[at : at + int(row["size"])] = bytes(int(row["size"]))
    assert not any(page)


def test_channel_block_in_layout() -> None:
    assert _offsets("Channel block", "area") == {
        "side A": layout.SIDE_A, "side B": layout.SIDE_B,
        "ring A to B": layout.RING_AB, "ring B to A": layout.RING_BA,
        "ring records": layout.RECORD_AB, "side records": layout.RECORD_A,
    }  # fmt: skip
    assert _offsets("Side words", "word") == {
        "epoch": layout.SIDE_EPOCH, "ack": layout.SIDE_ACK, "state": layout.SIDE_STATE,
        "reason": layout.SIDE_REASON, "heartbeat": layout.SIDE_HEARTBEAT,
    }  # fmt: skip
    entry = HEADER.channels[0]
    assert (entry.data_ab, entry.data_ba) == (4096 + 4096, 4096 + 4096 + 8192)
    state = next(row["meaning"] for row in TABLES["Side words"] if row["word"] == "state")
    assert state == ", ".join(f"{member.value} {member.name.lower()}" for member in SideState)


def test_records_for_observers() -> None:
    places = {row["ring"] + row["writer"].partition(",")[2]: int(row["offset"])
              for row in TABLES["Record of a ring's end"]}
    more = layout.RING_RECORD_BYTES
    assert places == {"A to B producer": layout.RECORD_AB, "A to B consumer": layout.RECORD_AB + more,
                      "B to A producer": layout.RECORD_BA, "B to A consumer": layout.RECORD_BA + more}
    counts = _offsets("Words of such a record, each of 8 bytes", "count")
    assert counts == {name: 8 * n for n, name in enumerate(layout.RING_RECORD)}
    fields = [(name, kind) for name, kind in ffi.typeof("struct idc_counters").fields]
    assert {name: kind.offset for name, kind in fields} == counts
    side = TABLES["Record of a side, at 1536 for A and 1792 for B"]
    assert (layout.RECORD_A, layout.RECORD_B) == (1536, 1792)
    trips = {name: (kind.offset, ffi.sizeof(kind.type)) for name, kind in ffi.typeof("struct idc_trips").fields}
    del trips["observed"]
    assert {row["what"]: (int(row["offset"]), int(row["size"])) for row in side} == trips
    assert list(trips) == [*layout.SIDE_RECORD, "buckets"]


def _packed(title: str, data: bytes) -> dict[str, int]:
    """The fields of a packed structure, by its table; the table covers all of its bytes."""
    rows = TABLES[title]
    ends = [int(row["offset"]) + int(row["size"]) for row in rows]
    assert [int(row["offset"]) for row in rows] == [0, *ends[:-1]], "no gaps"
    assert ends[-1] == len(data)
    return {row["field"]: _number(data, row) for row in rows}


def test_frames_of_endpoints() -> None:
    head = _packed("Head of each frame", frames.encode(frames.Kind.REPLY, 0x00010002, error=7))
    assert head == {"kind": 5, "flags": 0, "error": 7, "tag": 0x00010002}
    kinds = {int(row["kind"]): row["name"] for row in TABLES["Kinds of frames"]}
    assert kinds == {int(kind): kind.name for kind in frames.Kind}
    answered = {row["name"] for row in TABLES["Kinds of frames"] if row["answered by"].startswith("ANSWER")}
    assert answered == {kind.name for kind in frames.ASKS}
    quotas = frames.Quotas(1, 2, 3, 4, 5, 256)
    hello = _packed("HELLO, what this side accepts", frames.hello(quotas)[frames.HEADER_BYTES:])
    assert hello == {"version": frames.VERSION, "requests": 1, "messages": 2, "parameter_bytes": 3, "status_bytes": 4,
                     "asks": 5, "ask_bytes": 256}


def test_frames_about_buffers() -> None:
    made = mint(Reference(UUID(int=5), 6, 7, 8, Access.READ, 9, 10, 11), bytes(32))
    fields = _packed("Reference, 72 bytes, in any message and in what follows", made)
    assert fields["magic"].to_bytes(4, "little") == MAGIC
    assert {name: fields[name] for name in ("access", "zero", "offset in page", "incarnation", "slot", "generation",
                                            "offset", "length")} == {
        "access": 1, "zero": 0, "offset in page": 11, "incarnation": 6, "slot": 7, "generation": 8, "offset": 9,
        "length": 10}
    asked = _packed("Reference request, 96 bytes", wire.request(made, Access.WRITE, 3, 4, 5))
    assert [asked[name] for name in ("access", "hops", "zero", "more zero", "offset", "length")] == [2, 3, 0, 0, 4, 5]
    control = _table_with("first byte")
    assert {int(row["first byte"]): row["name"] for row in control} == {int(op): op.name for op in controlframes.Op}


def test_frames_of_the_registry() -> None:
    request = registry_frames.Request(registry_frames.Op.WRITE, "/a", 3, 4, b"", ephemeral=True).pack()
    head = _packed(next(title for title, rows in TABLES.items() if rows[0].get("field") == "operation"), request[:16])
    assert head == {"operation": 3, "flags": 1, "path bytes": 2, "transaction": 3, "number": 4, "zero": 0}
    operations = {int(row["operation"]): row["name"] for row in TABLES["Operations of the registry"]}
    assert operations == {int(op): op.name for op in registry_frames.Op}


def test_ring_words_in_layout() -> None:
    assert _offsets("Ring control", "word") == {
        "tail": layout.RING_TAIL, "space_event": layout.RING_SPACE_EVENT,
        "head": layout.RING_HEAD, "data_event": layout.RING_DATA_EVENT,
    }  # fmt: skip


@pytest.mark.parametrize("kind", [lib.IDC_MESSAGES, lib.IDC_BYTES])
def test_ring_words_in_the_core(kind: int) -> None:
    memory = ffi.new("uint8_t[]", 64 + 256 + 4096)
    start = int(ffi.cast("uintptr_t", memory))
    control = (start + 63) & ~63
    for role, own, other in ((lib.IDC_PRODUCER, ("tail", "space_event"), ("head", "data_event")),
                             (lib.IDC_CONSUMER, ("head", "data_event"), ("tail", "space_event"))):  # fmt: skip
        ring = ffi.new("struct idc_ring *")
        assert lib.idc_ring_open(
            ring, ffi.cast("void *", control), ffi.cast("void *", control + 256), kind, role, 4, 64
        ) == lib.IDC_OK
        words = (ring.mine, ring.my_event, ring.theirs, ring.their_event)
        places = [int(ffi.cast("uintptr_t", word)) - control for word in words]
        table = _offsets("Ring control", "word")
        assert places == [table[name] for name in (*own, *other)]


def test_slot_in_the_core() -> None:
    memory = ffi.new("uint8_t[]", 64 + 256 + 256)
    control = (int(ffi.cast("uintptr_t", memory)) + 63) & ~63
    ring = ffi.new("struct idc_ring *")
    area, data = ffi.cast("void *", control), ffi.cast("uint8_t *", control + 256)
    assert lib.idc_ring_open(ring, area, data, lib.IDC_MESSAGES, lib.IDC_PRODUCER, 4, 64) == lib.IDC_OK
    lib.idc_ring_reset(ring)
    assert lib.idc_msg_send(ring, b"one", 3, 0, 0) == 3
    assert lib.idc_msg_send(ring, b"twice", 5, 0, 0) == 5
    raw = bytes(ffi.buffer(data, 256))
    rows = {row["part"]: row for row in _table_with("part")}
    assert (_number(raw, rows["seq"], 64), _number(raw, rows["len"], 64)) == (2, 5)
    assert raw[64 + int(rows["payload"]["offset"]) :][:5] == b"twice"


def test_reasons_in_the_core() -> None:
    rows = _table_with("value")
    documented = {row["name"]: int(row["value"]) for row in rows}
    assert documented == {"SEQ": lib.IDC_REASON_SEQ, "LEN": lib.IDC_REASON_LEN,
                          "TAIL": lib.IDC_REASON_TAIL, "HEAD": lib.IDC_REASON_HEAD}  # fmt: skip


def test_kinds_and_rights() -> None:
    kind = next(row["meaning"] for row in TABLES["Channel entry"] if row["field"] == "kind")
    rights = next(row["meaning"] for row in TABLES["Member entry"] if row["field"] == "rights")
    assert kind == f"{Kind.MESSAGE.value} messages, {Kind.BYTE.value} bytes"
    assert rights == f"{Rights.RO.value} ro, {Rights.RW.value} rw"


def test_orderings_are_those_of_the_models() -> None:
    documented = _table_with("what it orders")
    models = [mutant for file in ("message_ring", "byte_ring", "handshake") for mutant in mutants(file)]
    named = {m.name for m in models if m.kind != "steps" and not m.name.endswith("_ACQ_REL")}
    assert [row["name"] for row in documented] == list(dict.fromkeys(row["name"] for row in documented))
    assert {row["name"] for row in documented} == named
    never_found = {name for name in named if all(m.redundant for m in models if m.name == name)}
    assert {row["name"] for row in documented if row["without it"].startswith("covered")} == never_found


def test_limits_of_rings() -> None:
    text = DOCUMENT.read_text()
    assert f"multiple of {layout.MIN_SLOT}" in text
    assert f"at least {layout.MIN_BYTE_RING}" in text
    plan = layout.RegionHeader.plan(
        "r", 1 << 20, {"a": Rights.RW, "b": Rights.RW}, [ChannelSpec("c", Kind.BYTE, "a", "b", 4096)]
    )
    assert (plan.channels[0].data_vector, plan.channels[0].space_vector) == (1, 2)
