"""The example of docs/trace.md runs, and its tables are those of the code."""

import os
import re
import subprocess
import sys
from pathlib import Path

from trace_support import check_perfetto

from idc.trace import events
from idc.trace.store import DIRECTORY, MAGIC

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "trace.md").read_text()


def test_the_example_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False,
                         env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert (run.returncode, run.stderr, run.stdout) == (0, "", "1 arrow\n")
    checked = check_perfetto(tmp_path / "echo.pftrace")
    assert list(checked.processes.values()) == ["here"]
    assert len(checked.arrows()) == 1
    assert "answering" in [name for _, _, name, _ in checked.begins]


def test_the_tables_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d+) \| (\d) \| `(\w+)` \|", TEXT, re.MULTILINE)
    assert [name for _, _, name in rows] == ["time", "flow", "sequence", "lane", "type", "kind", "length", "name",
                                             "detail", "value"]
    at = 0
    for offset, size, _ in rows:
        assert int(offset) == at
        at += int(size)
    assert at == events.HEADER_BYTES
    named: dict[int, str] = {}
    for numbers, names in re.findall(r"^\| ([\d, ]+) \| ([A-Z, ]+) \|", TEXT, re.MULTILINE):
        named.update(zip(map(int, numbers.split(", ")), names.split(", "), strict=True))
    assert named == {int(kind): kind.name for kind in events.Kind}
    assert MAGIC.decode() in TEXT
    assert DIRECTORY in TEXT
