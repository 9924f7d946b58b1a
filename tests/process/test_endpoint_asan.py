"""A peer that writes random bytes over the whole region, under AddressSanitizer and between guard pages.

Its victim ends that connection with a reason within a second, serves its other connection meanwhile, and touches
nothing outside. A failure names its seed; IDC_SEED=n replays it (but for the scheduling of the processes).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sanitized
from region_support import running

from host.region import RegionSpec
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from collections.abc import Mapping

    from host.region import Region

VICTIM = Path(__file__).with_name("endpoint_victim.py")
#: Of a short run: each way of writing once, and more.
ROUNDS = 8
PAIR = {"front": Rights.RW, "back": Rights.RW}
MESSAGES = ChannelSpec("notes", Kind.MESSAGE, "front", "back", 64 * 1984, 1984)
BYTES = ChannelSpec("bulk", Kind.BYTE, "front", "back", 1 << 14)
PAGE_OF_BYTES = ChannelSpec("bulk", Kind.BYTE, "front", "back", 1 << 12)

#: One region with both channels and the members' parts behind them; and two regions that end where the ring ends from
#: which the victim reads, so that the first step beyond it is one into the guard page.
ROOMY = {"both": RegionSpec("both", 1 << 19, PAIR, [MESSAGES, BYTES])}
TIGHT = {"notes": RegionSpec("notes", 1 << 18, PAIR, [MESSAGES]),
         "bulk": RegionSpec("bulk", 1 << 14, PAIR, [PAGE_OF_BYTES])}


def attack(env: Mapping[str, str], specs: Mapping[str, RegionSpec], rounds: int, seed: int, log: Path,
           *ways: str) -> tuple[int, str]:
    with running() as service:
        regions = {name: service.create(spec) for name, spec in specs.items()}
        good = service.create(RegionSpec("good", 1 << 18, PAIR, [MESSAGES]))

        def ends(region: Region, channel: str) -> list[str]:
            return [f"{region.socket(member)}/{channel}" for member in ("front", "back")]

        both = regions.get("both")
        places = {"good": ends(good, "notes"), "notes": ends(both or regions["notes"], "notes"),
                  "bulk": ends(both or regions["bulk"], "bulk")}
        output = log.with_suffix(".out")
        with output.open("w") as out:
            victim = subprocess.Popen([sys.executable, str(VICTIM), str(seed), str(rounds), str(log),
                                       json.dumps(places), *ways],
                                      stdout=out, stderr=out, env=env, start_new_session=True)
            try:
                code = victim.wait(60 + 5 * rounds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(victim.pid, signal.SIGKILL)
        return code, output.read_text()


def chosen(default: int) -> int:
    """The seed: of the environment, to replay one."""
    return int(os.environ.get("IDC_SEED", default))


SPECS = pytest.mark.parametrize("specs", [ROOMY, TIGHT], ids=["roomy", "tight"])


def test_the_tight_regions_end_where_their_rings_do() -> None:
    for spec in TIGHT.values():
        entry = spec.plan().channels[0]
        assert entry.data_ba + entry.ring_bytes == spec.size


@SPECS
def test_random_bytes_everywhere(sanitized_core: dict[str, str], specs: Mapping[str, RegionSpec],
                                 tmp_path: Path) -> None:
    seed = chosen(20261125)
    code, said = attack(sanitized_core, specs, ROUNDS, seed, tmp_path / "log")
    sys.stdout.write(f"seed {seed}\n{said}")
    assert code == 0, f"seed {seed}\n{said}"
    assert said.count("honest answers meanwhile") == ROUNDS


@pytest.mark.soak
@SPECS
def test_random_bytes_for_long(sanitized_core: dict[str, str], specs: Mapping[str, RegionSpec],
                               tmp_path: Path) -> None:
    seed = chosen(int.from_bytes(os.urandom(4), "little"))
    sys.stdout.write(f"seed {seed}\n")
    code, said = attack(sanitized_core, specs, 50 * ROUNDS, seed, tmp_path / "log")
    assert code == 0, f"seed {seed}\n{said[-6000:]}"


@pytest.fixture
def careless(tmp_path: Path) -> dict[str, str]:
    """A core that believes the length in a slot."""
    return sanitized.build(tmp_path / "tree", edit=("inner.h", "*len <= r->slot_size - SLOT_HEADER", "*len != 0"))


def test_a_missing_check_is_seen(careless: dict[str, str], tmp_path: Path) -> None:
    code, said = attack(careless, TIGHT, 40, 1, tmp_path / "log", "forge")
    assert code == sanitized.EXIT_CODE, said
    assert "AddressSanitizer: SEGV on unknown address" in said  # in the guard page: no other part of memory is fenced
