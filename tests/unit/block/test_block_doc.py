"""docs/block.md against the code."""

import re
from pathlib import Path

from idc.block import overlay, protocol
from idc.block.device import Block
from idc.block.protocol import Op
from idc.device.options import fill

TEXT = (Path(__file__).resolve().parents[3] / "docs/block.md").read_text()


def test_the_options_are_those_of_the_class() -> None:
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", TEXT[:TEXT.index("## Data flow")], re.MULTILINE)
    assert [name for name, _ in rows] == list(Block.options)
    for name, default in rows:
        shown = {"no": "False", "none": ""}.get(default.strip(), default.strip())
        assert str(Block.options[name].default).removesuffix(".0") == shown


def test_the_requests_are_those_of_the_code() -> None:
    ops = re.search(r"op: (.*?) \|", TEXT)
    assert ops is not None
    assert ops[1] == ", ".join(f"{op.value} {op.name}" for op in Op)
    for layout in (protocol.REQUEST, protocol.GEOMETRY):
        assert layout.size in (32, 48)
    assert overlay.MAGIC.decode() in TEXT
    assert f"{overlay.CLUSTER >> 10} KiB" in TEXT


def test_the_modules_are_there() -> None:
    for path in re.findall(r"`(idc/block/[a-z.]+)`", TEXT):
        assert (Path(__file__).resolve().parents[3] / path).is_file(), path


def test_regions_stay_small() -> None:
    for connections, most in ((1, 32), (2, 64), (4, 128)):
        channels, size = Block.plan("front", "back", fill(Block.options, {"connections": connections}, "block"))
        assert len(channels) == connections + 1
        assert size <= most << 20
