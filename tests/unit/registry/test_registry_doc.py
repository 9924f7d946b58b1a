"""docs/registry.md says what the code does: limits, quotas, errors."""

from __future__ import annotations

import re
from pathlib import Path

import host.registry
from host.registry import service, store
from host.registry.tree import Limits
from idc.registry import client, frames

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "registry.md").read_text()


def most(what: str) -> int:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {what} |")]
    return int(row.split("|")[2])


def test_limits_and_quotas() -> None:
    limits = Limits()
    assert most("bytes of a path") == frames.PATH_BYTES
    assert most("bytes of a component") == frames.NAME_BYTES
    assert most("components of a path") == frames.DEPTH
    assert most("bytes of a value") == frames.VALUE_BYTES
    assert most("domains that a node's permissions name") == frames.MOST_NAMED
    assert most("nodes that it wrote last") == limits.nodes
    assert most("bytes of their names and values") == limits.bytes
    assert most("watches") == limits.watches
    assert most("open transactions") == limits.transactions
    assert most("operations of one transaction") == limits.steps
    assert most("requests under way") == frames.REGISTRY_ACCEPTS.requests
    assert most("events under way") == frames.DOMAIN_ACCEPTS.messages
    assert f"longer than {limits.history} changes of others" in PAGE
    assert f"within {service.GRACE:g} s" in PAGE
    assert f"grown by {store.GROWTH >> 20} MiB" in PAGE
    assert client.VARIABLE in PAGE


def test_errors() -> None:
    rows = dict(re.findall(r"^\| (\d) ([A-Z_]+) \|", PAGE, re.MULTILINE))
    assert rows == {str(int(fault)): fault.name for fault in frames.Fault}


def test_the_frames_fit_the_control_region() -> None:
    both = frames.REGISTRY_ACCEPTS.requests + frames.DOMAIN_ACCEPTS.messages
    assert both + 2 <= host.registry.RING_BYTES // host.registry.SLOT_BYTES
    for accepts in (frames.REGISTRY_ACCEPTS, frames.DOMAIN_ACCEPTS):
        assert accepts.body_bytes + 8 + 8 <= host.registry.SLOT_BYTES
    assert frames.REGISTRY_ACCEPTS.parameter_bytes >= 16 + frames.PATH_BYTES + frames.VALUE_BYTES
    assert frames.DOMAIN_ACCEPTS.parameter_bytes >= 8 + frames.PATH_BYTES
    named = 2 + frames.NAME_BYTES
    assert named * (frames.MOST_NAMED + 1) <= frames.VALUE_BYTES
