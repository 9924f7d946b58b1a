"""The fuzz target: ten seconds in every run, ten minutes in the soak, and proof that it finds what it is for."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from types import ModuleType

HERE = Path(__file__).parent
FEW_EDGES = 250  # a tenth of a minute reaches some 350; fewer means that the target has stopped working


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_run", HERE / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


fuzzing: Any = load()


def test_ten_seconds_find_nothing(tmp_path: Path) -> None:
    found = fuzzing.fuzz(10, tmp_path / "corpus")
    assert found.edges > FEW_EDGES, found


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_ten_minutes_find_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    corpus = HERE.parents[1] / "build" / "fuzz" / "corpus"  # kept: the next soak goes on from it
    found = fuzzing.fuzz(600, corpus)
    with capsys.disabled():
        fuzzing.report(found)
    assert found.lines["inner.h"] > 90
    assert found.lines["ring.c"] > 80


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("inner.h", "*len <= r->slot_size - SLOT_HEADER", "*len != 0"),
        ("inner.h", "if (seen - r->peer > most)", "if (seen - r->peer > 2 * most)"),
    ],
    ids=["length unchecked", "index unchecked"],
)
def test_a_missing_check_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str
) -> None:
    core = tmp_path / "core"
    shutil.copytree(fuzzing.CORE, core, ignore=shutil.ignore_patterns("__pycache__"))
    text = (core / file).read_text()
    assert old in text, f"{file} has changed: give this test the new wording"
    (core / file).write_text(text.replace(old, new))
    monkeypatch.setattr(fuzzing, "CORE", core)
    with pytest.raises(fuzzing.FuzzError, match=r"SUMMARY: (AddressSanitizer|UndefinedBehaviorSanitizer|libFuzzer)"):
        fuzzing.fuzz(60, tmp_path / "corpus")
