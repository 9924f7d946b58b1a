"""What a result knows of its machine: others' load, cores that are shared, whether the tree is its commit's."""

from __future__ import annotations

import io
import subprocess
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from testbed.bench import facts
from testbed.bench.rows import Result
from testbed.bench.show import show

if TYPE_CHECKING:
    from pathlib import Path


def test_what_a_hypervisor_had_is_a_share_of_all_time_in_the_run(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    monkeypatch.setattr(facts, "_STAT", stat)
    # user nice system idle iowait irq softirq steal guest guest_nice: the last two are in the first two
    stat.write_text("cpu  1000 0 500 8000 0 0 100 400 900 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    meanwhile = facts.Meanwhile()
    stat.write_text("cpu  1100 0 550 8400 0 0 100 450 1800 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    found = meanwhile.facts()
    assert found["steal"] == pytest.approx(50 / 600, abs=1e-4)
    assert found["load_after"] >= 0
    assert facts.Meanwhile().facts()["steal"] == 0.0


@pytest.mark.parametrize(("lists", "shared"), [(("0,4", "1,5"), False), (("0-1", "0-1"), True), (("", ""), False)])
def test_ends_that_share_a_core_are_said_to(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lists: tuple[str, str], shared: bool) -> None:
    monkeypatch.setattr(facts, "_CPUS", tmp_path)
    monkeypatch.setattr(facts, "places_for_each", lambda: (0, 1))
    for cpu, text in enumerate(lists):
        if text:
            (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
            (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{text}\n")
    assert facts.siblings() == ({"near": lists[0], "far": lists[1]} if lists[0] else {})
    assert ("one core's two threads" in facts._pinning()) is shared
    monkeypatch.setattr(facts, "places_for_each", lambda: (None, None))
    assert (facts.siblings(), facts._pinning()) == ({}, "none")


def test_a_new_source_is_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)

    monkeypatch.setattr(facts, "ROOT", tmp_path)
    git("init")
    (tmp_path / "testbed").mkdir()
    (tmp_path / "testbed/old.py").write_text("")
    (tmp_path / ".gitignore").write_text("made.c\n")
    git("add", ".")
    git("commit", "-m", "a")
    for name in ("out.json", "made.c", "testbed/made.c", "testbed/note.txt", "elsewhere.py"):
        (tmp_path / name).write_text("")
    assert facts.commit()["dirty"] is False
    (tmp_path / "testbed/names").mkdir()
    (tmp_path / "testbed/names/mine.py").write_text("")
    assert facts.commit()["dirty"] is True
    (tmp_path / "testbed/names/mine.py").unlink()
    (tmp_path / "testbed/old.py").write_text("# changed\n")
    assert facts.commit()["dirty"] is True


def test_stolen_time_is_said_where_it_matters() -> None:
    for steal, said in ((0.004, False), (0.031, True)):
        out = io.StringIO()
        show(Result("none", {"cpus": 2, "steal": steal, "vhost": "off: none"}, ()), Console(file=out, width=200))
        assert ("a hypervisor had 3.1% of the processors' time" in out.getvalue()) is said
        assert "vhost: off: none" in out.getvalue()
