"""The database of results: whole runs or none, and one clear line for a file that is not it."""

import sqlite3
from pathlib import Path

import pytest

from testbed.bench import store as stores
from testbed.bench.errors import StoreError
from testbed.bench.groups import Found
from testbed.bench.histogram import Histogram
from testbed.bench.rows import Result, Row
from testbed.bench.store import Store


def found() -> list[Found]:
    histogram = Histogram()
    histogram.record(range(1, 1001))
    sampled = Row("rtt", "ivshmem", "process", "poll", "core", 64, "ns", 1000, p50=500, p90=900, p99=990, p999=999,
                  max=1000)
    valued = Row("stream", "limit", "process", "pipeline", "core", 65536, "B/s", 2, value=2.0, rounds=(1.0, 3.0))
    return [Found(sampled, histogram), Found(valued, None)]


def result() -> Result:
    return Result("none", {"cpu": "one"}, tuple(each.row for each in found()), started="2026-01-01T00:00:00+00:00")


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path / "new" / "bench.sqlite") as store:
        number = store.add(result(), found())
        assert store.result(number) == result()
        kept = store.histogram(number, 0)
        assert kept is not None
        assert kept.count == 1000
        assert store.histogram(number, 1) is None
    with Store(tmp_path / "new" / "bench.sqlite") as store:
        assert store.runs() == [number]
        with pytest.raises(StoreError, match="holds no run 99"):
            store.result(99)


def test_a_run_that_cannot_be_written_whole_is_not_there(tmp_path: Path) -> None:
    class Broken(Histogram):
        def encoded(self) -> bytes:
            raise KeyboardInterrupt

    half = [found()[0], Found(found()[0].row, Broken())]
    with Store(tmp_path / "bench.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            store.add(result(), half)
        assert store.runs() == []
        assert store.add(result(), found()) == 1


def newer(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {stores.VERSION + 1}")
    database.close()


def foreign(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE birds (name TEXT)")
    database.close()


def rubbish(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


def directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(("spoil", "said"), [
    (newer, "is of version 2, this program knows 1"), (foreign, "is a database of something else"),
    (rubbish, "not a database"), (directory, "unable to open"),
])
def test_a_file_that_is_not_ours_is_refused_and_left_alone(tmp_path: Path, spoil: object, said: str) -> None:
    path = tmp_path / "bench.sqlite"
    assert callable(spoil)
    spoil(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(StoreError, match=said) as caught:
        Store(path)
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_a_damaged_histogram_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bench.sqlite"
    with Store(path) as store:
        store.add(result(), found())
    with sqlite3.connect(path) as database:
        database.execute("UPDATE histograms SET data = x'00'")
    database.close()
    with Store(path) as store, pytest.raises(StoreError, match="histogram 0 of run 1"):
        store.histogram(1, 0)


def test_it_lies_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("IDC_TESTBED_DATA", raising=False)
    assert stores.default_path() == tmp_path / "idc-testbed" / "bench.sqlite"
    monkeypatch.setenv("IDC_TESTBED_DATA", str(tmp_path / "mine"))
    assert stores.default_path() == tmp_path / "mine" / "bench.sqlite"
