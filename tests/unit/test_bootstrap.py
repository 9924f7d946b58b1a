"""What a bare machine is told to install. Nothing is installed here."""

import subprocess
import sys
from pathlib import Path

import pytest

from testbed import bootstrap


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user's machine that has no command at all."""
    monkeypatch.setattr(bootstrap, "have_command", lambda _: False)
    monkeypatch.setattr("testbed.bootstrap.os.getuid", lambda: 1000)


@pytest.mark.usefixtures("bare")
def test_a_bare_machine_is_told_everything_at_once() -> None:
    run, dev = bootstrap.missing_packages(dev=False), bootstrap.missing_packages(dev=True)
    assert {"qemu-system-x86", "mmdebstrap", "erofs-utils", "gcc", "uidmap"} <= set(run)
    assert {"clang", "spin"} <= set(dev) - set(run)
    assert run == sorted(set(run))


@pytest.mark.usefixtures("bare")
def test_who_may_not_install_gets_one_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def which(name: str, **_: object) -> str | None:
        return None if name == "sudo" else f"/usr/bin/{name}"

    monkeypatch.setattr("testbed.bootstrap.shutil.which", which)
    with pytest.raises(SystemExit):
        bootstrap.install_packages(dev=False)
    said = capsys.readouterr().err
    (command,) = [line.strip() for line in said.splitlines() if "apt-get" in line]
    assert command.startswith("apt-get update && apt-get install --no-install-recommends -y ")
    assert command.split("-y ")[1].split() == bootstrap.missing_packages(dev=False)


def test_a_machine_that_has_everything_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(bootstrap, "missing_packages", lambda _: [])
    monkeypatch.setattr("testbed.bootstrap.subprocess.run", refuse)
    bootstrap.install_packages(dev=True)


def test_the_virtual_environment_follows_what_it_was_made_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "idc" / "core").mkdir(parents=True)
    for name in ("pyproject.toml", "setup.py", "idc/core/ring.c"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    before = bootstrap.fingerprint(dev=False)
    assert bootstrap.fingerprint(dev=False) == before != bootstrap.fingerprint(dev=True)
    (tmp_path / "idc" / "core" / "ring.c").write_text("int x;")
    assert bootstrap.fingerprint(dev=False) != before


def test_where_there_is_no_python_make_says_what_to_do() -> None:
    done = subprocess.run(["make", "demo", "PYTHON=nopython"], cwd=bootstrap.ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("setup: there is no nopython; as root: apt-get install python3, or name another one")


def test_it_needs_the_standard_library_only() -> None:
    done = subprocess.run([sys.executable, "-I", "-S", bootstrap.__file__, "--help"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
