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
pytestmark = pytest.mark.timeout(900)  # a slow machine takes its time
LIMIT = 60.0


@pytest.fixture(scope="module")
def bed() -> Iterator[Testbed]:
    with Testbed(keep="never") as bed:
        for vm in bed.boot("front", "back", network=True):
            for name in ("scenarios.py", "liveness.py", "remote_scenarios.py", "side.py"):
                vm.copy_to(SUITE / name, f"/tmp/{name}")
        yield bed


def both_sides(bed: Testbed, **addresses: str) -> None:
    """One pair of processes for each scenario: none may meet the one before, so each begins when both have ended."""
    ends = {end: bed.vms[end].spawn(["python3", "/tmp/side.py", end, address], stdin=True)
            for end, address in addresses.items()}
    lines = {end: process.lines(LIMIT) for end, process in ends.items()}
    for name in SCENARIOS:
        for process in ends.values():
            process.write(f"{name}\n".encode())
        told = {end: next(lines[end], "ended") for end in ends}
        assert set(told.values()) == {f"{name} ok"}, (told, [ends[end].output_so_far()[1].decode() for end in ends])
    for process in ends.values():
        process.close_stdin()
        assert process.wait(LIMIT).exit_code == 0


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
    both_sides(bed, front="ivshmem:link/service", back="ivshmem:link/service")


def test_tcp(bed: Testbed) -> None:
    assert bed.network is not None
    address = bed.network.members[1].address
    both_sides(bed, front=f"tcp-dial:{address}:7100", back=f"tcp-listen:{address}:7100")
