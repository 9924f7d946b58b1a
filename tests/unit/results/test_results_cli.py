"""`testbed results`: list, show, compare, export, over databases as users have them."""

import contextlib
import csv
import dataclasses
import io
import json
import sqlite3
from pathlib import Path

import pytest
from typer.testing import CliRunner

from testbed.bench.groups import Found
from testbed.bench.histogram import Histogram
from testbed.bench.rows import Result, Row
from testbed.bench.store import Store
from testbed.cli import build
from testbed.errors import TestbedError

#: A database of the first version, as it was written on the day that this was added; never to be changed.
OLD = Path(__file__).parent / "bench-v1.sql"
HOST = {"cpu": "one", "cpus": 2, "kernel": "6.1", "commit": "0123456789abcdef", "dirty": True, "qemu": "QEMU 7.2"}


def result(times: float = 1.0, accel: str = "tcg", session: str = "", turns: int = 5) -> Result:
    rounds = tuple(1000 * times + turn for turn in range(turns))
    rows = (Row("rtt", "ivshmem", "vm-vm", "poll", "core", 64, "ns", 99, p50=rounds[1], p90=rounds[2], p99=rounds[3],
                p999=rounds[4], max=rounds[4], rounds=rounds, cpu={"near": 1.5}),
            Row("stream", "tcp", "vm-vm", None, "core", 65536, "B/s", 5, value=2e9, rounds=(2e9,) * turns))
    return Result(accel, HOST, rows, started="2026-01-02T03:04:05+00:00", quick=bool(session), session=session)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("IDC_TESTBED_DATA", str(tmp_path))
    return tmp_path / "bench.sqlite"


def keep(*results: Result) -> None:
    histogram = Histogram()
    histogram.record([1000, 2000])
    with Store() as store:
        for each in results:
            store.add(each, [Found(row, histogram if row.unit == "ns" else None) for row in each.results])


def call(*words: str) -> str:
    done = CliRunner().invoke(build(), ["results", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def fails(*words: str) -> str:
    with pytest.raises(TestbedError) as caught:
        CliRunner().invoke(build(), ["results", *words], catch_exceptions=False)
    assert "\n" not in caught.value.message
    return f"{caught.value.message} [{caught.value.hint}]"


@pytest.mark.usefixtures("data")
def test_runs_are_listed_and_found_by_short_names() -> None:
    keep(result(), result(2.0))
    lines = call("list").splitlines()
    assert lines[0].split()[:2] == ["RUN", "STARTED"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]
    assert {"2026-01-02", "03:04", "0123456789+", "tcg", "full", "rtt", "stream", "vm-vm"} <= set(lines[1].split())
    assert [each["run"] for each in json.loads(call("list", "--json"))] == [1, 2]
    for name, number in (("latest", 2), ("latest~0", 2), ("latest~", 1), ("latest~1", 1), ("1", 1)):
        assert call("show", name).startswith(f"run {number}, started 2026-01-02 03:04 UTC")
        assert json.loads(call("show", name, "--json"))["run"] == number
    assert "round trips, 64 B, between two VMs" in call("show")


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(("name", "said"), [
    ("7", "there is no run 7 [`testbed results list` shows them; the last is 1]"),
    ("latest~1", "latest~1 is before the first run: there is 1 [`testbed results list` shows them]"),
    ("newest", "'newest' is no run [a number of `testbed results list`, latest, or latest~1 for the one before it]"),
    ("-1", ""), ("1e3", "'1e3' is no run"), ("", "'' is no run"), ("9" * 30, "is no run"),
])
def test_a_name_that_is_none_is_one_clear_line(name: str, said: str) -> None:
    keep(result())
    if name == "-1":  # an option, to any command line
        assert CliRunner().invoke(build(), ["results", "show", name]).exit_code == 2
    else:
        assert said in fails("show", name)


def test_nothing_measured_yet_is_said_and_nothing_made(data: Path) -> None:
    for words in (("list",), ("show",), ("compare", "1", "2"), ("export",)):
        assert "nothing was measured yet [testbed bench --quick makes a first run" in fails(*words)
    assert not data.exists()
    Store().close()
    assert "holds no runs" in fails("show")
    assert call("list").split()[0] == "RUN"


@pytest.mark.usefixtures("data")
def test_a_comparison_says_what_changed_and_what_that_is_worth() -> None:
    keep(result(), result(1.2), result(session="x", turns=12), result(1.2, session="x", turns=12))
    text = call("compare", "3", "4")
    assert text.startswith("run 4 (0123456789+) against run 3 (0123456789+)")
    assert "accelerator tcg; measured in turn" in text
    (changed,) = [line for line in text.splitlines() if line.lstrip().startswith("rtt")]
    assert "1.01 us" in changed
    assert "+19.9%" in changed
    assert changed.rstrip().endswith("worse")
    (same,) = [line for line in text.splitlines() if line.lstrip().startswith("stream")]
    assert same.rstrip().endswith("no difference")
    assert "1 of 2 rows differ: 0 better, 1 worse" in text
    assert "in at most 1% of comparisons (corrected for all rows" in text
    assert "measured apart: what else the machine did" in call("compare", "1", "2")
    found = json.loads(call("compare", "3", "4", "--json"))
    assert (found["first"], found["second"], found["paired"]) == (3, 4, True)
    assert [each["verdict"] for each in found["differences"]] == ["worse", "no difference"]
    assert found["correction"].startswith("Westfall-Young")


@pytest.mark.usefixtures("data")
def test_runs_under_other_accelerators_are_refused_or_every_line_warns() -> None:
    keep(result(), result(accel="kvm"))
    said = fails("compare", "1", "2")
    assert said.startswith("runs 1 and 2 cannot be compared, they differ in accelerator: tcg and kvm")
    assert "--anyway" in said
    text = call("compare", "1", "2", "--anyway")
    assert "warning: compared all the same, though they differ in accelerator: tcg and kvm" in text
    lines = [line for line in text.splitlines() if line.lstrip().startswith(("rtt ", "stream "))]
    assert len(lines) == 2
    assert all("NOT COMPARABLE (accelerator)" in line for line in lines)


@pytest.mark.usefixtures("data")
def test_runs_are_exported_for_other_programs(tmp_path: Path) -> None:
    keep(result(), result(2.0))
    one = json.loads(call("export"))
    assert (one["run"], one["accel"], len(one["results"])) == (2, "tcg", 2)
    assert [each["run"] for each in json.loads(call("export", "1", "latest"))] == [1, 2]
    assert call("export", "1", "2", "--format", "csv", "-o", str(tmp_path / "runs.csv")) == ""
    with (tmp_path / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4
    assert {line["accel"] for line in lines} == {"tcg"}
    first = lines[0]
    assert (first["run"], first["name"], first["p50"], first["value"]) == ("1", "rtt", "1001.0", "")
    assert json.loads(first["rounds"]) == [1000.0, 1001.0, 1002.0, 1003.0, 1004.0]
    assert json.loads(first["cpu"]) == {"near": 1.5}
    assert len(list(csv.reader(io.StringIO(call("export", "--format", "csv"))))) == 3
    assert CliRunner().invoke(build(), ["results", "export", "--format", "xml"]).exit_code == 2


def old(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(OLD.read_text())


def test_an_old_database_keeps_opening(data: Path) -> None:
    old(data)
    assert [line.split()[0] for line in call("list").splitlines()[1:]] == ["1", "2"]
    assert "round trips, 64 B, between two processes" in call("show", "1")
    assert "cannot tell" in call("compare", "1", "2")
    assert json.loads(call("export", "1"))["accel"] == "none"
    with Store() as store:
        histogram = store.histogram(1, 0)
        assert histogram is not None
        assert histogram.count == 1000
        store.add(result(), [Found(row, None) for row in result().results])
    assert len(call("list").splitlines()) == 4


def test_a_newer_database_is_refused_and_left_alone(data: Path) -> None:
    old(data)
    with contextlib.closing(sqlite3.connect(data)) as database:
        database.execute("PRAGMA user_version = 99")
    before = data.read_bytes()
    for words in (("list",), ("show",), ("compare", "1", "2"), ("export",)):
        assert "is of version 99, this program knows 1 [use the newer program" in fails(*words)
    assert data.read_bytes() == before


def test_a_database_that_nobody_may_write_can_be_read(data: Path) -> None:
    old(data)
    data.chmod(0o444)
    data.parent.chmod(0o555)
    try:
        assert len(call("list").splitlines()) == 3
    finally:
        data.parent.chmod(0o755)


def test_a_damaged_run_is_named(data: Path) -> None:
    old(data)
    with contextlib.closing(sqlite3.connect(data)) as database, database:
        database.execute("UPDATE runs SET facts = '{' WHERE id = 1")
    assert "run 1 is damaged" in fails("show", "1")
    assert call("show", "2").startswith("run 2")


def test_a_report_is_written_whole_and_where_it_was_asked_for(data: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    old(data)
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    done = runner.invoke(build(), ["report", "latest~1"], catch_exceptions=False)
    assert done.output.startswith("testbed-report-1.html: run 1, 0.")
    assert "run 1 (quick), commit 0123456789" in (tmp_path / "testbed-report-1.html").read_text()
    page = runner.invoke(build(), ["report", "-o", "-"], catch_exceptions=False).output
    assert page.startswith("<!DOCTYPE html>") or "<!DOCTYPE html>" in page[:200]
    assert "run 2 (quick)" in page
    for words, said in ((["-o", "/nowhere/a.html"], "-o /nowhere/a.html: /nowhere is no directory that"),
                        (["-o", str(tmp_path)], f"-o {tmp_path}: it is a directory"), (["9"], "there is no run 9")):
        with pytest.raises(TestbedError, match=said):
            runner.invoke(build(), ["report", *words], catch_exceptions=False)
    assert {path.name for path in tmp_path.iterdir()} == {"bench.sqlite", "testbed-report-1.html"}


def test_versions_measured_in_turn_are_reported_together(data: Path) -> None:
    base, this = (dataclasses.replace(result(times, session="x", turns=12), version=version)
                  for times, version in ((1.0, "base"), (1.2, "this")))
    keep(base, this)
    assert data.exists()
    for run in ("1", "2"):
        page = CliRunner().invoke(build(), ["report", run, "-o", "-"], catch_exceptions=False).output
        assert "Against another commit: this (0123456789+) against base (0123456789+)" in page
        assert "1 of 2 rows differ: 0 better, 1 worse" in page
