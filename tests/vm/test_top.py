"""`testbed top` and `testbed metrics` beside real VMs: traffic, a VM that dies while it is watched, and the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from device_support import install
from prometheus_client.parser import text_string_to_metric_families
from screen import Screen

ROOT = Path(__file__).resolve().parents[2]
TOPOLOGY = """
name = "watched"
[vms.front]
[vms.back]
[broker]
[devices.words]
class = "echo"
frontend = "front"
backend = "back"
"""
USE = """
from idc.domain import Service
from idc.endpoint.blocking import Caller
from idc.transport.address import open_port
with Caller(open_port("unix:/run/idc/echo-0"), Service("echo").resources()) as echo:
    while True:
        echo.transact(b"hello", timeout=60)
"""


@pytest.mark.timeout(600)
def test_what_real_vms_do_is_seen_and_so_is_their_end() -> None:
    with tempfile.TemporaryDirectory(prefix="tb", dir="/tmp") as directory, contextlib.ExitStack() as held:
        site = install(Path(directory) / "site")
        environment = {"XDG_RUNTIME_DIR": directory, "PYTHONPATH": f"{ROOT}:{site}"}

        def run(*words: str) -> str:
            return subprocess.run([sys.executable, "-P", "-m", "testbed.cli", *words], check=True, text=True,
                                  env={**os.environ, **environment}, stdout=subprocess.PIPE, timeout=240).stdout

        file = Path(directory) / "watched.toml"
        file.write_text(TOPOLOGY)
        run("up", str(file))
        try:
            user = subprocess.Popen(
                [sys.executable, "-P", "-m", "testbed.cli", "exec", "front", "--", "python3", "-c", USE],
                env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            held.callback(user.wait)
            held.callback(user.kill)
            with Screen("top", "--view", "devices", env=environment) as screen:
                # state, state, sent, received and doorbells a second: all there is to see of traffic
                screen.until(lambda _: len(line := screen.line("echo-0")) > 9 and line[2] == line[4] == "connected"
                             and "0" not in line[5:8] and "-" not in line[5:10], limit=240)
                told = json.loads(run("top", "--json"))
                check(told)
                found = {family.name: family for family in text_string_to_metric_families(run("metrics"))}
                trips = [sample for sample in found["idc_testbed_endpoint_round_trip_seconds"].samples
                         if sample.name.endswith("_count") and sample.labels["channel"] == "device"]
                assert [sample.labels["member"] for sample in trips] == ["front"]
                assert trips[0].value > 0
                user.kill()
                screen.press("1")
                screen.shows("back", "running")
                os.kill(next(int(vm["pid"]) for vm in told["vms"] if vm["vm"] == "back"), signal.SIGKILL)
                screen.until("ended: QEMU ended (signal SIGKILL)")
                screen.shows("front", "running")
                run("down", "--all", "--force")
                screen.until("no testbed runs; waiting for one")
                screen.press("q")
                assert screen.end() == 0
        finally:
            run("down", "--all", "--force")


def check(told: dict[str, list[dict[str, object]]]) -> None:
    """What `--json` says while the device is used."""
    for vm in told["vms"]:
        assert vm["state"] == "running"
        for figure in ("private", "shared", "proportional"):
            value = vm[figure]
            assert isinstance(value, int)
            assert value > 10 << 20
    (device,) = told["devices"]
    assert isinstance(device["round_trip"], float)
    assert 0 < device["round_trip"] < 60
    ends = {str(end["endpoint"]).partition("/")[2]: end for end in told["endpoints"]}
    assert ends["registry front"]["state"] == ends["device back"]["state"] == "connected"
    assert {str(process["process"]) for process in told["host"]} == {"supervisor", "fd holder", "region server",
                                                                     "broker", "registry"}
    link = next(link for link in told["links"] if str(link["link"]).startswith("dev-echo-"))
    assert link["members"] == "front rw, back rw"
    assert link["state"] == "up"
