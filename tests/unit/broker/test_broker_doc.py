"""docs/broker.md says what the code does: quotas, refusals, names."""

from __future__ import annotations

import re
from pathlib import Path

import host.broker
from host.broker import checks, service
from host.broker.records import Limits
from idc.remote import controlframes as frames
from idc.remote.resolution import Refusal

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "broker.md").read_text()


def quota(what: str) -> str:
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {what} |")]
    return row.split("|")[2].strip()


def test_quotas() -> None:
    limits = Limits()
    assert quota("requests of a domain at a time").startswith(f"{frames.BROKER_ACCEPTS.requests}, ")
    assert "of which its library keeps 8 for REVOKE" in quota("requests of a domain at a time")
    assert quota("bytes of one copy") == f"{checks.MOST >> 30} GiB"
    assert quota("bytes copied before the next asker has its turn") == f"{limits.piece >> 20} MiB"
    assert quota("copying before links are looked at again") == f"{service.SLICE * 1000:g} ms"
    assert quota("RESOLVE at an owner at a time") == str(frames.DOMAIN_ACCEPTS.requests)
    assert quota("time for an owner to answer") == f"{limits.patience:g} s"
    assert quota("references refused by their owners, of one asker") == (
        f"{limits.refusals:g} at once, {limits.refusals:g} more each second")
    assert quota("leases of one owner that are kept") == str(limits.leases)


def test_refusals_are_those_of_remote_buffers() -> None:
    table = PAGE.partition("## Refusals")[2].partition("##")[0]
    named = set(re.findall(r"`([A-Z_]{3,})`", table))
    assert named <= set(Refusal.__members__)
    used = set()
    for path in Path(host.broker.__file__).parent.glob("*.py"):
        used |= set(re.findall(r"Refusal\.([A-Z_]+)", path.read_text()))
    assert used <= named


def test_the_frames_fit_the_control_region() -> None:
    both = frames.DOMAIN_ACCEPTS.requests + frames.DOMAIN_ACCEPTS.messages + frames.BROKER_ACCEPTS.requests
    assert both + frames.BROKER_ACCEPTS.messages + 2 <= host.broker.RING_BYTES // host.broker.SLOT_BYTES
    assert frames.DOMAIN_ACCEPTS.body_bytes + 8 + 8 <= host.broker.SLOT_BYTES
