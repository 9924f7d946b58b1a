"""Round trips measured in real VMs with tiny counts: that every row is there, not how fast it is."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from testbed.bench.facts import of_testbed
from testbed.bench.groups import Found, Pace, measure
from testbed.bench.names import idc, rtt, stream
from testbed.bench.places import Machines, machines
from testbed.bench.rows import Result, parse
from testbed.progress import Steps
from testbed.qemu_args import DEFAULT_QEMU

if TYPE_CHECKING:
    from testbed.bed import Testbed

TINY = Pace(rounds=1, seconds=0.01, scout_seconds=0.001, kept=1, quick=True)


@pytest.fixture(scope="module")
def made() -> Iterator[Machines]:
    with machines({"vm-vm", "host-vm"}, Steps(quiet=True), accel="auto", qemu=DEFAULT_QEMU) as found:
        yield found


def test_facts_name_what_a_figure_depends_on(made: Machines) -> None:
    facts = of_testbed(made.bed)
    assert {"qemu", "guest_kernel", "mapping", "network", "netdev", "mtu"} <= facts.keys()
    assert facts["mapping"].startswith("VFIO, BAR 2, ")
    assert "unknown" not in facts["mapping"]


def test_round_trips_of_every_kind(made: Machines) -> None:
    found: list[Found] = []
    for place in made.places:
        for group in rtt.groups(place, TINY):
            found += measure(group, TINY)
    result = Result(made.bed.verdict.accel, {}, tuple(each.row for each in found))
    assert parse(result.as_json(), "here") == result
    for domains in ("vm-vm", "host-vm"):
        polled, rung = (result.find("rtt", "ivshmem", domains, mode, "core", 64) for mode in ("poll", "doorbell"))
        assert polled is not None
        assert rung is not None
        assert polled.figure < rung.figure
        assert result.find("rtt-open", "ivshmem", domains, "adaptive", "core", 64) is not None
    assert result.find("rtt-busy", "ivshmem", "vm-vm", "adaptive", "core", 64) is not None
    for api in ("core", "python"):
        assert result.find("rtt", "tcp", "vm-vm", None, api, 4096) is not None
    assert sum(row.late for row in result.results) == 0


def test_a_stream_beside_its_limit_and_peers(made: Machines) -> None:
    place = made.places[0]
    (group,) = [group for group in stream.groups(place, TINY) if "65536" in group.title]
    rows = {(each.row.path, each.row.mode, each.row.api): each.row for each in measure(group, TINY)}
    assert {("ivshmem", "poll", "core"), ("ivshmem", "poll", "python"), ("limit", "pipeline", "core"),
            ("limit", "copy", "core"), ("tcp", None, "core"), ("tcp", None, "python")} <= rows.keys()
    assert {"plain socket", "iperf3", "iperf3 --zerocopy"} == rows["tcp", None, "core"].variants.keys()
    routines = place.pair.near.facts["routines"]
    assert {name.partition(",")[0] for name in rows["limit", "pipeline", "core"].variants} == set(routines)


def test_transactions_and_bulk_of_every_kind(made: Machines) -> None:
    for place in made.places:
        found: list[Found] = []
        for group in idc.groups(place, TINY):
            found += measure(group, TINY)
        rows = {(row.name, row.path, row.mode, row.api, row.size, row.outstanding, row.strategy, row.touched)
                for row in (each.row for each in found)}
        for api in ("core", "python"):
            assert {("transact", "ivshmem", mode, api, 64, depth, None, None)
                    for mode in ("poll", "doorbell", "adaptive") for depth in (1, 64)} <= rows
        assert {("bulk", "ivshmem", "poll", "python", 1 << 20, 2, strategy, touched)
                for strategy in ("copy", "map", "handover") for touched in (False, True)} <= rows
        if place.tcp:
            assert {("face", path, None, "python", 1 << 20, None, None, None) for path in ("idc-tcp", "tcp")} <= rows
        assert sum(each.row.late for each in found) == 0


def test_the_burners_end_with_the_group(made: Machines) -> None:
    bed: Testbed = made.bed
    with made.places[0].busy():
        bed.vms["back"].wait_until_succeeds("pgrep -f '[w]hile :; do :; done'")
    bed.vms["back"].wait_until_succeeds("! pgrep -f '[w]hile :; do :; done'")
