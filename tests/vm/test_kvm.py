"""What only a machine with a KVM that runs a stock kernel can show; skipped elsewhere with the probe's reason."""

import pytest

from testbed.bed import Testbed
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
        link = bed.link(front, back)
        echo = back.spawn(["python3", "-m", "guest.measure", "echo", "--region", link.name])
        output = front.succeed(["python3", "-m", "guest.measure", "ping", "--region", link.name], timeout=120)
        assert echo.wait(30).exit_code == 0
        assert '"late": 0' in output
