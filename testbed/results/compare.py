"""Two runs against each other, row by row: `compare(first, second)`. Pure; depends on numpy and
`testbed.bench.rows`.

Of two versions whose turns were alternated (`bench --against`) each turn is compared with its neighbour, and within it
each take with its own. Other runs were measured apart, and what the machine did meanwhile is in every difference; the
comparison says so.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from testbed.results import permutation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.bench.rows import Result, Row
    from testbed.results.permutation import Floats, Tested

#: Chance that a comparison of two equals calls any difference at all.
LEVEL: Final = 0.01
#: Differences below this are not called. Where code and memory come to lie moves figures by as much with no change to
#: the code (Mytkowicz et al., "Producing wrong data without doing anything obviously wrong!", 2009).
LEAST: Final = 0.03
#: What ought to be found; a row whose noise is above it says so.
WANTED: Final = 0.10

Kind = Literal["better", "worse", "no difference", "cannot tell"]
#: What makes two rows the same row.
_KEY = ("name", "path", "domains", "mode", "api", "size", "unit", "outstanding", "strategy", "route", "touched", "op",
        "depth")  # fmt: skip
#: Units of which less is better.
_LESS = frozenset({"ns", "us", "ms", "s", "MB", "%"})

#: What must be equal for two runs to be comparable at all, by the word for it; and what for rows that VMs took part in.
_HOST = ("host_id", "cpu", "cpus", "memory_mib", "machine", "kernel", "hypervisor")
_OPTIONS = ("pinning", "python")
_VM_OPTIONS = ("mapping", "network", "netdev", "mtu", "offloads")
_GUEST = ("guest_kernel", "guest_python", "guest_cpu")


@dataclass(frozen=True)
class Difference:
    """What two runs say of one row.

    Attributes:
        row: of the second run.
        first, second: the figures, in the row's unit.
        kind: "better" and "worse" are of the second; "cannot tell": so few turns can show nothing, whatever they are.
        change: the second figure by the first, less 1: of turns that alternated the median of the ratios of neighbours,
            which is not the ratio of the two figures; else that of the medians of the turns.
        low, high: where 95 of 100 bootstrap samples have it.
        noise: what equals show against each other, at most, in 95 of 100 comparisons.
        chance: probability of such a difference in any row of the comparison, were there none.
        turns: of the first and of the second.
    """

    row: Row
    first: float
    second: float
    kind: Kind
    change: float
    low: float
    high: float
    noise: float
    chance: float
    turns: tuple[int, int]

    @property
    def blind(self) -> bool:
        """Whether a difference of a tenth would be lost in the noise."""
        return self.kind == "no difference" and self.noise > WANTED


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        paired: whether their turns were alternated.
        differences: of the rows that both have.
        conditions: what differs between the runs that must not; empty unless they were compared all the same.
        only: how many rows only the first and only the second has.
        skipped: rows that cannot be compared, and why.
        level, least: see LEVEL and LEAST.
    """

    paired: bool
    differences: tuple[Difference, ...]
    conditions: tuple[str, ...] = ()
    only: tuple[int, int] = (0, 0)
    skipped: tuple[str, ...] = ()
    level: float = LEVEL
    least: float = LEAST

    def of_kind(self, *kinds: Kind) -> list[Difference]:
        """Those of these kinds."""
        return [each for each in self.differences if each.kind in kinds]

    def as_dict(self) -> dict[str, Any]:
        """For JSON. What has no bound is null."""
        found = []
        for each in self.differences:
            key = {name: getattr(each.row, name) for name in _KEY}
            numbers = {name: value if math.isfinite(value := getattr(each, name)) else None
                       for name in ("first", "second", "change", "low", "high", "noise", "chance")}
            found.append(key | numbers | {"verdict": each.kind, "turns": list(each.turns)})
        return {"paired": self.paired, "level": self.level, "least": self.least, "rows": len(self.differences),
                "correction": "Westfall-Young single-step maxT over all rows", "conditions": list(self.conditions),
                "only": list(self.only), "skipped": list(self.skipped), "differences": found}  # fmt: skip


def key(row: Row) -> tuple[object, ...]:
    """What makes it this row and no other."""
    return tuple(getattr(row, name) for name in _KEY)


def conditions(first: Result, second: Result) -> list[str]:
    """What the two were measured under that differs and must not, one phrase each; only what their common rows need."""
    common = {key(row) for row in first.results} & {key(row) for row in second.results}
    virtual = any(domains != "process" for _, _, domains, *_ in common)
    found = []
    if virtual and first.accel != second.accel:
        found.append(f"accelerator: {first.accel} and {second.accel}")
    groups = {"host": _HOST, "options": _OPTIONS}
    if virtual:
        groups |= {"options": (*_OPTIONS, *_VM_OPTIONS), "QEMU": ("qemu",), "guest": _GUEST}
    for word, names in groups.items():
        for name in names:
            one, two = first.host.get(name), second.host.get(name)
            # A run from before this program noted it says nothing of it.
            if one != two and not (name == "host_id" and not (one and two)):
                found.append(f"{word} ({name}): {_said(one)} and {_said(two)}")
    if first.quick != second.quick and not (first.session and second.session):
        found.append(f"options (quick): {_yes(first.quick)} and {_yes(second.quick)}")
    if bool(first.session) != bool(second.session):
        one, two = ("a run of many turns" if each.session else "a single run" for each in (first, second))
        found.append(f"options (turns): {one} and {two}")
    return found


def _said(value: object) -> str:
    return "unknown" if value in (None, "") else str(value)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def compare(first: Result, second: Result) -> Comparison:
    """The second against the first. Whether they may be compared is for `conditions` to say, and for the caller."""
    mine, theirs = ({key(row): row for row in result.results} for result in (first, second))
    pairs, skipped = [], []
    for which, row in mine.items():
        if (other := theirs.get(which)) is None:
            continue
        if min(itertools.chain(_rounds(row), _rounds(other), *row.takes, *other.takes)) <= 0:
            skipped.append(f"{row.name} {row.path} {row.domains}: a figure that is not above 0 has no ratio")
        else:
            pairs.append((row, other))
    paired = bool(first.session) and first.session == second.session
    return Comparison(paired, tuple(_differences(pairs, paired=paired)), tuple(conditions(first, second)),
                      (len(mine.keys() - theirs.keys()), len(theirs.keys() - mine.keys())), tuple(skipped))


def _rounds(row: Row) -> tuple[float, ...]:
    """By turn; a row from before rounds were kept has its figure."""
    return row.rounds or (row.figure,)


def _differences(pairs: list[tuple[Row, Row]], *, paired: bool) -> list[Difference]:
    """Rows with as many turns are tested together. If there are several such lots, each has its part of the level."""
    lots: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (row, other) in enumerate(pairs):
        lots[len(_rounds(row)), len(_rounds(other))].append(index)
    found: dict[int, Difference] = {}
    for turns, indexes in lots.items():
        first, second = (_logs([_rounds(pairs[index][side]) for index in indexes]) for side in (0, 1))
        if paired and turns[0] == turns[1]:
            tested, (effect, low, high), noise = _paired(np.stack([_steps(*pairs[index]) for index in indexes], axis=1))
        else:
            tested, (effect, low, high), noise = _apart(first, second)
        for at, index in enumerate(indexes):
            row, other = pairs[index]
            chance = min(1.0, float(tested.among[at]) * len(lots))
            one, two = (math.exp(float(np.median(side[:, at]))) for side in (first, second))
            change, least, most, floor = (math.expm1(float(each[at])) for each in (effect, low, high, noise))
            blank = Difference(other, one, two, "cannot tell", change, least, most, floor, chance, turns)
            found[index] = dataclasses.replace(blank, kind=_kind(blank, tested.least * len(lots)))
    return [found[index] for index in sorted(found)]


def _logs(figures: Sequence[tuple[float, ...]]) -> Floats:
    return np.log(np.array(figures, dtype=np.float64)).T


def _steps(row: Row, other: Row) -> Floats:
    """By turn, the logarithm of how many times the first's figure the second's is."""
    counts = {len(takes) for takes in (*row.takes, *other.takes)}
    if len(counts) == 1 and counts != {0} and len(row.takes) == len(other.takes) == len(_rounds(row)):
        return permutation.step(_logs(row.takes).T, _logs(other.takes).T)
    first, second = _logs([_rounds(row), _rounds(other)]).T
    return np.asarray(second - first)


def _paired(differences: Floats) -> tuple[Tested, tuple[Floats, Floats, Floats], Floats]:
    return (permutation.paired(differences), permutation.effect_paired(differences),
            permutation.noise_paired(differences))


def _apart(first: Floats, second: Floats) -> tuple[Tested, tuple[Floats, Floats, Floats], Floats]:
    return (permutation.apart(first, second), permutation.effect_apart(first, second),
            permutation.noise_apart(first, len(second)))


def _kind(found: Difference, least_chance: float) -> Kind:
    """A difference is called if it is not chance, more than the noise, and large enough to be the code's."""
    if least_chance > LEVEL:
        return "cannot tell"
    effect = math.log1p(found.change)
    size = abs(effect)  # as a logarithm: a half and a double are equally far
    if found.chance > LEVEL or size <= math.log1p(found.noise) or size < math.log1p(LEAST):
        return "no difference"
    return "better" if (effect < 0) == (found.row.unit in _LESS) else "worse"


def turns_needed(level: float = LEVEL) -> int:
    """Fewest alternated turns that can show anything."""
    return math.ceil(math.log2(2 / level))
