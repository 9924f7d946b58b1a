"""`testbed top` and `testbed metrics` on a testbed that boots nothing: on a terminal, into a pipe, by HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from live_support import fake_bed, transact
from prometheus_client.parser import text_string_to_metric_families
from screen import Screen

from testbed import control
from testbed.cli_top import metrics, top
from testbed.errors import TestbedError
from testbed.live import collect
from testbed.live.collect import Collector
from testbed.live.views import rows, view
from testbed.registry import NoSuchTestbed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from live_support import FakeBed

    from idc.endpoint import Endpoint

    Bed = tuple[FakeBed, Endpoint, Endpoint]

ROOT = Path(__file__).resolve().parents[2]
DEVICE = {"class": "echo", "number": "0", "frontend": "front", "backend": "back", "region": "link", "options": {},
          "ends": {role: [{"state": "connected", "since": 1.0, "why": "the endpoints have met"}]
                   for role in ("front", "back")}}


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with fake_bed() as made:
        made[0].devices = [DEVICE]
        transact(made[1], made[2], 64)
        yield made


def environment(bed: FakeBed) -> Mapping[str, str]:
    return {"XDG_RUNTIME_DIR": str(bed.directory.parent.parent), "PYTHONPATH": str(ROOT)}


def command(bed: FakeBed, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-P", "-m", "testbed.cli", *words], env={**os.environ, **environment(bed)},
                          capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == code, done
    return done


def test_once_prints_a_table_of_each_kind(shared: Bed) -> None:
    text = command(shared[0], "top", "--once", "--interval", "0.1").stdout
    headings = [line for line in text.splitlines() if line.isupper() and " " not in line]
    assert headings == ["VMS", "LINKS", "ENDPOINTS", "DEVICES", "HOST"]
    lines = [line.split() for line in text.splitlines()]
    assert [line[2] for line in lines if line[:2] in (["fake", "front"], ["fake", "back"])] == ["running", "running"]
    assert ["fake", "link/calls", "front", "back", "connected"] in [line[:5] for line in lines]
    assert any(line[:3] == ["fake", "echo-0", "front"] for line in lines)
    assert any(line[:3] == ["fake", "region", "server"] for line in lines)


def test_json_has_the_figures_and_nothing_else(shared: Bed) -> None:
    told = json.loads(command(shared[0], "top", "--json", "--interval", "0.1").stdout)
    assert [bed["name"] for bed in told["testbeds"]] == ["fake"]
    ends = {end["endpoint"]: end for end in told["endpoints"]}
    assert ends["link/calls front"]["state"] == "connected"
    assert ends["link/calls front"]["round_trip"] > 0
    assert ends["link/bulk front"]["state"] == "absent"
    assert all(vm["private"] > 0 and vm["cpu"] is not None for vm in told["vms"])
    assert {link["link"]: link["connected"] for link in told["links"]} == {"link": "1/2"}


def test_one_view_sorted_and_filtered(shared: Bed) -> None:
    told = json.loads(command(shared[0], "top", "--json", "--interval", "0.1", "--view", "endpoints", "--sort", "peer",
                              "--filter", "CALLS").stdout)
    assert [end["peer"] for end in told["endpoints"]] == ["back", "front"]
    assert "vms" not in told


@pytest.mark.parametrize(("call", "given", "error"), [
    (top, {"which": "nothing"}, "no view 'nothing'; try: there are vms, links, endpoints, devices, host"),
    (top, {"which": "vms", "sort": "rate"}, "no column 'rate' (there are: testbed, vm, state, cpu"),
    (top, {"sort": "cpu"}, "no column 'cpu' in every view"),
    (top, {}, "top draws on a terminal, and this is none; try: --once, or --json"),
    (top, {"names": ["other"]}, "no testbed 'other' runs"),
    (metrics, {"names": ["other"]}, "no testbed 'other' runs"),
    (metrics, {"listen": "9105"}, "--listen '9105' is not ADDRESS:PORT; try: --listen 127.0.0.1:9105"),
    (metrics, {"listen": "127.0.0.1:99999"}, "is not ADDRESS:PORT"),
])
def test_what_cannot_be_is_one_line(shared: Bed, monkeypatch: pytest.MonkeyPatch, call: Callable[..., None],
                                    given: dict[str, Any], error: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", environment(shared[0])["XDG_RUNTIME_DIR"])
    with pytest.raises(TestbedError) as raised:
        call(**given)
    assert error in control.one_line(raised.value)
    assert "\n" not in control.one_line(raised.value)


def test_where_nothing_runs_top_says_so_and_metrics_say_none(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(NoSuchTestbed, match="no testbed runs"):
        top(once=True)
    metrics()
    assert "\nidc_testbed_testbeds 0.0\n" in capsys.readouterr().out


def test_metrics_once_and_served(shared: Bed) -> None:
    text = command(shared[0], "metrics").stdout
    once = {family.name: family for family in text_string_to_metric_families(text)}
    assert [sample.value for sample in once["idc_testbed_up"].samples] == [1]
    assert {sample.labels["vm"] for sample in once["idc_testbed_vm_running"].samples} == {"front", "back"}
    assert once["idc_testbed_endpoint_round_trip_seconds"].type == "histogram"
    with subprocess.Popen([sys.executable, "-P", "-m", "testbed.cli", "metrics", "--listen", "127.0.0.1:0"],
                          env={**os.environ, **environment(shared[0])}, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = server.stderr.readline()
        assert line.startswith("serving http://127.0.0.1:"), line
        with urllib.request.urlopen(line.split()[1], timeout=60) as answer:
            served = {family.name for family in text_string_to_metric_families(answer.read().decode())}
        server.terminate()  # not SIGINT, which the background of a script ignores
        assert server.wait(60) == 143
    assert set(once) <= served


def test_the_screen_shows_sorts_filters_and_looks_closely(shared: Bed) -> None:
    bed, front, back = shared
    with Screen("top", "--interval", "0.2", env=environment(bed)) as screen:
        screen.until("fake (tcg)")
        screen.shows("VMv", "STATE")
        screen.shows("front", "running")
        screen.press("3")
        screen.until("link/calls front")
        screen.until("link/bulk back")
        screen.shows("ENDPOINTv", "PEER", "STATE*")
        first = screen.until("link/bulk back").index("link/bulk back")
        screen.press("r")
        screen.until(lambda text: "link/bulk back" in text and text.index("link/bulk back") > first)
        screen.press("r")
        screen.until("ENDPOINTv")
        screen.press("s")
        screen.until("PEERv")
        screen.press("/call?\x7fs")
        screen.until(lambda text: "2 of 4 with 'calls'" in text and "link/bulk" not in text)
        screen.press("\r\r")
        screen.until("channel calls: messages, connected")
        screen.until("round trips of front, a sample of 8")
        transact(front, back, 64)
        for end in (front, back):
            end.arm()
        screen.until("a sample of 16")
        screen.press("\x1b")
        screen.until("PEERv")
        screen.press("\x1b")
        screen.until("link/bulk front")
        screen.press("\t")
        screen.until("echo-0")
        screen.press("\r")  # of a device its connection
        screen.until("channel calls: messages, connected")
        screen.press("p")
        screen.until("PAUSED")
        screen.press("q")
        assert screen.end() == 0
        assert screen.all.rstrip().endswith(b"\x1b[?1049l") or b"\x1b[?1049l" in screen.all[-400:]


def test_a_terminal_too_small_says_so_and_grows_again(shared: Bed) -> None:
    with Screen("top", "--interval", "0.2", env=environment(shared[0]), size=(5, 30)) as screen:
        screen.until("30x5: too small, 40x6 at least")
        screen.resize(30, 140)
        screen.until("fake (tcg)")
        assert "too small" not in screen.text
        screen.resize(4, 20)
        screen.until("too small")
        screen.press("q")
        assert screen.end() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_and_gives_the_terminal_back(shared: Bed, number: int, code: int) -> None:
    with Screen("top", "--interval", "0.2", env=environment(shared[0])) as screen:
        screen.until("fake (tcg)")
        screen.child.kill(number)
        assert screen.end() == code
        assert b"\x1b[?1049l" in screen.all[-2000:], "it left the alternate screen"


def test_what_dies_while_it_is_watched_is_shown_and_so_is_its_return() -> None:
    with fake_bed() as (bed, _, _), Screen("top", "--interval", "0.2", env=environment(bed)) as screen:
        screen.until("fake (tcg)")
        bed.vms["back"].kill()
        screen.until("ended: signal SIGKILL")
        screen.shows("front", "running")
        bed.end()
        screen.until("no testbed runs; waiting for one")
        screen.press("q")
        assert screen.end() == 0


def test_a_supervisor_that_does_not_answer_costs_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PATIENCE", 0.2)
    with fake_bed("one") as (one, _, _), fake_bed("two") as (two, _, _), \
            Collector(running=lambda: [one.entry, two.entry]) as collector:
        assert [bed.trouble for bed in collector.look()] == ["", ""]
        one.answers.clear()
        first, second = collector.look()
        assert (first.trouble, first.vms, second.trouble) == ("does not answer", (), "")
        (stuck, *others) = rows(view("vms"), [first, second], [])
        assert (stuck["testbed"], stuck["state"], len(others)) == ("one", "does not answer", 2)
        one.answers.set()
        assert [bed.trouble for bed in collector.look()] == ["", ""]


def test_nothing_of_a_region_is_kept_that_is_gone() -> None:
    with fake_bed() as (bed, front, back), Collector(running=lambda: [bed.entry]) as collector:
        (before,) = collector.look()
        assert [region.name for region in before.regions] == ["link"]
        descriptors = set(os.listdir("/proc/self/fd"))
        region = bed.regions.pop("link")
        (now,) = collector.look()
        assert now.regions == ()
        assert len(descriptors - set(os.listdir("/proc/self/fd"))) >= 1
        bed.regions["link"] = region
        told: Any = rows(view("endpoints"), collector.look(), [now])
        assert [end["sent"] for end in told] == [None] * 4, "it was not there before"
        del front, back
