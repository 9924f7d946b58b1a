"""Every run's rows and raw histograms, kept in one SQLite file from the first run on.

The file is `$IDC_TESTBED_DATA/bench.sqlite`, by default in `$XDG_DATA_HOME/idc-testbed` (`~/.local/share/idc-testbed`).
A run is written in one transaction when it is over, so one that was interrupted is not there at all. Depends on
sqlite3 and `testbed.bench.rows`.

    runs        id, started, accel, quick, facts (the JSON object without its rows)
    rows        run, number, name, path, domains, mode, api, size, unit, figure, row (the JSON of the row)
    histograms  run, number, encoding (see testbed.bench.histogram), data
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from testbed.bench.errors import StoreError
from testbed.bench.histogram import ENCODING, Histogram
from testbed.bench.rows import Result, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from testbed.bench.groups import Found

#: Kept in the file as its user_version.
VERSION: Final = 1
BUSY_SECONDS = 30.0
_TABLES = """
CREATE TABLE runs (id INTEGER PRIMARY KEY, started TEXT NOT NULL, accel TEXT NOT NULL, quick INTEGER NOT NULL,
                   facts TEXT NOT NULL);
CREATE TABLE rows (run INTEGER NOT NULL REFERENCES runs ON DELETE CASCADE, number INTEGER NOT NULL, name TEXT NOT NULL,
                   path TEXT NOT NULL, domains TEXT NOT NULL, mode TEXT, api TEXT NOT NULL, size INTEGER NOT NULL,
                   unit TEXT NOT NULL, figure REAL NOT NULL, row TEXT NOT NULL, PRIMARY KEY (run, number));
CREATE TABLE histograms (run INTEGER NOT NULL, number INTEGER NOT NULL, encoding TEXT NOT NULL, data BLOB NOT NULL,
                         PRIMARY KEY (run, number), FOREIGN KEY (run, number) REFERENCES rows ON DELETE CASCADE);
CREATE INDEX by_key ON rows (name, path, domains, mode, api, size);
"""


def default_path() -> Path:
    """Where the database is."""
    if given := os.environ.get("IDC_TESTBED_DATA"):
        return Path(given) / "bench.sqlite"
    home = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(home) / "idc-testbed" / "bench.sqlite"


@dataclass(frozen=True)
class Summary:
    """A run without its rows.

    Attributes:
        run: its number.
        result: the run, with no results.
        rows: how many it has.
        names: of its rows, in the order they were measured.
        domains: of its rows, likewise.
    """

    run: int
    result: Result
    rows: int
    names: tuple[str, ...]
    domains: tuple[str, ...]


class Store:
    """The database, made when it is not there, unless `make` is false. A context manager.

    Raises StoreError, here and in every method: it cannot be opened or written, is no database or a damaged one, or was
    written by a newer version of this program.
    """

    def __init__(self, path: Path | None = None, *, make: bool = True) -> None:
        self.path = path or default_path()
        if not make and not self.path.exists():
            raise StoreError(f"there is no {self.path}: nothing was measured yet",
                             hint="testbed bench --quick makes a first run; IDC_TESTBED_DATA names another directory")
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            with self._errors():
                self._check()
        except BaseException:
            self._database.close()
            raise

    def _check(self) -> None:
        self._database.execute("PRAGMA foreign_keys = ON")
        if self._database.execute("PRAGMA user_version").fetchone() == (VERSION,):
            return  # nothing to write: it may lie where nobody can
        with self._transaction():  # two first runs at the same time: one of them makes the tables
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise StoreError(f"{self.path} is of version {version}, this program knows {VERSION}",
                                 hint="use the newer program, or set IDC_TESTBED_DATA to another directory")
            if version == 0:
                if self._database.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                    raise StoreError(f"{self.path} is a database of something else",
                                     hint="set IDC_TESTBED_DATA to another directory")
                for statement in _TABLES.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {VERSION}")

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            hint = "" if isinstance(error, sqlite3.OperationalError) else \
                "move it away; the next run makes a new one"
            raise StoreError(f"{self.path}: {error}", hint=hint) from error
        except OSError as error:
            raise StoreError(f"{self.path}: {error.strerror}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def add(self, result: Result, found: Sequence[Found]) -> int:
        """Keep a run; `found` are its rows with their histograms. Returns its number."""
        facts = dataclasses.replace(result, results=()).as_json()
        with self._errors(), self._transaction():
            run = self._database.execute("INSERT INTO runs (started, accel, quick, facts) VALUES (?, ?, ?, ?)",
                                         (result.started, result.accel, result.quick, facts)).lastrowid
            assert run is not None
            for number, each in enumerate(found):
                row = each.row
                self._database.execute(
                    "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                    (run, number, row.name, row.path, row.domains, row.mode, row.api, row.size, row.unit, row.figure,
                     json.dumps(row.as_dict())))
                if each.histogram is not None:
                    self._database.execute("INSERT INTO histograms VALUES (?, ?, ?, ?)",
                                           (run, number, ENCODING, each.histogram.encoded()))
        return run

    def runs(self) -> list[int]:
        """Numbers of all runs, oldest first."""
        with self._errors():
            return [number for (number,) in self._database.execute("SELECT id FROM runs ORDER BY id")]

    def summaries(self) -> list[Summary]:
        """All runs, oldest first. Raises StoreError for one that is damaged."""
        with self._errors():
            runs = self._database.execute("SELECT id, facts FROM runs ORDER BY id").fetchall()
            rows = self._database.execute("SELECT run, name, domains, count(*) FROM rows GROUP BY run, name, domains "
                                          "ORDER BY run, min(number)").fetchall()
        found = []
        for run, facts in runs:
            mine = [(name, domains, count) for owner, name, domains, count in rows if owner == run]
            found.append(Summary(run, self._parse(facts, [], run),
                                 sum(count for _, _, count in mine), tuple(dict.fromkeys(name for name, _, _ in mine)),
                                 tuple(dict.fromkeys(domains for _, domains, _ in mine))))
        return found

    def result(self, run: int) -> Result:
        """A run as it was. Raises StoreError if there is none of that number."""
        with self._errors():
            facts = self._database.execute("SELECT facts FROM runs WHERE id = ?", (run,)).fetchone()
            rows = self._database.execute("SELECT row FROM rows WHERE run = ? ORDER BY number", (run,)).fetchall()
        if facts is None:
            raise StoreError(f"{self.path} holds no run {run}")
        return self._parse(facts[0], [row for (row,) in rows], run)

    def _parse(self, facts: str, rows: list[str], run: int) -> Result:
        try:
            whole: dict[str, Any] = json.loads(facts) | {"results": [json.loads(row) for row in rows]}
        except ValueError as error:
            raise StoreError(f"{self.path}: run {run} is damaged: {error}") from error
        return parse(json.dumps(whole), f"run {run} of {self.path}")

    def histogram(self, run: int, number: int) -> Histogram | None:
        """Of the row with that number in the run; None if it has a value instead. Raises StoreError: it is damaged."""
        with self._errors():
            found = self._database.execute("SELECT data FROM histograms WHERE run = ? AND number = ?",
                                           (run, number)).fetchone()
        if found is None:
            return None
        try:
            return Histogram.decode(found[0])
        except ValueError as error:
            raise StoreError(f"{self.path}: histogram {number} of run {run}: {error}") from error

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
