"""Counters in a file: whole, kept up to date, gone with the driver; and no file is no harm."""

import json
import logging
from pathlib import Path

import pytest

from idc.device import tally
from idc.device.tally import Tally


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "EVERY", 0.0)


def test_what_has_changed_is_written_and_goes_with_the_driver(tmp_path: Path) -> None:
    counters = {"requests": 1}
    path = tmp_path / "run" / "block-0.json"
    left = Tally(path, lambda: counters)
    left.look()
    assert json.loads(path.read_text()) == {"requests": 1}
    written = path.stat().st_ino
    left.look()
    assert path.stat().st_ino == written, "written anew though nothing has changed"
    counters["requests"] = 2
    left.look()
    assert json.loads(path.read_text()) == {"requests": 2}
    left.remove()
    assert list(path.parent.iterdir()) == []
    left.remove()


def test_a_device_goes_on_where_they_cannot_be_written_and_says_so_once(
        tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("no directory")
    counters = {"requests": 0}
    left = Tally(tmp_path / "run" / "block-0.json", lambda: counters)
    with caplog.at_level(logging.WARNING, "idc.device"):
        for counters["requests"] in range(3):
            left.look()
        assert len(caplog.records) == 1
        assert "counters cannot be left in" in caplog.text
        (tmp_path / "run").unlink()
        counters["requests"] = 4
        left.look()
    assert json.loads((tmp_path / "run" / "block-0.json").read_text()) == {"requests": 4}
    assert len(caplog.records) == 1
