"""What a report draws of a run, and what it says where there is nothing to draw; no browser."""

import dataclasses
import json
import math
import re

import pytest
from report_support import made_up, rates

from testbed.bench import words
from testbed.bench.rows import Result, Row
from testbed.report.page import render
from testbed.report.parts import Run, cpu_words, faster, peer
from testbed.report.sections import places
from testbed.report.sizes import crossings


@pytest.fixture(scope="module")
def run() -> Run:
    return made_up()


def test_a_reader_first_gets_how_fast_and_against_what(run: Run) -> None:
    first, second = places(run)
    assert (first.id, second.id) == ("vm-vm", "process"), "VMs first"
    polled = first.tiles[0]
    assert polled.what == "Round trip 64 B, polled"
    assert re.fullmatch(r"\d{3} ns", polled.figure)
    assert re.fullmatch(r"\d{3}\N{MULTIPLICATION SIGN} as fast as TCP \(\d{3} us\)", polled.against)
    glance = first.sections[0].figures[0]
    assert glance.items[0].label == "Round trip 64 B, polled / TCP"
    assert glance.rules == [(1.0, "as fast")]
    page = render(run)
    assert page.index("TCG: QEMU emulated every instruction") < page.index("Round trip 64 B, polled")
    assert page.index(" bars hold") < page.index("Round trip 64 B, polled")


def test_every_figure_says_the_accelerator_it_was_measured_under(run: Run) -> None:
    for accel, virtual, alone in (("tcg", "TCG · run 7", "no VM (run: TCG) · run 7"),
                                  ("kvm", "KVM · run 7", "no VM (run: KVM) · run 7"), ("none", "no VM", "no VM")):
        found = dataclasses.replace(run, result=dataclasses.replace(run.result, accel=accel))
        for place in places(found):
            stamps = {figure.stamp for figure in place.figures}
            assert len(stamps) == 1
            assert stamps.pop().startswith(virtual if place.id == "vm-vm" else alone)


def test_distributions_are_those_of_the_histograms(run: Run) -> None:
    place = places(run)[0]
    ecdf, tail = (next(figure for figure in place.figures if figure.id == f"vm-vm-rtt-core-64-{which}")
                  for which in ("ecdf", "tail"))
    rows = {each.label: each for each in ecdf.series}
    assert {"polled", "doorbell", "adaptive", "bare cache line", "bare doorbell", "TCP"} == rows.keys()
    for each in ecdf.series:
        assert each.points == sorted(each.points), "neither time nor share goes back"
        assert each.points[-1][1] == 1
    row = next(row for row in run.result.results if (row.name, row.path, row.mode, row.api) ==
               ("rtt", "ivshmem", "poll", "core"))  # fmt: skip
    assert next(value for value, share in rows["polled"].points if share >= 0.5) == row.p50
    ends = {each.label: each.points[-1] for each in tail.series}
    assert ends["polled"][0] == pytest.approx(-math.log10(1 - 0.998))
    assert max(x for x, _ in ends.values()) < 3, "999 samples say nothing of the 99.9th"


def test_limits_lie_in_the_plots_of_throughput(run: Run) -> None:
    place = places(run)[0]
    stream = next(figure for figure in place.figures if figure.id == "vm-vm-stream-core")
    assert {each.label for each in stream.series} == {"polled", "bare pipeline", "local copy", "TCP"}
    assert all(len(each.points) == 7 for each in stream.series)


def test_where_map_overtakes_copy_lies_between_two_sizes() -> None:
    def bulk(strategy: str, size: int, value: float) -> Row:
        return rates("vm-vm", "bulk", ("ivshmem", "poll", "python"), size, "B/s", value, strategy=strategy)

    both = [("copy", 1 << 10, 4.0), ("map", 1 << 10, 1.0), ("copy", 1 << 14, 1.0), ("map", 1 << 14, 4.0)]
    ((size, *words_),) = crossings([bulk(*each) for each in both])
    assert size == pytest.approx(1 << 12)
    assert words_ == ["map", "from 4 KiB on"]
    always = [("copy", 64, 1.0), ("map", 64, 2.0), ("copy", 128, 1.0), ("map", 128, 2.0)]
    assert crossings([bulk(*each) for each in always]) == [(64.0, "map", "at every size")]
    never = [("copy", 64, 1.0), ("handover", 64, 2.0), ("copy", 128, 2.0), ("handover", 128, 1.0)]
    assert crossings([bulk(*each) for each in never]) == []


def test_devices_that_were_not_measured_are_said() -> None:
    some = dataclasses.replace(made_up(), result=dataclasses.replace(made_up().result, results=tuple(
        row for row in made_up().result.results if row.name != "net")))
    (devices,) = [section for section in places(some)[0].sections if section.id == "devices"]
    assert (devices.missing, devices.command) == ("Not measured in this run: net.", "testbed bench net")
    assert "Measure with <code>testbed bench net</code>." in render(some)
    full, none = (next(section for section in places(made_up(devices=devices))[0].sections if section.id == "devices")
                  for devices in (True, False))  # fmt: skip
    assert [figure.title for figure in full.figures] == ["Ping: IPv4, 64 B", "Block: random read, depth 1, 4 KiB",
                                                         "Net: IPv6, far to near"]
    assert full.missing == ""
    assert [item.label for item in full.figures[0].items] == ["IDC", "virtio-net"]
    glance = places(made_up())[0].sections[0].figures[0]
    assert "Block: random read, depth 1, 4 KiB / virtio-blk" in {item.label for item in glance.items}, "the best peer"
    assert none.missing == "Not measured in this run: block, net, ping."
    assert none.command == "testbed bench block net"
    assert none.figures == []


def test_processor_time_is_read_with_what_it_is_for(run: Run) -> None:
    trip, stream, disk = (next(row for row in run.result.results if row.name == name and row.cpu_s)
                          for name in ("rtt", "stream", "block"))
    assert cpu_words(dataclasses.replace(trip, cpu_s=0.564)) == "564 us/op", "rows count 1,000 operations"
    assert cpu_words(dataclasses.replace(stream, cpu_s=1.9)) == "1.90 s/GB"
    assert cpu_words(dataclasses.replace(disk, cpu_s=13.0)) == "13.0 ms/op"
    assert cpu_words(dataclasses.replace(disk, unit="MB/s", cpu_s=13.0)) == "13.0 s/GB"
    figures = {figure.id: figure for figure in places(run)[0].figures if "-cpu-" in figure.id}
    assert figures.keys() == {f"vm-vm-cpu-{what}" for what in ("rtt", "stream", "block", "net", "ping")}
    for figure in figures.values():
        for item, row in zip(figure.items, figure.table.rows, strict=True):
            assert row[2].text == item.text
            assert item.text.endswith("/GB" if figure.x.format == "plain" else "/op")


def test_the_best_of_several_peers_is_the_fastest_also_by_time() -> None:
    ours, slow, fast = (rates("vm-vm", "ping", (path, "ipv4", "core"), 64, "us", value)
                        for path, value in (("ivshmem", 400.0), ("tcp", 900.0), ("virtio-net", 700.0)))
    assert peer([ours, slow, fast], ours) is fast


def test_ratios_are_of_rounds_that_were_neighbours() -> None:
    ours, theirs = (rates("vm-vm", "net", (path, None, "core"), 0, "Mbit/s", 1.0) for path in ("ivshmem", "virtio-net"))
    ours, theirs = dataclasses.replace(ours, rounds=(2.0, 30.0)), dataclasses.replace(theirs, rounds=(1.0, 10.0))
    assert faster(ours, theirs) == [2.5, 2.0, 3.0]
    assert faster(dataclasses.replace(ours, rounds=(1.0,)), theirs) == [1.0]
    assert faster(dataclasses.replace(ours, unit="us"), theirs)[1:] == [0.5, pytest.approx(1 / 3)]


def test_a_busy_machine_is_said_before_any_figure(run: Run) -> None:
    busy = dataclasses.replace(run.result, host=run.result.host | {"load_before": 5.08}, notes=("mind this",))
    page = render(dataclasses.replace(run, result=busy))
    head = page[:page.index("<main")]
    assert "The machine was busy when this run began (load 5.1 on 2 CPUs)" in head
    assert "mind this" in head
    assert "The machine was busy" not in render(run)


def test_a_run_of_nothing_is_a_page_all_the_same() -> None:
    page = render(Run(1, Result("none", {}, ()), {}))
    assert "This run has no rows that a bar is about" in page
    assert "no VM" in page


def test_the_page_is_one_small_file_that_loads_nothing(run: Run) -> None:
    page = render(run)
    assert len(page) < 2_000_000
    assert not re.search(r"<(?:link|script|img|iframe)[^>]*(?:src|href)\s*=\s*[\"'](?!data:)", page)
    assert "default-src 'none'" in page
    assert page.count("Permission to use, copy, modify") == 2, "the licences of what is in it"
    assert "&lt;b&gt;a &amp; processor&lt;/b&gt;" in page
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert "<" not in data[1]
    assert json.loads(data[1])["vm-vm-glance"]["stamp"] == "TCG · run 7 · quick"


@pytest.mark.parametrize(("value", "unit", "text"), [
    (0.0, "B/s", "0.00 B/s"), (999.0, "ns", "999 ns"), (1234.0, "ns", "1.23 us"), (5.94e6, "ns", "5.94 ms"),
    (2906.0, "us", "2.91 ms"), (0.25, "us", "250 ns"),
    (2e9, "ns", "2.00 s"), (4.66e9, "B/s", "4.66 GB/s"), (12.34, "%", "12.3 %"), (0.000345, "s", "0.000345 s"),
    (21000.0, "iops", "21.0 kIO/s"), (941.0, "Mbit/s", "941 Mbit/s"),
])
def test_figures_are_read_with_their_units(value: float, unit: str, text: str) -> None:
    assert words.figure(value, unit) == text
