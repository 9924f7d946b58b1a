"""A VM that is well: boots, runs commands, moves files, takes devices, powers off."""

import hashlib
import os
from pathlib import Path

import pytest

from testbed.calls import AgentInfo
from testbed.errors import CommandFailed, FileFailed, QmpFailed, SpecError, TimedOut, VmStopped
from testbed.run import Run
from testbed.vm import Vm, boot_all

from .conftest import SpecMaker

BOOT_LIMIT = 60.0
"""Seconds; an idle machine needs less than ten, but a test must not demand that of a loaded one."""


def test_ready_tells_kernel_python_and_uptime(vm: Vm) -> None:
    info = vm.info
    assert isinstance(info, AgentInfo)
    assert info.host == "shared"
    assert info.kernel == vm.succeed("uname -r").strip()
    assert vm.boot_times is not None
    assert 0 < vm.boot_times.guest <= vm.boot_times.ready < BOOT_LIMIT


def test_commands(vm: Vm) -> None:
    assert vm.succeed("echo one", ["echo", "two"]) == "one\ntwo\n"
    result = vm.execute("echo out; echo err >&2; exit 3")
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    vm.fail("false")
    with pytest.raises(CommandFailed, match="boo") as caught:
        vm.succeed("echo boo >&2; exit 4")
    assert (caught.value.exit_code, caught.value.stderr) == (4, b"boo\n")
    with pytest.raises(CommandFailed, match="should have failed"):
        vm.fail("true")
    with pytest.raises(TimedOut):
        vm.execute("sleep 100", timeout=1)
    vm.fail("pgrep -x sleep")
    assert vm.wait_until_succeeds("echo x >> /tmp/tries; test $(wc -l < /tmp/tries) = 3 && echo ok") == "ok\n"


def test_files_go_in_and_out_unchanged(vm: Vm, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(5_000_001))
    source.chmod(0o640)
    vm.copy_to(source, "/tmp/there")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert vm.succeed("sha256sum /tmp/there").split()[0] == digest
    assert vm.succeed("stat -c %a /tmp/there") == "640\n"
    assert vm.copy_from("/tmp/there", tmp_path / "back") == 5_000_001
    assert (tmp_path / "back").read_bytes() == source.read_bytes()


def test_a_full_disk_leaves_nothing_half_made(vm: Vm, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(3 << 20))
    vm.succeed("mkdir -p /tmp/small && mount -t tmpfs -o size=1m none /tmp/small")
    with pytest.raises(FileFailed, match="No space left") as caught:
        vm.copy_to(source, "/tmp/small/file")
    assert caught.value.errno == 28
    assert vm.succeed("ls -A /tmp/small") == ""
    assert vm.execute("echo still here").out == "still here\n"


def test_text_on_the_console_is_awaited(vm: Vm) -> None:
    mark = vm.console.position()
    vm.succeed("(sleep 0.5; echo here I am > /dev/console) > /dev/null 2>&1 &")
    assert vm.wait_for_console_text("here I .m", 30, since=mark) == "here I am"
    assert "here I am" in vm.log.read_text()
    with pytest.raises(TimedOut, match="nothing like"):
        vm.wait_for_console_text("never said", 0.2)


def test_devices_are_plugged_into_free_ports_and_leave_them_again(vm: Vm) -> None:
    taken = [vm.plug({"driver": "virtio-rng-pci", "id": f"extra{n}"}) for n in range(vm.spec.region_ports)]
    assert len(set(taken)) == vm.spec.region_ports
    with pytest.raises(SpecError, match="all 4 region ports are taken"):
        vm.plug({"driver": "virtio-rng-pci", "id": "toomany"})
    # On a PCI Express port the device is a modern one (0x1044); the one on the root bus is not (0x1005).
    # A device that the guest has not seen yet cannot be given back by it.
    vm.wait_until_succeeds(f"test $(cat /sys/bus/pci/devices/*/device | grep -c 0x1044) -eq {len(taken)}")
    for n in range(vm.spec.region_ports):
        vm.unplug(f"extra{n}", timeout=60)
    vm.plug({"driver": "virtio-rng-pci", "id": "again"})
    vm.wait_until_succeeds("test $(cat /sys/bus/pci/devices/*/device | grep -c 0x1044) -eq 1")
    vm.unplug("again", timeout=60)


def test_what_qemu_refuses_says_why_and_costs_no_port(vm: Vm) -> None:
    for _ in range(vm.spec.region_ports + 1):
        with pytest.raises(QmpFailed, match="no-such-device") as caught:
            vm.plug({"driver": "no-such-device", "id": "x"})
        assert caught.value.error_class == "GenericError"


def test_a_paused_vm_is_not_called_hung(vm: Vm) -> None:
    vm.pause()
    with pytest.raises(TimedOut):
        vm.execute("true", timeout=1)
    vm.resume()
    assert vm.execute("true", timeout=60).exit_code == 0


def test_an_agent_that_is_killed_comes_back(vm: Vm) -> None:
    before = vm.info.pid
    vm.spawn(["kill", "-9", str(before)])
    assert vm.agent.wait_ready(0) is not None
    vm.wait_for_console_text("agent", 30)
    assert vm.wait_until_succeeds("echo back", timeout=60) == "back\n"
    assert vm.info.pid != before


def test_power_off_ends_qemu_and_waiters_are_told(spec: SpecMaker, run: Run) -> None:
    one, two = boot_all([spec("one"), spec("two")], run)
    with one, two:
        assert one.pid != two.pid
        process = one.spawn(["sleep", "1000"])
        one.shutdown()
        assert not one.alive
        with pytest.raises(VmStopped, match="shut down"):
            process.wait(10)
        two.crash()
        with pytest.raises(VmStopped, match="killed"):
            two.execute("true")
    assert run.processes() == []
