"""Declaring and finding device classes, their options, and the tutorial's page."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from device_support import EXAMPLES, install
from hypothesis import given
from hypothesis import strategies as st

from idc.device import BackDriver, DeviceClass, FrontDriver, Option, find, load
from idc.device import options as options_of
from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def installed(tmp_path: Path) -> Iterator[Path]:
    sys.path.insert(0, str(install(tmp_path / "site")))
    yield tmp_path / "site"
    sys.path.remove(str(tmp_path / "site"))


def test_the_tutorials_class_has_fewer_than_ten_statements() -> None:
    source = (EXAMPLES / "echo_device.py").read_text()
    statements = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)
                  and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    assert len(statements) < 10
    (block,) = re.findall(r"```python\n(from idc\.device.*?)```", (DOCS / "device-class.md").read_text(), re.DOTALL)
    assert ast.dump(ast.parse(block)) == ast.dump(ast.Module(ast.parse(source).body[1:], []))


def test_a_class_of_somebody_else_is_found(installed: Path) -> None:
    assert find("echo").name == "echo"
    assert {"echo", "ledger"} <= load().keys()
    channels, size = find("echo").plan("front", "back", {"times": 1})
    assert size & size - 1 == 0
    assert size >= 2 * channels[0].ring_bytes


def test_an_entry_point_that_cannot_be_loaded_is_named(installed: Path) -> None:
    points = next(installed.glob("*.dist-info")) / "entry_points.txt"
    points.write_text("[idc_testbed.devices]\ngone = no_such_module:X\nwrong = os:path\necho = ledger_device:Ledger\n")
    with pytest.raises(MisuseError, match=r"'gone' \(no_such_module:X\) cannot be loaded: ModuleNotFoundError"):
        find("gone")
    for name in ("wrong", "echo"):
        with pytest.raises(MisuseError, match=f"{name!r} .* is no device class of that name"):
            find(name)
    with pytest.raises(MisuseError, match=r"no device class 'eco' here \(there are: .*echo, .*gone, "):
        find("eco")


class Back(BackDriver):
    pass


def declare(**attributes: object) -> type[DeviceClass]:
    return type("Made", (DeviceClass,), {"name": "made", "back": Back} | attributes)


@pytest.mark.parametrize(("attributes", "error"), [
    ({"name": "Made"}, "'Made' is no name"), ({"name": "x" * 25}, "is no name"), ({"back": FrontDriver}, "BackDriver"),
    ({"front": Back}, "FrontDriver"), ({"options": {"x": 1}}, "no Option"),
    ({"options": {"X": Option(1, "")}}, "no name"),
    ({"options": {"x": Option(0, "", least=1)}}, "default of option x: 0 is less than 1"),
])
def test_a_class_that_makes_no_sense_is_refused_when_it_is_declared(attributes: dict[str, object], error: str) -> None:
    with pytest.raises(MisuseError, match=error):
        declare(**attributes)


def test_a_class_without_a_name_or_a_back_end_is_refused() -> None:
    with pytest.raises(MisuseError, match="does not say its name"):
        type("Made", (DeviceClass,), {"back": Back})
    with pytest.raises(MisuseError, match="does not say its back"):
        type("Made", (DeviceClass,), {"name": "made"})


OPTIONS = {"count": Option(3, "", least=0, most=10), "rate": Option(0.5, ""), "on": Option(False, ""),
           "path": Option("/x", ""), "mode": Option("a", "", choices=("a", "b"))}


@pytest.mark.parametrize(("given", "error"), [
    ({"count": 11}, "11 is more than 10"), ({"count": True}, "True is no int"), ({"count": "3"}, "'3' is no int"),
    ({"on": 1}, "1 is no bool"), ({"mode": "c"}, "none of a, b"), ({"coutn": 1}, "did you mean 'count'"),
    ({"path": "x" * 2000}, "2000 bytes"), ({"rate": "x"}, "'x' is no float"), ({"rate": None}, "None is no float")])
def test_values_that_are_none(given: dict[str, object], error: str) -> None:
    with pytest.raises(MisuseError, match=error):
        options_of.fill(OPTIONS, given, "device class x")


@pytest.mark.parametrize("given", [{"count": "x"}, {"count": "1.5"}, {"on": "maybe"}, {"rate": ""}, {"no": "1"}])
def test_texts_that_are_no_values(given: dict[str, str]) -> None:
    with pytest.raises(MisuseError):
        options_of.parse(OPTIONS, given, "device class x")


@given(st.fixed_dictionaries({"count": st.integers(0, 10), "rate": st.floats(allow_nan=False), "on": st.booleans(),
                              "path": st.text(max_size=50), "mode": st.sampled_from("ab")}))
def test_what_is_kept_as_text_comes_back(values: dict[str, options_of.Value]) -> None:
    texts = {name: options_of.text(value) for name, value in values.items()}
    assert options_of.parse(OPTIONS, texts, "x") == options_of.fill(OPTIONS, dict(values), "x") == values


def test_the_classes_that_come_with_this_tree_can_be_loaded() -> None:
    for name, kind in load().items():
        assert kind.name == name
