"""Keeps docs/faults.md and the how-to of modules honest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from idc._core import lib
from idc.faults import Point
from images import ImageError
from images.external import module_sources

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| `(\w+)` \| (producer|consumer|attaching|closing) \|", re.MULTILINE)


def test_every_point_is_told_with_its_side() -> None:
    told = dict(ROW.findall((ROOT / "docs" / "faults.md").read_text()))
    assert set(told) == {point.name.lower() for point in Point}
    for point in Point:
        if point < Point.CLEARED:
            assert told[point.name.lower()] == ("producer" if point % 2 else "consumer")


def test_the_core_numbers_the_points_as_python_does() -> None:
    for name, point in (("COPIED", Point.COPIED), ("STORED", Point.PUBLISHED), ("RINGING", Point.RINGING_DATA),
                        ("ARMED", Point.ARMED_SPACE), ("ASLEEP", Point.ASLEEP_SPACE), ("WOKEN", Point.WOKEN_SPACE)):
        assert getattr(lib, f"IDC_AT_{name}") == point
    assert lib.IDC_CONSUMER - lib.IDC_PRODUCER == 1


def test_a_modules_sources_are_what_a_build_did_not_leave(tmp_path: Path) -> None:
    left = ("a.o", "a.ko", "a.mod", "a.mod.c", ".a.o.cmd", ".git/config", "modules.order")
    for name in ("Kbuild", "a.c", "sub/b.h", *left):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert [entry.path for entry in module_sources(tmp_path)] == ["build/Kbuild", "build/a.c", "build/sub/b.h"]


def test_a_home_directory_is_no_module(tmp_path: Path) -> None:
    (tmp_path / "Makefile").touch()
    with (tmp_path / "big").open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(ImageError, match="holds 100 MB of files"):
        module_sources(tmp_path)
