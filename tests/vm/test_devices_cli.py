"""A user's way to a device: `testbed up` with one in the topology, `attach`, `devices`, `detach`, and their errors."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from device_support import install

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = """
name = "devices"
[vms.front]
[vms.back]
[broker]
[devices.words]
class = "echo"
frontend = "front"
backend = "back"
options = { times = 2 }
"""
USE = """
from idc.domain import Service
from idc.endpoint.blocking import Caller
from idc.transport.address import open_port
with Caller(open_port("unix:/run/idc/echo-0"), Service("echo").resources()) as echo:
    print(echo.transact(b"hello ", timeout=30))
"""

Result = subprocess.CompletedProcess[str]
Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as directory:
        site = install(Path(directory) / "site")
        env = {**os.environ, "XDG_RUNTIME_DIR": directory, "PYTHONPATH": f"{ROOT}:{site}", "COLUMNS": "250"}

        def run(*words: str, code: int = 0) -> Result:
            result = subprocess.run([sys.executable, "-P", "-m", "testbed.cli", *words], env=env, text=True,
                                    capture_output=True, timeout=240, check=False)
            assert result.returncode == code, result
            return result

        file = Path(directory) / "devices.toml"
        file.write_text(TOPOLOGY)
        try:
            run("up", str(file))
            yield run
        finally:
            run("down", "--all", "--force")


def devices(cli: Cli) -> list[dict[str, Any]]:
    return list(json.loads(cli("devices", "--json").stdout))


def test_a_device_of_the_topology_is_there_and_comes_and_goes(cli: Cli) -> None:
    (device,) = devices(cli)
    assert [device["ends"][role][0]["state"] for role in ("front", "back")] == ["connected", "connected"]
    assert cli("exec", "front", "--", "python3", "-c", USE).stdout == "b'hello hello '\n"
    shown = cli("devices").stdout.splitlines()
    assert [line.split()[:4] for line in shown[1:]] == [["echo-0", "front", "front", "connected"],
                                                         ["echo-0", "back", "back", "connected"]]
    assert "the endpoints have met" in shown[1]
    assert len(cli("devices", "--steps").stdout.splitlines()) > 6
    assert "attached already, number 0" in cli("attach", "echo", "--frontend", "front", "--backend", "back",
                                               code=1).stderr
    assert cli("detach", "echo", "--frontend", "front").stdout == "echo-0 of front: detached\n"
    assert devices(cli) == []
    said = cli("attach", "echo", "--frontend", "front", "--backend", "back", "times=3").stdout
    assert "front end in front connected, back end in back connected" in said
    assert cli("exec", "front", "--", "python3", "-c", USE).stdout == "b'hello hello hello '\n"
    cli("detach", "echo", "--frontend", "front", "--number", "0")


@pytest.mark.parametrize(("words", "error"), [
    (("attach", "ekho", "--frontend", "front", "--backend", "back"), "there is no device class 'ekho' here"),
    (("attach", "echo", "--frontend", "front", "--backend", "bakc"), "backend 'bakc' is no domain"),
    (("attach", "echo", "--frontend", "front", "--backend", "back", "times=x"), "option times: 'x' is no int"),
    (("attach", "echo", "--frontend", "front", "--backend", "back", "times"), "'times' is no option"),
    (("detach", "echo", "--frontend", "front"), "front has no echo device"),
])
def test_mistakes_are_one_line_and_change_nothing(cli: Cli, words: tuple[str, ...], error: str) -> None:
    said = cli(*words, code=1).stderr.strip()
    assert error in said
    assert "\n" not in said
    assert devices(cli) == []


def daemons(cli: Cli) -> dict[str, int]:
    """Process ids by what they are; none while the testbed cannot tell, for want of a region server."""
    (bed,) = json.loads(cli("ps", "--json").stdout)
    return dict(bed.get("daemons", {}))


def test_daemons_that_die_are_started_again_by_themselves(cli: Cli) -> None:
    before = daemons(cli)
    killed = ("region server", "registry", "broker")
    for name in killed:
        os.kill(before[name], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (now := daemons(cli)) or any(now[name] == before[name] for name in killed):
        assert time.monotonic() < deadline
    assert now["fd holder"] == before["fd holder"]
    assert "/domain/front" in cli("registry", "ls", "/domain").stdout
    assert cli("exec", "front", "--", "python3", "-m", "guest.ivshmem").returncode == 0


def test_the_classes_are_listed(cli: Cli) -> None:
    listed = cli("devices", "--classes").stdout
    assert "echo" in listed
    assert "how often it comes back" in listed
