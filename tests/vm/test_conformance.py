"""The conformance suite between two VMs: over ivshmem, and over TCP on virtio-net with no shared memory. The scenarios
are the very files that run in one process and between processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from host.region import RegionSpec
from idc.layout import ChannelSpec, Kind, Rights
from testbed.bed import Testbed

SUITE = Path(__file__).parent.parent / "conformance"
SCENARIOS = ("many", "ordered", "messages", "cycle", "mistakes", "reuse", "stream", "mirror", "gather",
             "pairs", "stack",
             "bytes", "strategies", "revoke", "cut", "forward", "faces", "both-lend")
pytestmark = pytest.mark.timeout(900)  # each scenario starts two interpreters in emulated guests
LIMIT = 60.0


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        for vm in bed.boot("front", "back", network=True):
            for name in ("scenarios.py", "liveness.py", "remote_scenarios.py", "side.py"):
                vm.copy_to(SUITE / name, f"/tmp/{name}")
        yield bed


def both_sides(bed: Testbed, front: str, back: str) -> None:
    """One pair of processes for each scenario: none may meet the one before."""
    for name in SCENARIOS:
        there = bed.vms["back"].spawn(f"python3 /tmp/side.py back {back} {name}")
        assert bed.vms["front"].succeed(f"python3 /tmp/side.py front {front} {name}", timeout=LIMIT) == f"{name} ok\n"
        done = there.wait(LIMIT)
        assert done.exit_code == 0, done.err


def test_nothing_is_left_out() -> None:
    names = []
    for file in ("scenarios.py", "remote_scenarios.py"):
        listed = (SUITE / file).read_text().partition("SCENARIOS = {")[2].partition("}")[0]
        names += [line.split('"')[1] for line in listed.splitlines() if '"' in line]
    assert names == list(SCENARIOS)


def test_ivshmem(bed: Testbed) -> None:
    names = ("service", "service-1", "service-2", "service-3")  # a scenario counts them from its address
    channels = [ChannelSpec(name, Kind.MESSAGE, "front", "back", 64 * 512, 512) for name in names]
    bed.region(RegionSpec("link", 1 << 20, {"front": Rights.RW, "back": Rights.RW}, channels))
    both_sides(bed, "ivshmem:link/service", "ivshmem:link/service")


def test_tcp(bed: Testbed) -> None:
    assert bed.network is not None
    address = bed.network.members[1].address
    both_sides(bed, f"tcp-dial:{address}:7100", f"tcp-listen:{address}:7100")
