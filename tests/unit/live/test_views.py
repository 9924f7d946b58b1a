"""Tables from two looks: rates, what was not there before, sorting, filtering, and connections closely."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from live_looks import bed, calls

from testbed.live import views
from testbed.live.collect import BedNow, ProcessNow
from testbed.live.proc import Cpu
from testbed.live.views import amount, arrange, detail, percent, rows, size, span, view


def test_rates_are_of_the_time_between_two_looks() -> None:
    before, now = bed(10.0, calls(100, 100, 10, 1000_000, 5)), bed(12.0, calls(316, 300, 20, 3000_000, 25), cpu=2.5)
    (a, b) = rows(view("endpoints"), [now], [before])
    assert (a["endpoint"], a["peer"], a["state"]) == ("link/calls a", "b", "connected")
    assert (a["sent"], a["received"], a["doorbells"], a["fill"]) == (100.0, 100.0, 10.0, 0.25)
    assert a["round_trip"] == pytest.approx(200e-6)
    assert (b["sent"], b["round_trip"]) == (100.0, None)
    (link,) = rows(view("links"), [now], [before])
    assert (link["messages"], link["bytes"], link["doorbells"]) == (200.0, 2000.0, 10.0)
    assert (link["lost"], link["connected"], link["memory"], link["state"]) == (2, "1/1", 4096, "up")
    (vm,) = rows(view("vms"), [now], [before])
    assert (vm["cpu"], vm["private"], vm["shared"], vm["regions"]) == (0.75, 3 << 20, 2 << 20, 1)


def test_the_first_look_has_no_rates() -> None:
    now = bed(12.0, calls(316, 300, 20, 3000_000, 25))
    (a, _) = rows(view("endpoints"), [now], [])
    assert (a["sent"], a["doorbells"]) == (None, None)
    assert a["round_trip"] == pytest.approx(150e-6), "of all that were timed"
    assert rows(view("vms"), [now], [])[0]["cpu"] is None
    assert view("vms").columns[3].text(rows(view("vms"), [now], [])[0]) == "-"


def test_a_connection_that_began_anew_counts_from_its_beginning() -> None:
    before, now = bed(0.0, calls(1000, 1000, 50, 10**9, 90)), bed(1.0, calls(20, 20, 2, 4000, 3))
    (a, _) = rows(view("endpoints"), [now], [before])
    assert (a["sent"], a["doorbells"]) == (20.0, 3.0)
    assert a["round_trip"] == pytest.approx(2e-6)


def test_indexes_that_lie_give_no_fill_and_no_rate_beyond_belief() -> None:
    before, now = bed(0.0, calls(10, 10)), bed(1.0, calls(1 << 63, (1 << 64) - 5))
    (a, _) = rows(view("endpoints"), [now], [before])
    assert a["fill"] is None
    assert a["sent"] == 0.0


def test_another_process_of_the_same_number_has_no_share_of_the_first() -> None:
    before, now = bed(0.0, calls(0, 0), cpu=90.0), bed(1.0, calls(0, 0), cpu=1.0)
    other = replace(now.vms[0], cpu=Cpu(1.0, 6))
    assert rows(view("vms"), [replace(now, vms=(other,))], [before])[0]["cpu"] is None


def test_what_died_is_shown_and_has_no_figures() -> None:
    dead = ProcessNow("a", "ended: QEMU ended (signal SIGKILL) and said nothing", None, None, None)
    (vm,) = rows(view("vms"), [bed(1.0, calls(0, 0), vms=(dead,))], [bed(0.0, calls(0, 0))])
    assert [vm[key] for key in ("cpu", "private", "pid")] == [None] * 3
    assert "SIGKILL" in str(vm["state"])
    (vm,) = rows(view("vms"), [BedNow("t", 1.0, trouble="does not answer")], [])
    assert (vm["testbed"], vm["state"]) == ("t", "does not answer")


def test_devices_have_the_figures_of_their_channel() -> None:
    steps = {"front": [{"state": "connected", "since": 1.0, "why": "the endpoints have met"}],
             "back": [{"state": "closed", "since": 1.0, "why": "no such file"}]}
    device = {"class": "echo", "number": "0", "frontend": "a", "backend": "b", "region": "link", "ends": steps}
    before, now = (bed(at, calls(n, n), devices=(device,)) for at, n in ((0.0, 0), (1.0, 50)))
    (row,) = rows(view("devices"), [now], [before])
    assert (row["device"], row["front"], row["back"], row["why"]) == ("echo-0", "connected", "closed", "no such file")
    assert row["sent"] == 50.0
    gone = replace(now, devices=({**device, "region": "other", "ends": {"front": [], "back": []}},))
    (row,) = rows(view("devices"), [gone], [before])
    assert (row["front"], row["why"], row["sent"]) == ("closed", "no drivers run there", None)


def test_rows_are_sorted_and_filtered() -> None:
    which = view("vms")
    found = [dict.fromkeys([column.key for column in which.columns]) | {"key": f"t/{name}", "vm": name, "cpu": cpu}
             for name, cpu in (("b", 0.5), ("a", None), ("C", 0.25), ("d", 0.5))]
    assert [row["vm"] for row in arrange(which, found, "cpu", reverse=True)] == ["b", "d", "C", "a"]
    assert [row["vm"] for row in arrange(which, found, "cpu")] == ["C", "b", "d", "a"]
    assert [row["vm"] for row in arrange(which, found, "vm", wanted="c")] == ["C"]
    assert arrange(which, [], "vm") == []


def test_a_connection_closely() -> None:
    before, now = bed(10.0, calls(100, 100)), bed(12.0, calls(316, 300, 20, 3000_000, 25))
    text = "\n".join(detail("t/link/calls/a", [now], [before]))
    for piece in ("message", "connected", "a present, incarnation 1", "doorbells from a to b: 2 dropped",
                  "epoch 0x7", "16 of 64", "doorbells 25", "sent/s 100", "round trips of a, a sample of 20", "512ns"):
        assert piece in text, text
    assert detail("t/link/calls/x", [now], [before]) == []


@pytest.mark.parametrize(("function", "value", "text"), [
    (amount, 0, "0"), (amount, 0.25, "0.25"), (amount, 999, "999"), (amount, 1234567, "1.23M"), (amount, 5e14, "500T"),
    (size, 0, "0"), (size, 1023, "1023"), (size, 1536, "1.5K"), (size, 123 << 20, "123M"), (percent, 1.234, "123%"),
    (span, 2.5, "2.5s"), (span, 0.0123, "12.3ms"), (span, 4.3e-6, "4.3us"), (span, 5e-7, "500ns")])
def test_figures_for_people(function: Any, value: float, text: str) -> None:
    assert function(value) == text


def test_each_view_says_who_measured_what() -> None:
    claimed = {which.name: {column.key for column in which.columns if column.claimed} for which in views.VIEWS}
    assert claimed["vms"] == claimed["host"] == set()
    assert claimed["links"] == {"connected", "messages", "bytes", "doorbells", "drops"}
    assert {"state", "sent", "fill", "round_trip", "late"} <= claimed["endpoints"]
    assert {"front", "back", "why"} <= claimed["devices"]
    for which in views.VIEWS:
        assert which.column(which.sort) is not None
        assert len({column.key for column in which.columns}) == len(which.columns)
