"""The broker's logic with no I/O: who is asked what, whose turn it is, what becomes of requests when things end."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.broker.checks import Denied, Domain, Span
from host.broker.desk import Desk
from host.broker.records import Limits
from idc.layout import PAGE, RegionHeader, Rights
from idc.remote import controlframes as frames
from idc.remote.controlframes import CopyRequest
from idc.remote.reference import Access, Reference, mint, parse
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.remote.resolution import Resolution

BOTH = Access.READ | Access.WRITE
NAMES = ("front", "middle", "back")
DOMAINS = {name: Domain(UUID(int=n), name, 1) for n, name in enumerate(NAMES, 1)}
#: One region for each domain, all of it its own part.
REGIONS = {name: RegionHeader.plan(name, 1 << 24, {name: Rights.RW}, region_uuid=UUID(int=100 + n))
           for n, name in enumerate(NAMES)}
BY_UUID = {region.uuid: region for region in REGIONS.values()}


def ref(owner: str, length: int = 8 * PAGE, slot: int = 0) -> bytes:
    return mint(Reference(DOMAINS[owner].uuid, 1, slot, 0, BOTH, 0, length), bytes(32))


def truth(raw: bytes, lease: int = 1) -> Lease:
    reference = parse(raw)
    owner = next(name for name, domain in DOMAINS.items() if domain.uuid == reference.owner)
    return Lease(lease, REGIONS[owner].uuid, "", PAGE * (1 + 64 * reference.slot), reference.length, BOTH)


@dataclass
class World:
    """Records what the desk wants done, and answers when told to."""

    room: int = 1000
    questions: list[tuple[str, bytes, Access, Callable[[Resolution | None], None]]] = field(default_factory=list)
    released: list[tuple[str, int]] = field(default_factory=list)
    copies: list[tuple[Span, Span]] = field(default_factory=list)
    broken: bool = False

    def ask(self, owner: Domain, reference: bytes, access: Access,
            answered: Callable[[Resolution | None], None]) -> bool:
        if self.room <= 0:
            return False
        self.room -= 1
        self.questions.append((owner.name, reference, access, answered))
        return True

    def release(self, owner: Domain, lease: int) -> None:
        self.released.append((owner.name, lease))

    def copy(self, source: Span, target: Span) -> None:
        if self.broken:
            raise Denied(Refusal.FAILED, "the memory is gone")
        self.copies.append((source, target))

    def answer(self, what: Callable[[bytes], Resolution] = truth) -> None:
        """Answer all questions so far."""
        questions, self.questions = self.questions, []
        for _, raw, _, answered in questions:
            self.room += 1
            answered(what(raw))


@dataclass
class Scene:
    """A desk with all three domains."""

    desk: Desk
    world: World
    answers: list[tuple[str, int, bytes]] = field(default_factory=list)

    def copy(self, asker: str, source: bytes, target: bytes, length: int = 100, tag: str = "",
             now: float = 0.0, source_lease: Lease | None = None, target_lease: Lease | None = None) -> None:
        body = frames.copy(CopyRequest(source, target, 0, 0, length, source_lease, target_lease))
        self.desk.copy(DOMAINS[asker].uuid, body, lambda code, status: self.answers.append((tag, code, status)), now)

    def finish(self) -> None:
        while self.desk.work():
            pass

    @property
    def codes(self) -> list[tuple[str, int]]:
        return [(tag, code) for tag, code, _ in self.answers]


def scene(**limits: float) -> Scene:
    world = World()
    desk = Desk(world, Limits(**limits))  # type: ignore[arg-type]
    desk.regions_changed(BY_UUID)
    for domain in DOMAINS.values():
        desk.arrive(domain, 0.0)
    return Scene(desk, world)


def test_both_owners_are_asked_once_and_leases_serve_again() -> None:
    here = scene()
    here.copy("back", ref("front"), ref("back"), tag="one")
    here.copy("back", ref("front"), ref("back"), tag="two")
    assert [(name, access) for name, _, access, _ in here.world.questions] == [
        ("front", Access.READ), ("back", Access.WRITE)]
    here.world.answer()
    here.finish()
    here.copy("back", ref("front"), ref("back"), tag="three")
    assert here.world.questions == []
    here.finish()
    assert here.answers == [(tag, 0, frames.copied(100)) for tag in ("one", "two", "three")]
    assert here.world.copies == [(Span(REGIONS["front"].uuid, PAGE, 100), Span(REGIONS["back"].uuid, PAGE, 100))] * 3
    assert (here.desk.leases, here.desk.jobs) == (2, 0)


def test_a_lease_of_the_askers_own_comes_with_the_request() -> None:
    here = scene()
    here.copy("back", ref("front"), ref("back"), target_lease=truth(ref("back"), 5))
    assert [name for name, *_ in here.world.questions] == ["front"]
    here.world.answer()
    here.finish()
    assert here.codes == [("", 0)]
    assert here.desk.leases == 1
    assert here.world.copies == [(Span(REGIONS["front"].uuid, PAGE, 100), Span(REGIONS["back"].uuid, PAGE, 100))]


@pytest.mark.parametrize(("which", "given", "refusal"), [
    ("source", truth(ref("front")), Refusal.RIGHTS),  # not its own
    ("target", truth(ref("front")), Refusal.FAILED),  # a region of which it is no member
    ("target", Lease(1, REGIONS["back"].uuid, "", 0, 8 * PAGE, BOTH), Refusal.FAILED),  # not its part
    ("target", Lease(1, REGIONS["back"].uuid, "", PAGE, 100, BOTH), Refusal.FAILED),  # another length
    ("target", Lease(1, REGIONS["back"].uuid, "", PAGE, 8 * PAGE, Access.READ), Refusal.RIGHTS),
])
def test_a_lease_that_comes_with_the_request_is_checked_as_an_answer_is(which: str, given: Lease,
                                                                      refusal: Refusal) -> None:
    here = scene()
    here.copy("back", ref("front"), ref("back"), source_lease=given if which == "source" else None,
              target_lease=given if which == "target" else None)
    here.world.answer()
    here.finish()
    assert here.codes == [("", refusal)]
    assert here.world.copies == []


def test_a_lease_that_came_with_a_request_can_be_revoked() -> None:
    here = scene(piece=PAGE)
    here.copy("back", ref("front"), ref("back"), 3 * PAGE, "begun", target_lease=truth(ref("back"), 5))
    here.copy("back", ref("front"), ref("back"), PAGE, "waits", target_lease=truth(ref("back"), 5))
    here.world.answer(lambda raw: truth(raw, 5))
    here.desk.work()
    revoked: list[bool] = []
    here.desk.revoke(DOMAINS["back"].uuid, 5, lambda: revoked.append(True))
    assert here.codes == [("waits", Refusal.WITHDRAWN)]
    assert not revoked
    assert here.desk.leases == 1  # number 5 of front is another
    here.finish()
    assert here.codes[-1] == ("begun", 0)
    assert revoked == [True]


def test_askers_take_turns_by_pieces() -> None:
    here = scene(piece=PAGE)
    here.copy("front", ref("front"), ref("middle"), 4 * PAGE, "long")
    here.copy("back", ref("back"), ref("middle", slot=1), PAGE, "short")
    here.world.answer()
    here.finish()
    assert here.codes == [("short", 0), ("long", 0)]
    assert [source.length for source, _ in here.world.copies] == [PAGE] * 5
    assert [source.start for source, _ in here.world.copies if source.region == REGIONS["front"].uuid] == [
        PAGE * n for n in (1, 2, 3, 4)]


def test_a_turn_is_an_askers_and_not_a_requests() -> None:
    here = scene(piece=PAGE)
    for slot in (1, 2, 3):
        here.copy("front", ref("front"), ref("middle", slot=slot), 2 * PAGE)
    here.copy("back", ref("back"), ref("middle"), 3 * PAGE)
    here.world.answer()
    here.finish()
    order = ["front" if source.region == REGIONS["front"].uuid else "back" for source, _ in here.world.copies]
    assert order == ["front", "back"] * 3 + ["front"] * 3
    counts = here.desk.counts
    assert (counts["front"].requests, counts["front"].pieces, counts["front"].copied) == (3, 6, 6 * PAGE)
    assert (counts["back"].requests, counts["back"].pieces, counts["back"].refused) == (1, 3, 0)


def test_an_owner_is_asked_in_the_order_of_the_requests() -> None:
    here = scene()
    here.world.room = 1
    for slot in (1, 2, 3):
        here.copy("back", ref("front", slot=slot), ref("front", slot=slot), 0)
    asked = []
    for _ in range(6):
        asked += [parse(raw).slot for _, raw, _, _ in here.world.questions]
        here.world.answer()
    assert asked == []  # neither is the asker's own
    for slot in (1, 2, 3):
        here.copy("back", ref("front", slot=slot), ref("back"), 0)
    for _ in range(6):
        asked += [parse(raw).slot for name, raw, _, _ in here.world.questions if name == "front"]
        here.world.answer()
        here.desk.tick(0.0)
    assert asked == [1, 2, 3]


def test_an_owner_copy_costs_the_asker_none_of_its_refusals() -> None:
    here = scene(refusals=2)
    for n in range(5):
        here.copy("back", ref("front", slot=n), ref("back"))
        here.world.answer(lambda raw: truth(raw) if parse(raw).owner == DOMAINS["back"].uuid else OwnerCopy(""))
    assert [code for _, code in here.codes] == [Refusal.NO_ROUTE] * 5


def test_nothing_is_copied_of_what_is_refused() -> None:
    here = scene()
    here.copy("back", ref("front"), ref("middle"), tag="not yours")
    here.copy("back", ref("front"), ref("back"), tag="forged")
    here.world.answer(lambda raw: truth(raw) if parse(raw).owner == DOMAINS["back"].uuid
                      else Refused(Refusal.FORGED, "no"))
    here.copy("back", ref("front", slot=1), ref("back"), tag="owner copy")
    here.world.answer(lambda raw: OwnerCopy("process memory"))
    here.copy("back", ref("front", slot=2), ref("back"), tag="lie")
    here.world.answer(lambda raw: truth(ref("back")))
    here.desk.copy(DOMAINS["back"].uuid, b"rubbish", lambda code, _: here.answers.append(("rubbish", code, b"")), 0.0)
    here.finish()
    assert here.codes == [("not yours", Refusal.RIGHTS), ("forged", Refusal.FORGED), ("owner copy", Refusal.NO_ROUTE),
                          ("lie", Refusal.FAILED), ("rubbish", Refusal.MALFORMED)]
    assert here.world.copies == []
    assert here.world.released == [("front", 1)]  # what it lied about is given back
    assert here.desk.counts["back"].refused == 5


def test_overlap_is_refused_as_a_whole() -> None:
    here = scene(piece=16)
    here.copy("back", ref("back"), ref("back"), 100)
    here.world.answer()
    here.finish()
    assert here.codes == [("", Refusal.RANGE)]
    assert here.world.copies == []


def test_an_owner_that_does_not_answer_costs_a_time_out_and_nobody_else_anything() -> None:
    here = scene(patience=5.0)
    here.copy("back", ref("front"), ref("back"), tag="stuck")
    here.copy("middle", ref("middle"), ref("back", slot=1), tag="other", now=1.0)
    for _, raw, _, answered in here.world.questions[1:]:
        answered(truth(raw))
    here.finish()
    assert here.codes == [("other", 0)]
    assert here.desk.next_tick() == 5.0
    here.desk.tick(4.9)
    assert here.codes == [("other", 0)]
    here.desk.tick(5.0)
    assert here.codes == [("other", 0), ("stuck", Refusal.BUSY)]
    assert here.desk.counts["front"].timeouts == 1
    here.world.questions[0][3](truth(ref("front")))  # too late for the asker, a lease all the same
    here.copy("back", ref("front"), ref("back"), tag="again", now=6.0)
    here.finish()
    assert here.codes[-1] == ("again", 0)


def test_a_full_link_is_used_again_when_it_has_room() -> None:
    here = scene()
    here.world.room = 1
    here.copy("back", ref("front"), ref("back"), tag="a")
    here.copy("middle", ref("middle"), ref("front", slot=1), tag="b")
    assert len(here.world.questions) == 1
    for _ in range(4):
        here.world.answer()
        here.desk.tick(1.0)
    here.finish()
    assert sorted(here.codes) == [("a", 0), ("b", 0)]


def test_what_nobody_waits_for_any_more_is_not_asked() -> None:
    here = scene(patience=1.0)
    here.world.room = 0
    here.copy("back", ref("front"), ref("back"))
    here.desk.tick(2.0)
    here.world.room = 10
    here.desk.tick(3.0)
    assert here.world.questions == []
    assert here.codes == [("", Refusal.BUSY)]


def test_revoke_waits_for_what_has_begun_and_refuses_what_has_not() -> None:
    here = scene(piece=PAGE)
    here.copy("back", ref("front"), ref("back"), 3 * PAGE, "begun")
    here.copy("back", ref("front"), ref("back", slot=1), PAGE, "waits")
    here.world.answer(lambda raw: truth(raw, 7))
    here.desk.work()
    revoked: list[bool] = []
    here.desk.revoke(DOMAINS["front"].uuid, 7, lambda: revoked.append(True))
    assert here.codes == [("waits", Refusal.WITHDRAWN)]
    assert not revoked
    here.finish()
    assert here.codes[-1] == ("begun", 0)
    assert revoked == [True]
    here.copy("back", ref("front"), ref("back"), tag="after")
    assert [name for name, *_ in here.world.questions] == ["front"]
    here.desk.revoke(DOMAINS["front"].uuid, 12345, lambda: revoked.append(True))  # never heard of: nothing uses it
    assert revoked == [True, True]


def test_only_its_own_leases_are_an_owners_to_revoke() -> None:
    here = scene()
    here.copy("back", ref("front"), ref("back"))
    here.world.answer(lambda raw: truth(raw, 7))
    here.finish()
    here.desk.revoke(DOMAINS["middle"].uuid, 7, lambda: None)
    assert here.desk.leases == 2


def test_an_owner_that_dies_ends_what_relies_on_it() -> None:
    here = scene(piece=PAGE)
    here.copy("back", ref("front"), ref("back"), 3 * PAGE, "begun")
    here.world.answer()
    here.copy("middle", ref("front", slot=1), ref("middle"), PAGE, "asked")
    here.copy("back", ref("middle"), ref("back"), PAGE, "other")
    here.desk.work()
    here.desk.leave(DOMAINS["front"].uuid)
    assert sorted(here.codes) == [("asked", Refusal.STALE), ("begun", Refusal.FAILED)]
    assert b"after 4096 bytes were copied" in {tag: text for tag, _, text in here.answers}["begun"]
    here.world.answer()
    here.finish()
    assert here.codes[-1] == ("other", 0)
    here.copy("back", ref("front"), ref("back"), tag="gone")
    assert here.codes[-1] == ("gone", Refusal.NO_ROUTE)


def test_an_asker_that_dies_takes_its_requests_with_it() -> None:
    here = scene()
    here.copy("back", ref("front"), ref("back"))
    here.world.answer()
    revoked: list[bool] = []
    here.desk.revoke(DOMAINS["back"].uuid, 9, lambda: revoked.append(True))
    here.desk.leave(DOMAINS["back"].uuid)
    here.desk.leave(DOMAINS["back"].uuid)
    assert not here.desk.work()
    assert here.desk.jobs == 0
    assert here.codes == [("", Refusal.FAILED)]  # to whoever held the transaction: a connection ends with none open
    here.desk.arrive(Domain(DOMAINS["back"].uuid, "back", 2), 1.0)
    here.copy("back", ref("front"), ref("back"), tag="stale")
    assert here.codes[-1] == ("stale", Refusal.STALE)


def test_a_dropped_region_ends_its_copies_and_leases() -> None:
    here = scene(piece=PAGE)
    here.copy("back", ref("front"), ref("back"), 2 * PAGE)
    here.world.answer()
    here.desk.work()
    here.copy("back", ref("middle"), ref("back"), PAGE, "other")
    here.world.answer()
    here.desk.regions_changed({uuid: region for uuid, region in BY_UUID.items() if region.name != "front"})
    assert here.codes == [("", Refusal.FAILED)]
    assert here.world.released == [("front", 1)]
    assert here.desk.leases == 2
    here.finish()
    assert here.codes[-1] == ("other", 0)


def test_memory_that_cannot_be_had_is_told() -> None:
    here = scene()
    here.world.broken = True
    here.copy("back", ref("front"), ref("back"))
    here.world.answer()
    here.finish()
    assert here.codes == [("", Refusal.FAILED)]


def test_who_names_refused_references_too_fast_is_slowed_down_alone() -> None:
    here = scene(refusals=4)
    for n in range(10):
        here.copy("back", ref("front", slot=n), ref("back"))
        here.world.answer(lambda raw: truth(raw) if parse(raw).owner == DOMAINS["back"].uuid
                          else Refused(Refusal.FORGED, "no"))
    assert [code for _, code in here.codes] == [Refusal.FORGED] * 4 + [Refusal.BUSY] * 6
    assert here.desk.counts["back"].refused == 10
    assert here.desk.counts["front"].asked == 4
    here.desk.leave(DOMAINS["back"].uuid)
    here.desk.arrive(DOMAINS["back"], 0.0)
    here.copy("back", ref("front"), ref("back"), tag="to connect again is no way out")
    assert here.codes[-1] == ("to connect again is no way out", Refusal.BUSY)
    here.copy("middle", ref("middle"), ref("front"), tag="other")
    here.world.answer()
    here.finish()
    assert here.codes[-1] == ("other", 0)
    here.copy("back", ref("front", slot=1), ref("back"), tag="later", now=0.5)
    here.world.answer()
    here.finish()
    assert here.codes[-1] == ("later", 0)


def test_leases_kept_are_bounded() -> None:
    here = scene(leases=4)
    for n in range(10):
        here.copy("back", ref("front", slot=n), ref("back"), tag=str(n))
        here.world.answer(lambda raw: truth(raw, parse(raw).slot + 10))
        here.finish()
    assert here.desk.leases == 5
    assert here.world.released == [("front", 10 + n) for n in range(6)]
    assert all(code == 0 for _, code in here.codes)


def test_no_bytes_are_copied_and_answered() -> None:
    here = scene()
    here.copy("back", ref("front"), ref("back"), 0)
    here.world.answer()
    here.finish()
    assert here.answers == [("", 0, struct.pack("<Q", 0))]
    assert here.world.copies == []


steps = st.lists(st.one_of(
    st.tuples(st.just("copy"), st.sampled_from(NAMES), st.sampled_from(NAMES), st.sampled_from(NAMES),
              st.integers(0, 3), st.integers(0, 8 * PAGE)),
    st.tuples(st.just("answer"), st.integers(0, 3)),
    st.tuples(st.just("work"), st.integers(1, 4)),
    st.tuples(st.just("revoke"), st.sampled_from(NAMES), st.integers(0, 4)),
    st.tuples(st.just("bounce"), st.sampled_from(NAMES)),
    st.tuples(st.just("drop"), st.sampled_from(NAMES)),
    st.tuples(st.just("time"), st.floats(0.1, 9)),
    st.tuples(st.just("room"), st.integers(0, 3)),
), max_size=60)


@settings(max_examples=300, deadline=None)
@given(steps)
def test_every_request_is_answered_once_whatever_happens(script: list[tuple[str, ...]]) -> None:
    here = scene(piece=PAGE, leases=2, refusals=8)
    now, asked, revokes, revoked = 0.0, 0, 0, [0]
    for what, *args in script:
        if what == "copy":
            asker, source, target, slot, length = args
            own = truth(ref(target, slot=3), 4) if int(length) % 2 else None
            here.copy(asker, ref(source, slot=int(slot)), ref(target, slot=3), int(length), now=now, target_lease=own)
            asked += 1
        elif what == "answer":
            lies: list[Callable[[bytes], Resolution]] = [
                    truth, lambda raw: Refused(Refusal.STALE, ""), lambda raw: OwnerCopy(""),
                    lambda raw: truth(ref("back"))]
            here.world.answer(lies[int(args[0])])
        elif what == "work":
            for _ in range(int(args[0])):
                here.desk.work()
        elif what == "revoke":
            revokes += 1

            def done() -> None:
                revoked[0] += 1

            here.desk.revoke(DOMAINS[args[0]].uuid, int(args[1]), done)
        elif what == "bounce":
            questions, here.world.questions = here.world.questions, []
            here.desk.leave(DOMAINS[args[0]].uuid)
            for question in questions:
                if question[0] == args[0]:
                    question[3](None)
                else:
                    here.world.questions.append(question)
            here.desk.arrive(DOMAINS[args[0]], now)
        elif what == "drop":
            here.desk.regions_changed({k: v for k, v in BY_UUID.items() if v.name != args[0]})
            here.desk.regions_changed(BY_UUID)
        elif what == "time":
            now += float(args[0])
            here.desk.tick(now)
        else:
            here.world.room = int(args[0])
    here.world.room = 1000
    for _ in range(4):
        here.desk.tick(now)
        here.world.answer()
        here.finish()
    assert len(here.answers) == asked
    assert revoked[0] == revokes
    assert here.desk.jobs == 0
    assert not here.desk.work()
