"""A hostile guest beside an honest pair, in real VMs: it asks for what is others', forges references, floods the
registry, writes garbage over its control link, and rings at full rate. It is refused, held up or dropped, and the pair
is served.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
from device_support import install

from idc.registry import Registry
from idc.transport.address import open_port
from testbed.bed import Testbed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.calls import Process

LIMIT = 120.0
#: What a read of the registry may take beside a hostile guest, by what it takes beside one that spins. Wanted is 2; it
#: is more at times where three VMs and the host share two CPUs, see docs/registry.md. What this guards against is a
#: guest that starves others, which would be hundreds of times.
GUARD = 5

# Asks for what is others', by key, by region and by reference; prints what it was told.
ASK = """
import json, sys
from guest.ivshmem import RegionNotFoundError, open_region
from idc.domain import Domain
from idc.endpoint import State
from idc.endpoint.together import drive
from idc.errors import DeniedError
from idc.registry import Registry
from idc.remote import Access, Refusal

told = {"denied": 0, "regions": [], "codes": []}
with Registry.here(timeout=60) as registry:
    for path in sys.argv[2:]:
        for what in (lambda: registry.read(path), lambda: registry.write(path, "mine"), lambda: registry.rm(path),
                     lambda: registry.list(path)):
            try:
                what()
            except DeniedError:
                told["denied"] += 1
for name in ("control-front", "control-back", sys.argv[1]):
    try:
        open_region(name, 0)
    except RegionNotFoundError:
        told["regions"].append(name)
domain = Domain.here()
exports = domain.share()
control = domain.control
while control.endpoint.state is not State.CONNECTED:
    drive([control.endpoint])
genuine = bytes.fromhex(sys.stdin.readline())
for forged in (bytes(len(genuine)), genuine[:-1] + bytes([genuine[-1] ^ 1]), b"x" * 72, genuine):
    done = []
    control.copy(forged, genuine, 64, done.append)
    while not done:
        drive([control.endpoint])
    told["codes"].append(Refusal(done[0].error).name)
print(json.dumps(told))
"""

# What it does on demand, each until the next letter: spin, flood the registry, write over its control link and ring.
ACT = """
import os, random, select, sys
from guest.ivshmem import open_region
from idc.endpoint import Result
from idc.errors import IdcError
from idc.registry import Registry
from idc.registry.frames import Op, Request

def told():
    return bool(select.select([0], [], [], 0)[0])

def spin():
    while not told():
        sum(range(1000))

def flood():
    with Registry.here(timeout=60) as registry:
        count = 0

        def again(completion):
            nonlocal count
            count += 1
            submit()

        def submit():
            path = f"{registry.home}/n{count % 2000}"
            registry.submit([Request(Op.WRITE, path, rest=bytes(2000)), Request(Op.READ, "/domain/front/secret"),
                             Request(Op.LIST, registry.home), Request(Op.BEGIN)][count % 4], again)

        while not told():
            try:
                for _ in range(16):
                    submit()
            except IdcError:
                pass
            registry.pump(0.1)
    print(count, flush=True)

def garbage():
    chance = random.Random(1)
    region = open_region("control-rogue")
    bells = [region.bell(member.id, vector) for member in region.header.members if member.id != region.member
             for vector in range(region.header.vectors)]
    size = len(region.memory)
    while not told():
        at = chance.randrange(size - 256)
        region.memory[at:at + 256] = chance.randbytes(256)
        for bell in bells:
            for _ in range(20):
                bell.ring()

while act := {b"s": spin, b"f": flood, b"g": garbage}.get(sys.stdin.buffer.raw.read(1)):
    print("begun", flush=True)
    child = os.fork()
    if not child:
        act()
        os._exit(0)  # closes nothing in order
    assert os.waitpid(child, 0)[1] == 0
    sys.stdin.buffer.raw.read(1)
    print("over", flush=True)
"""

# The honest pair: one transaction after the other until told to stop.
PAIR = """
import select, sys
from idc.domain import Service
from idc.endpoint.blocking import Caller
from idc.transport.address import open_port
count = 0
with Caller(open_port("unix:/run/idc/ledger-0"), Service("ledger").resources()) as program:
    while not select.select([0], [], [], 0)[0]:
        count += 1
        assert program.transact(b"%d" % count, timeout=60) == b"%d noted" % count
print(count)
"""


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    classes = install(tmp_path_factory.mktemp("site") / "classes")
    sys.path.insert(0, str(classes))
    try:
        with Testbed(keep="never", broker=True) as bed:
            bed.boot("front", "back", "rogue")
            bed.devices.attach("ledger", "front", "back", wait=LIMIT)
            yield bed
    finally:
        sys.path.remove(str(classes))


@pytest.fixture
def host(bed: Testbed) -> Iterator[Registry]:
    with Registry(open_port(bed.registry_address), timeout=LIMIT) as registry:
        registry.write("/domain/front/secret", "x")
        yield registry


class Rogue:
    """The program in the hostile VM."""

    def __init__(self, bed: Testbed) -> None:
        self.process: Process = bed.vms["rogue"].spawn(["python3", "-c", ACT], stdin=True)
        self._lines = self.process.lines(LIMIT)

    def begin(self, act: str) -> None:
        self.process.write(act.encode())
        self.hear("begun")

    def end(self) -> list[str]:
        self.process.write(b"x")
        return self.hear("over")

    def hear(self, word: str) -> list[str]:
        before = []
        while (line := next(self._lines, None)) != word:
            assert line is not None, self.process.wait(LIMIT).err
            before.append(line)
        return before


def p99(host: Registry, seconds: float) -> float:
    """Of a read by a host process, while all else goes on."""
    taken, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        began = time.perf_counter()
        assert host.read("/domain/front/secret") == b"x"
        taken.append(time.perf_counter() - began)
    return sorted(taken)[len(taken) * 99 // 100]


def test_what_is_others_is_refused_to_it(bed: Testbed, host: Registry) -> None:
    (seen,) = bed.devices.list()
    paths = ["/domain/front/secret", "/domain/front/absent", "/domain/back/backend/ledger/front/0/link",
             "/device/ledger/front/0", f"/link/{seen.record.link}"]
    rogue = bed.vms["rogue"]
    process = rogue.spawn(["python3", "-c", ASK, seen.record.link, *paths], stdin=True)
    process.write(f"{os.urandom(72).hex()}\n".encode())
    result = process.wait(LIMIT)
    assert result.exit_code == 0, result.err
    told: dict[str, Any] = json.loads(result.out)
    assert told["denied"] == 4 * len(paths)
    assert told["regions"] == ["control-front", "control-back", seen.record.link]
    assert set(told["codes"]) <= {"MALFORMED", "FORGED", "STALE", "RIGHTS", "NO_ROUTE"}
    assert host.read("/domain/front/secret") == b"x"


def test_floods_and_garbage_cost_others_little_and_end_nobody_elses_connection(bed: Testbed, host: Registry) -> None:
    pair = bed.vms["front"].spawn(["python3", "-c", PAIR], stdin=True)
    rogue = Rogue(bed)
    ratios: list[float] = []
    while not ratios or (ratios[-1] > GUARD and len(ratios) < 4):
        taken: dict[str, list[float]] = {"s": [], "f": [], "g": []}
        for _ in range(3):
            for act, figures in taken.items():
                rogue.begin(act)
                figures.append(p99(host, 0.7))
                rogue.end()
        spun = sorted(taken["s"])[1]
        ratios.append(max(sorted(taken[act])[1] / spun for act in "fg"))
    sys.stdout.write(f"p99 of a read beside a hostile guest by that beside one that spins: {ratios}\n")
    assert ratios[-1] <= GUARD, ratios
    # It broke its own link, and is served again once it behaves.
    assert bed.vms["rogue"].succeed(["python3", "-c", "from idc.registry import Registry\n"
                                     "with Registry.here(timeout=60) as registry: print(registry.domain)"]) == "rogue\n"
    assert len(host.list("/domain/rogue")) < 1024  # its quota
    pair.write(b"x")
    result = pair.wait(LIMIT)
    assert result.exit_code == 0, result.err
    assert int(result.out) > 0
    (seen,) = bed.devices.list()
    assert [steps[0].why for steps in (seen.front, seen.back)] == ["the endpoints have met"] * 2
    assert [len([step for step in steps if step.why == "the endpoints have met"])
            for steps in (seen.front, seen.back)] == [1, 1]  # never parted
