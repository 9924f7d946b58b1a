"""Commands about topologies and this machine that boot nothing: each mistake is one line, and nothing is left."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed import registry
from testbed.registry import Entry, NameTaken, NoSuchTestbed

ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def runtime() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as directory:
        yield Path(directory)


@pytest.fixture
def cli(runtime: Path) -> Cli:
    def run(*words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, "-P", "-m", "testbed.cli", *words], env=env, text=True,
                                capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL)
        assert result.returncode == code, result
        return result

    return run


@pytest.mark.parametrize(("text", "message"), [
    ("[vms.a", "is no TOML"),
    ("vms = 3", "vms: should be a table, not 3"),
    ("[vms]\na = 3", "[vms] a: should be a table, not 3"),
    ("", "there is no VM"),
    ("[vms.a]\nimage = 'nothing'", "no image matches 'nothing'"),
    ("[vms.a]\nkernel = 'nothing'", "[vms.a] kernel: "),
    ("[vms.a]\n[regions.r]\nsize = '3M'\nmembers = {a = 'rw'}", "3M is no power of two"),
    ("[vms.a]\n[regions.r]\nmembers = {b = 'rw'}", "'b' is no VM of this testbed"),
])
def test_up_refuses_in_one_line_and_starts_nothing(cli: Cli, runtime: Path, text: str, message: str) -> None:
    file = runtime / "bed.toml"
    file.write_text(text)
    error = cli("up", str(file), code=1).stderr
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list((runtime / "idc-testbed").glob("[0-9a-f]*"))


def test_a_file_that_may_not_be_read_is_named(cli: Cli, runtime: Path) -> None:
    (runtime / "bed.toml").mkdir()
    for name, why in (("bed.toml", "Is a directory"), ("none.toml", "No such file or directory")):
        path = runtime / name
        assert cli("up", str(path), code=1).stderr == (
            f"error: cannot read the topology {path}: {why}; try: docs/topology.md has an example; `testbed up` "
            "without a file boots two VMs and a link\n")
    if os.geteuid() != 0:  # root may read everything
        (runtime / "secret.toml").touch(mode=0)
        assert "secret.toml: Permission denied" in cli("up", str(runtime / "secret.toml"), code=1).stderr


def test_where_no_testbed_runs_each_command_says_so(cli: Cli) -> None:
    for words, code in ((("exec", "a", "true"), 255), (("down",), 1), (("logs", "a"), 1), (("plug", "r", "a"), 1),
                        (("cp", "a:/x", "y"), 1), (("bundle",), 1), (("console", "a"), 1), (("ssh", "a"), 1)):
        assert cli(*words, code=code).stderr == "error: no testbed runs; try: testbed up\n"
    assert cli("down", "--all").stdout == ""
    assert json.loads(cli("ps", "--json").stdout) == []


def test_config_show_prints_what_is_meant(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "t.toml").write_text("[vms.a]\n[vms.b]\n[links.ab]\nmembers = ['a', 'b']\n")
    assert "[links.ab]" in cli("config", "show", str(tmp_path / "t.toml")).stdout
    told = json.loads(cli("config", "show", "--resolved", "--json", str(tmp_path / "t.toml")).stdout)
    assert told["name"] == "t"
    assert told["regions"]["ab"]["members"] == {"a": "rw", "b": "rw"}
    assert told["vms"]["a"]["gdb"] == "off"
    assert told["regions"]["ab"]["doorbells"] == []


def test_doctor_names_what_was_looked_at(cli: Cli) -> None:
    checks = {check["name"]: check for check in json.loads(cli("doctor", "--json").stdout)}
    assert {"qemu-system-x86_64", "image", "kvm", "/dev/net/tun", "memory", "leftover runs"} <= set(checks)
    assert {check["state"] for check in checks.values()} <= {"ok", "warn"}


def test_help_fits_one_screen(cli: Cli) -> None:
    assert len(cli("--help").stdout.splitlines()) <= 40


def listening(base: Path, name: str, vms: tuple[str, ...]) -> tuple[Entry, socket.socket]:
    directory = base / name
    directory.mkdir()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.bind(str(directory / registry.SOCKET))
    sock.listen(8)
    return Entry(name, str(directory), os.getpid(), 0.0, vms), sock


def test_names_are_found_and_taken_once(runtime: Path) -> None:
    one, sock_one = listening(runtime, "one", ("front", "back"))
    two, sock_two = listening(runtime, "two", ("front", "other"))
    with sock_one, sock_two:
        for entry in (one, two):
            registry.register(entry)
        assert registry.find_vm("back", runtime) == (one, "back")
        assert registry.find_vm("two/front", runtime) == (two, "front")
        with pytest.raises(NoSuchTestbed, match=r"several testbeds have a VM 'front'\n.*one/front or two/front"):
            registry.find_vm("front", runtime)
        with pytest.raises(NoSuchTestbed, match="several testbeds run: one, two"):
            registry.find("", runtime)
        with pytest.raises(NameTaken, match="'two' runs already"):
            registry.register(Entry("two", str(runtime / "one"), 1, 0.0, ()))
        assert registry.find_pair("front", "back", runtime) == (one, "front", "back")
        assert registry.find_pair("x", "y", runtime) is None
        assert registry.find_pair("../x", "y", runtime) is None
        with pytest.raises(NoSuchTestbed, match="share nothing"):
            registry.find_pair("one/front", "two/other", runtime)
    # whoever does not answer any more is not there
    assert registry.running(runtime) == []
