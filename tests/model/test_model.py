"""The ring protocol, model-checked: no lost wake-up, no torn, stale or foreign read, and each ordering is needed.

spin visits every state within the bounds; a search that was cut short fails. State counts are printed (pytest -s).
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

import pytest

from model.run import QUICK, SOAK, needed, plan
from model.spin import HERE, Model, ModelError, build, mutants, search

if TYPE_CHECKING:
    from pathlib import Path


def _check(model: Model, directory: Path, *, soak: bool) -> None:
    pan = build(model, directory)
    wrong: list[str] = []
    for mutant in plan(model, soak=soak):
        outcome = search(model, pan, mutant, timeout=3600 if soak else 120)
        verdict = outcome.error or "no error"
        sys.stdout.write(f"{model}: {mutant}: {outcome.states} states, {outcome.seconds} s: {verdict}\n")
        if bool(outcome.error) != needed(model, mutant):
            wrong.append(f"{mutant} ({mutant.text}): {verdict}")
    assert not wrong, f"{model}: verdicts that were not expected: {wrong}"


@pytest.mark.parametrize("model", QUICK, ids=str)
def test_protocol_holds_and_every_ordering_is_needed(model: Model, tmp_path: Path) -> None:
    _check(model, tmp_path, soak=False)


@pytest.mark.soak
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("model", SOAK, ids=str)
def test_protocol_holds_at_larger_bounds(model: Model, tmp_path: Path) -> None:
    _check(model, tmp_path, soak=True)


@pytest.mark.parametrize("file", ["message_ring", "byte_ring", "handshake"])
def test_every_named_ordering_is_used_and_has_a_mutant(file: str) -> None:
    source = (HERE / f"{file}.pml").read_text()
    known = mutants(file)
    assert len({mutant.number for mutant in known}) == len(known)
    for mutant in known:
        name = mutant.name.removesuffix("_ACQ_REL")
        assert len(re.findall(rf"\b{name}\b", source)) >= 2, f"{name} weakens nothing"


@pytest.mark.parametrize(
    ("model", "sign"),
    [(Model("message_ring", ("SLOTS=2", "ITEMS=4", "HIST=2")), "cut short"), (Model("no_such_model"), "failed")],
    ids=["history too short", "no source"],
)
def test_a_search_that_proves_nothing_is_an_error(model: Model, sign: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=sign):
        search(model, build(model, tmp_path))


def test_a_search_without_room_for_its_depth_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.spin.DEPTH", 50)
    model = Model("message_ring", ("SLOTS=2", "ITEMS=1"))
    with pytest.raises(ModelError, match="max search depth too small"):
        search(model, build(model, tmp_path))


