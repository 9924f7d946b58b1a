"""The accelerator's verdict, with a scripted QEMU and devices of our choice."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from testbed import accel
from testbed.errors import AccelUnavailable, SpecError

Choose = Callable[..., accel.Verdict]


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "vmlinuz"
    path.write_bytes(b"kernel")
    return path


@pytest.fixture
def choose(tmp_path: Path, kernel: Path, monkeypatch: pytest.MonkeyPatch) -> Choose:
    """`choose` with a QEMU that runs a shell script, and a /dev/kvm that passes all that needs no boot."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(accel, "_device_refusal", lambda _: "")
    qemu = tmp_path / "qemu"

    def run(script: str, wish: accel.Wish = "auto", limit: float = 10.0) -> accel.Verdict:
        text = f"#!/bin/sh\necho x >> {tmp_path}/started\n{script}\n"
        if not qemu.exists() or qemu.read_text() != text:
            qemu.write_text(text)
            qemu.chmod(0o755)
        return accel.choose(wish, kernel, qemu=str(qemu), cache=tmp_path / "cache", limit=limit)

    return run


SPEAKS = "echo; echo 'idc-probe: user space runs'; sleep 1000"


def test_a_guest_that_speaks_proves_kvm(choose: Choose) -> None:
    verdict = choose(SPEAKS)
    assert verdict.accel == "kvm"
    assert "user space" in verdict.reason
    assert set(verdict.evidence) == {"host", "boot", "qemu", "kernel", "cpu", "user", "device"}


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'KVM internal error. Suberror: 1'; echo 'emulation failure' >&2; sleep 1000", "emulation failure"),
        ("while :; do :; done", "did not reach user space under it in 1 s"),
        ("echo 'Could not access KVM' >&2; exit 1", 'ended with 1 .*"Could not access KVM"'),
        ("kill -6 $$", 'ended with -6 .*"it said nothing"'),
    ],
)
def test_every_way_to_fail_has_its_reason(choose: Choose, script: str, reason: str) -> None:
    verdict = choose(script, limit=1.0)
    assert verdict.accel == "tcg"
    assert re.search(reason, verdict.reason)
    with pytest.raises(AccelUnavailable, match=reason):
        choose(script, "kvm", limit=1.0)


def test_the_probe_is_gone_when_its_time_is_over(choose: Choose, tmp_path: Path) -> None:
    choose(f"echo $$ > {tmp_path}/pid; while :; do :; done", limit=1.0)
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert list((tmp_path / "idc-testbed").iterdir()) == [tmp_path / "idc-testbed" / ".lock"]


def test_a_verdict_is_remembered_until_what_it_rests_on_changes(choose: Choose, tmp_path: Path, kernel: Path) -> None:
    def starts() -> int:
        return len((tmp_path / "started").read_text().split())

    assert not choose(SPEAKS).cached
    assert choose(SPEAKS).cached
    assert starts() == 1
    kernel.write_bytes(b"another kernel")
    assert not choose(SPEAKS).cached
    assert not choose(SPEAKS + " # another QEMU").cached
    assert starts() == 3
    (file, *_) = (tmp_path / "cache").iterdir()
    assert json.loads(file.read_text())["accel"] == "kvm"


def test_a_damaged_memory_is_no_obstacle(choose: Choose, tmp_path: Path) -> None:
    choose(SPEAKS)
    for file in (tmp_path / "cache").iterdir():
        file.write_text("{")
    assert not choose(SPEAKS).cached


def test_a_cache_that_cannot_be_written_costs_a_probe_and_nothing_else(
    choose: Choose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("no directory")
    assert choose(SPEAKS).accel == "kvm"
    assert "is not remembered" in caplog.text
    assert not choose(SPEAKS).cached


def test_the_default_cache_is_the_images_own(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDC_TESTBED_CACHE", str(tmp_path / "own"))
    monkeypatch.setattr(accel, "_device_refusal", lambda _: "")
    monkeypatch.setattr(accel, "_probe", lambda *_: "")
    assert accel.choose("auto", kernel, qemu="true").accel == "kvm"
    assert [path.suffix for path in (tmp_path / "own" / "accel").iterdir()] == [".json"]


def test_without_the_device_nothing_is_started(kernel: Path, tmp_path: Path) -> None:
    verdict = accel.choose("auto", kernel, qemu="true", cache=tmp_path / "cache", device=tmp_path / "kvm")
    assert verdict.accel == "tcg"
    assert verdict.reason.startswith(f"no {tmp_path}/kvm")
    assert not (tmp_path / "cache").exists()
    not_kvm = accel.choose("auto", kernel, qemu="true", cache=tmp_path / "cache", device=Path("/dev/null"))
    assert "is not KVM" in not_kvm.reason


@pytest.mark.needs_root
def test_without_permission_the_reason_names_owner_and_remedy() -> None:
    if not shutil.which("setpriv"):
        pytest.fail("setpriv (util-linux) is missing")
    # Not in tmp_path, whose parents are root's alone.
    directory = Path(tempfile.mkdtemp(prefix="idc-test-"))
    directory.chmod(0o755)
    device = directory / "kvm"
    os.mknod(device, 0o20600, os.makedev(10, 232))
    script = (
        "from pathlib import Path; from testbed.accel import _device_refusal;"
        f"print(_device_refusal(Path({str(device)!r})))"
    )
    said = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", script],
        capture_output=True, text=True, check=False, env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    shutil.rmtree(directory)
    assert "no permission" in said.stdout, said
    assert "root:root" in said.stdout
    assert "adduser" not in said.stdout, "nobody is to be put into group root"


def test_tcg_asks_nothing(tmp_path: Path) -> None:
    assert accel.choose("tcg", tmp_path / "none").accel == "tcg"


def test_missing_files_are_named(kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="there is no no-such-qemu"):
        accel.choose("auto", kernel, qemu="no-such-qemu")
    with pytest.raises(SpecError, match="there is no kernel"):
        accel.choose("auto", tmp_path / "none", qemu="true")


def test_the_probe_initramfs_is_a_cpio_archive(tmp_path: Path) -> None:
    archive = accel.probe_initrd()
    assert archive.startswith(b"070701")
    assert len(archive) % 4 == 0
    assert b"TRAILER!!!" in archive
    assert archive.count(b"\x7fELF") == 1
