"""What only a machine with a KVM that runs a stock kernel can show; skipped elsewhere with the probe's reason."""

import pytest

from testbed.bed import Testbed
from testbed.bench.groups import QUICK, Group, measure
from testbed.bench.places import vm_pair
from testbed.bench.subjects import round_trip
from testbed.transfer import OverRegion, transfer

pytestmark = pytest.mark.needs_kvm


def test_a_transfer_under_kvm() -> None:
    with Testbed(accel="kvm", keep="never") as bed:
        assert bed.verdict.accel == "kvm"
        front, back = bed.boot("front", "back")
        front.succeed("head -c 5000001 /dev/urandom > /tmp/data")
        done = transfer(front, "/tmp/data", back, "/tmp/copy", OverRegion(bed.link(front, back).name))
        assert (done.accel, done.size) == ("kvm", 5_000_001)
        assert done.sha256 == back.succeed("sha256sum /tmp/copy").split()[0]
        assert "kvm" in front.succeed("dmesg | grep -i 'hypervisor detected'").lower()


def test_doorbells_are_not_lost_under_kvm() -> None:
    with Testbed(accel="kvm", keep="never") as bed:
        front, back = bed.boot("front", "back")
        with vm_pair(bed, front, back) as pair:
            (found,) = measure(Group("doorbells", pair, [round_trip(pair, "doorbell", "core", 64)]), QUICK)
        assert found.row.samples > 100
        assert found.row.late == 0
