"""Builds the Promela models next to this file and runs spin's exhaustive search on them, one mutant at a time.

Needs `spin` and `gcc` in the path; imports the standard library only.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
DEPTH: Final = 200_000

_MUTANT = re.compile(
    r"^#define (?P<name>\w+) (?P<number>\d+)\s*/\* (?P<kind>release|acquire|fence|steps)(?P<redundant>, redundant)?:"
    r" (?P<text>.*?)(?: \| \w+)? \*/$",
    re.MULTILINE,
)


class ModelError(Exception):
    """A run that says nothing about the protocol: a tool failed, or a bound of the search was too small."""


@dataclasses.dataclass(frozen=True)
class Model:
    """One model with its bounds.

    Args:
        file: Promela source next to this module, without its suffix.
        bounds: macros given to spin, as SLOTS and ITEMS.
        own_end: the model judges its end states itself (a monitor), so spin's rule about them is off.
        ends: search for cycles instead. The models have no endless polling, so a good one has none: every run ends,
            whatever the scheduler does.
        memory_mb: limit of the search; reaching it is an error.
    """

    file: str
    bounds: tuple[str, ...] = ()
    own_end: bool = False
    ends: bool = False
    memory_mb: int = 3000

    def __str__(self) -> str:
        return " ".join((self.file, *self.bounds, *(["ends"] if self.ends else [])))


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One weakening: an ordering made relaxed, a fence left out (or made acquire-release), or a step changed."""

    name: str
    number: int
    kind: str
    text: str
    redundant: bool

    def __str__(self) -> str:
        return self.name


NONE: Final = Mutant("none", 0, "steps", "the protocol as it is", redundant=True)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished search found. `error` is spin's own words, or "" if every state is good."""

    error: str
    states: int
    depth: int
    seconds: float


def mutants(file: str) -> list[Mutant]:
    """Every mutant that the source declares; a fence counts twice, removed and as a mere acquire-release fence."""
    found: list[Mutant] = []
    for match in _MUTANT.finditer((HERE / f"{file}.pml").read_text()):
        name, number, kind, text = match["name"], int(match["number"]), match["kind"], match["text"]
        redundant = match["redundant"] is not None
        found.append(Mutant(name, number, kind, text, redundant))
        if kind == "fence":
            found.append(Mutant(f"{name}_ACQ_REL", number + 100, kind, text, redundant))
    return found


def build(model: Model, directory: Path) -> Path:
    """Compile the search program of `model` in the empty `directory` and return its path."""
    for tool, package in (("spin", "spin"), ("gcc", "gcc")):
        if shutil.which(tool) is None:
            raise ModelError(f"{tool} is not installed; try: apt-get install {package}")
    for source in HERE.glob("*.pml"):
        shutil.copy(source, directory)
    _tool(["spin", "-a", *(f"-D{bound}" for bound in model.bounds), f"{model.file}.pml"], directory)
    limits = ["-DNP" if model.ends else "-DSAFETY", "-DCOLLAPSE", "-DVECTORSZ=4096", f"-DMEMLIM={model.memory_mb}"]
    _tool(["gcc", "-O1", "-w", *limits, "-o", "pan", "pan.c"], directory)
    return directory / "pan"


def _tool(command: list[str], directory: Path) -> None:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0 or "Error" in done.stdout:
        raise ModelError(f"{' '.join(command)} failed in {directory}:\n{done.stdout}{done.stderr}")


def search(model: Model, pan: Path, mutant: Mutant = NONE, *, timeout: float = 300) -> Outcome:
    """Visit every state of `model` under `mutant`, or stop at the first error.

    Raises ModelError if the search was cut short (depth, memory, time, the model's own bounds): then it proves nothing.
    """
    modes = [*(["-E"] if model.own_end else []), *(["-l"] if model.ends else [])]
    command = [str(pan), f"-m{DEPTH}", "-w22", "-n", *modes]
    started = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=pan.parent, env={**os.environ, "MUTANT": str(mutant.number)}, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise ModelError(f"{model}, mutant {mutant}: not done after {timeout:g} s; make its bounds smaller") from late
    report = done.stdout + done.stderr
    counts = re.search(r"depth reached (\d+), errors: (\d+)\s+(\S+) states, stored", report)
    if done.returncode != 0 or counts is None:
        raise ModelError(f"{model}, mutant {mutant}: the search failed ({done.returncode}):\n{report}")
    for sign in ("max search depth too small", "out of memory", "reached -DMEMLIM", "assertion violated ((last["):
        if sign in report:
            raise ModelError(f"{model}, mutant {mutant}: the search was cut short ({sign}):\n{report}")
    error = re.search(r"^pan:\d+: (.*?)(?: \(at depth \d+\))?$", report, re.MULTILINE)
    if (error is None) != (counts[2] == "0") or (error is None and "Search not completed" in report):
        raise ModelError(f"{model}, mutant {mutant}: unclear verdict:\n{report}")
    if error is not None and "<8)" in error[1]:
        raise ModelError(f"{model}, mutant {mutant}: ran out of epochs before it showed anything:\n{report}")
    return Outcome(
        error[1] if error else "", round(float(counts[3])), int(counts[1]), round(time.monotonic() - started, 2)
    )
