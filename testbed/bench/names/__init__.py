"""The names of `testbed bench`: each module here is one, and brings BENCH. A new one is a new file."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.accel import Verdict
    from testbed.bench.groups import Found, Group, Pace
    from testbed.bench.places import Place
    from testbed.bench.setting import Setting


@dataclass(frozen=True)
class Alone:
    """What a name that measures by itself has found.

    Attributes:
        verdict: of the accelerator.
        found: rows.
        facts: of the VMs, for the result's `host`.
    """

    verdict: Verdict
    found: list[Found]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """One name.

    Attributes:
        name: what `testbed bench` calls it.
        help: one line.
        groups: what is measured at a place; None if it needs none.
        alone: measures by itself, in VMs of which it returns the accelerator and the facts (`facts.of_testbed`; none if
            there is nothing to be said beyond the host's); None if it is all groups.
        default: whether `testbed bench` without names runs it.
        order: those with less come first.
    """

    name: str
    help: str
    groups: Callable[[Place, Pace], list[Group]] | None = None
    alone: Callable[[Setting, Pace], Alone] | None = None
    default: bool = True
    order: int = 50


def load() -> dict[str, Bench]:
    """All names, in their order."""
    found: list[Bench] = [importlib.import_module(f"{__name__}.{module.name}").BENCH
                          for module in pkgutil.iter_modules(__path__)]
    return {bench.name: bench for bench in sorted(found, key=lambda bench: (bench.order, bench.name))}
