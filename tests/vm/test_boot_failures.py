"""VMs that are not well: each way has its exception, with the console's end, the log and a hint."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from testbed import keeper
from testbed.errors import BootFailed, GuestHung, GuestOops, GuestPanicked, QemuFailed, SpecError
from testbed.run import Run
from testbed.vm import Vm, boot_all

from .conftest import SpecMaker

ROOT = Path(__file__).resolve().parents[2]


def test_arguments_that_qemu_refuses(spec: SpecMaker, run: Run) -> None:
    with pytest.raises(QemuFailed, match="no-such-device") as caught:
        Vm.boot(spec("bad", extra=("-device", "no-such-device")), run)
    assert caught.value.exit_code == 1
    assert "no-such-device" in caught.value.stderr
    assert run.processes() == []


def test_a_qemu_that_is_not_there(spec: SpecMaker, run: Run) -> None:
    with pytest.raises(SpecError, match="no-such-qemu"):
        Vm.boot(spec("bad", qemu="no-such-qemu"), run)


def test_a_kernel_that_is_none(spec: SpecMaker, run: Run, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(os.urandom(100_000))
    with pytest.raises(SpecError, match="neither a bzImage nor a vmlinux"):
        Vm.boot(replace(spec("bad"), kernel=tmp_path / "kernel"), run, timeout=15)
    assert run.processes() == []


def test_a_root_file_system_that_is_none(spec: SpecMaker, run: Run, tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(os.urandom(1 << 20))
    with pytest.raises(BootFailed) as caught:
        Vm.boot(spec("bad", rootfs=tmp_path / "root"), run)
    assert caught.value.console, "the console's end is missing"
    assert caught.value.hint
    assert "bad.console.log" in str(caught.value)


def test_a_boot_that_takes_too_long(spec: SpecMaker, run: Run) -> None:
    with pytest.raises(BootFailed, match=r"no READY from its agent in 1 s \(QEMU: running\)"):
        Vm.boot(spec("slow"), run, timeout=1)
    assert run.processes() == []


def test_a_panic(spec: SpecMaker, run: Run) -> None:
    with Vm.boot(spec("doomed"), run) as vm:
        process = vm.spawn(["sleep", "1000"])
        vm.spawn("echo 0 > /proc/sys/kernel/panic_on_oops; echo c > /proc/sysrq-trigger")
        with pytest.raises((GuestPanicked, GuestOops)) as caught:
            process.wait(60)
        assert "sysrq triggered crash" in str(caught.value)
        assert len(caught.value.console) > 5
        assert vm.log.read_text()


def test_an_oops_and_its_pardon(spec: SpecMaker, run: Run) -> None:
    # KASLR or not, a module parameter that is a null pointer is no API; the test device of the kernel is LKDTM, which
    # Debian leaves out. So the console is told what an oops would say.
    with Vm.boot(spec("oops"), run) as vm:
        vm.succeed("echo 'BUG: kernel NULL pointer dereference, address: 0000000000000000' > /dev/kmsg")
        vm.succeed("echo '<1>BUG: kernel NULL pointer dereference, address: 0000000000000000' > /dev/console")
        with pytest.raises(GuestOops, match="NULL pointer"):
            vm.execute("sleep 1000", timeout=60)
        with pytest.raises(GuestOops):
            vm.execute("true")
        vm.clear_oops()
        assert vm.execute("true").exit_code == 0


def test_a_hang(spec: SpecMaker, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.agent.PING_AFTER", 0.5)
    with Vm.boot(spec("hung"), run) as vm:
        vm.agent.hang_limit = 3.0
        vm.qmp("stop")  # not vm.pause(): nobody is to know
        with pytest.raises(GuestHung, match=r"said nothing .*QEMU: paused"):
            vm.execute("true", timeout=60)
        vm.qmp("cont")
        os.kill(vm.pid, signal.SIGSTOP)
        with pytest.raises(GuestHung, match="does not answer either"):
            vm.execute("true", timeout=60)


def test_qemu_that_dies_fails_every_waiter_at_once(spec: SpecMaker, run: Run) -> None:
    with Vm.boot(spec("shot"), run) as vm:
        process = vm.spawn(["sleep", "1000"])
        os.kill(vm.pid, signal.SIGSEGV)
        began = time.monotonic()
        with pytest.raises(QemuFailed, match="SIGSEGV"):
            process.wait(60)
        assert time.monotonic() - began < 30
        with pytest.raises(QemuFailed):
            vm.qmp("query-status")
        with pytest.raises(QemuFailed):
            vm.wait_for_console_text("never", 60)


OWNER = """
import sys, time
from pathlib import Path
from images import ensure
from testbed.qemu_args import VmSpec
from testbed.run import Run
from testbed.vm import Vm, boot_all
with Run(base=Path(sys.argv[1])) as run:
    with Vm.boot(VmSpec.from_image("orphan", ensure()), run) as vm:
        print(run.id, flush=True)
        vm.execute("sleep 1000")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_its_owner(tmp_path: Path, number: int) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "runs")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert owner.stdout is not None
    run_id = owner.stdout.readline().strip()
    owner.stdout.close()
    assert keeper.find(run_id)
    os.killpg(owner.pid, number)
    owner.wait(60)
    deadline = time.monotonic() + 20
    while keeper.find(run_id) or (tmp_path / "runs" / run_id).exists():
        assert time.monotonic() < deadline, keeper.find(run_id)
        time.sleep(0.05)


def test_a_start_cut_short_leaves_nothing(spec: SpecMaker, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C can come anywhere, also between the start of QEMU and whoever watches for its end."""

    def interrupted(_pid: int) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.pidfd_open", interrupted)
    vm = Vm(spec("short"), run)
    with pytest.raises(KeyboardInterrupt):
        vm.start()
    assert run.processes() == []
    vm.close()
    with pytest.raises(KeyboardInterrupt):
        boot_all([spec("one"), spec("two")], run)
    assert run.processes() == []
