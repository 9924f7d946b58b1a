"""What a whole run of benchmarks is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from testbed.bench.baton import ALONE, Baton
from testbed.qemu_args import DEFAULT_QEMU

if TYPE_CHECKING:
    from testbed.accel import Wish
    from testbed.bench.places import Domains
    from testbed.progress import Steps


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        names: of `testbed.bench.names`.
        domains: where to measure.
        quick: touch each row only.
        steps: where progress is shown.
        accel: see `testbed.accel`.
        qemu: QEMU binary.
        baton: shared with a run that measures another version meanwhile.
    """

    names: tuple[str, ...]
    domains: frozenset[Domains]
    quick: bool
    steps: Steps
    accel: Wish = "auto"
    qemu: str = DEFAULT_QEMU
    baton: Baton = ALONE
