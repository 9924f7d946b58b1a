"""What the broker lets through: whatever an asker or an owner claims, only the owner's own pages."""

from __future__ import annotations

import dataclasses
import secrets
from typing import TYPE_CHECKING
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host.broker import checks
from host.broker.checks import Denied, Domain, Span
from idc.layout import PAGE, RegionHeader, Rights
from idc.remote import controlframes as frames
from idc.remote.controlframes import CopyRequest
from idc.remote.reference import Access, Reference, mint
from idc.remote.resolution import Lease, OwnerCopy, Refusal, Refused

if TYPE_CHECKING:
    from idc.remote.resolution import Resolution

SIZE = 1 << 16
DOMAINS = {name: Domain(UUID(int=n), name, 3) for n, name in enumerate(("front", "middle", "back", "reader"), 1)}
BY_UUID = {domain.uuid: domain for domain in DOMAINS.values()}
LEFT = RegionHeader.plan("left", SIZE, {"front": Rights.RW, "middle": Rights.RW, "reader": Rights.RO},
                         parts={"middle": 5 * PAGE, "front": 4 * PAGE}, region_uuid=UUID(int=101))
RIGHT = RegionHeader.plan("right", SIZE, {"middle": Rights.RW, "back": Rights.RW}, region_uuid=UUID(int=102))
REGIONS = {region.uuid: region for region in (LEFT, RIGHT)}
#: Where each may have things copied from and to: worked out by hand, not by the code under test.
OWN = {
    ("front", LEFT.uuid): range(6 * PAGE, 10 * PAGE),
    ("middle", LEFT.uuid): range(PAGE, 6 * PAGE),
    ("middle", RIGHT.uuid): range(PAGE, 8 * PAGE),
    ("back", RIGHT.uuid): range(8 * PAGE, 15 * PAGE),
}
SECRET = secrets.token_bytes(32)
BOTH = Access.READ | Access.WRITE


def reference(owner: str, length: int = PAGE, access: Access = BOTH, incarnation: int = 3) -> Reference:
    return Reference(DOMAINS[owner].uuid, incarnation, 0, 0, access, 0, length)


def test_own_parts_are_what_they_are_taken_for() -> None:
    for (name, uuid), pages in OWN.items():
        (part,) = REGIONS[uuid].parts_of(REGIONS[uuid].member(name).id)
        assert range(part.offset, part.offset + part.length) == pages


words = st.one_of(st.integers(0, SIZE), st.integers(0, (1 << 64) - 1),
                  st.sampled_from([base * PAGE + off for base in range(16) for off in (-1, 0, 1) if base or off >= 0]))
answers: st.SearchStrategy[Resolution] = st.one_of(
    st.builds(Lease, lease=words, region=st.sampled_from([*REGIONS, UUID(int=999)]), name=st.just(""), offset=words,
              length=words, access=st.sampled_from([Access.READ, Access.WRITE, BOTH, Access.TAKE])),
    st.builds(OwnerCopy, st.text(max_size=5)),
    st.builds(Refused, st.sampled_from(Refusal), st.text(max_size=5)),
)


@settings(deadline=None)
@given(owner=st.sampled_from(sorted(DOMAINS)), answer=answers, access=st.sampled_from([Access.READ, Access.WRITE]),
       claimed=words, same=st.booleans())
def test_no_answer_leads_to_pages_that_are_not_the_owners(owner: str, answer: Resolution, access: Access,
                                                         claimed: int, same: bool) -> None:
    if same and isinstance(answer, Lease):
        claimed = answer.length
    try:
        lease = checks.admit(DOMAINS[owner], reference(owner, claimed), access, answer, REGIONS)
    except Denied:
        return
    assert isinstance(answer, Lease)
    assert access in answer.access
    assert lease.length == claimed
    own = OWN[owner, lease.region]
    assert own.start <= lease.offset
    assert lease.offset + lease.length <= own.stop


def test_an_honest_answer_is_admitted() -> None:
    for (name, uuid), pages in OWN.items():
        answer = Lease(1, uuid, "", pages.start, len(pages), BOTH)
        assert checks.admit(DOMAINS[name], reference(name, len(pages)), Access.WRITE, answer, REGIONS) == answer


@pytest.mark.parametrize(("owner", "answer", "refusal", "words"), [
    ("front", Lease(1, UUID(int=9), "", 6 * PAGE, PAGE, BOTH), Refusal.FAILED, "does not exist"),
    ("front", Lease(1, RIGHT.uuid, "", 6 * PAGE, PAGE, BOTH), Refusal.FAILED, "no rw member"),
    ("reader", Lease(1, LEFT.uuid, "", 6 * PAGE, PAGE, BOTH), Refusal.FAILED, "no rw member"),
    ("front", Lease(1, LEFT.uuid, "", 6 * PAGE - 1, PAGE, BOTH), Refusal.FAILED, "not in its part"),
    ("front", Lease(1, LEFT.uuid, "", 9 * PAGE + 1, PAGE, BOTH), Refusal.FAILED, "not in its part"),
    ("front", Lease(1, LEFT.uuid, "", 0, PAGE, BOTH), Refusal.FAILED, "not in its part"),
    ("front", Lease(1, LEFT.uuid, "", (1 << 64) - 1, PAGE, BOTH), Refusal.FAILED, "not in its part"),
    ("front", Lease(1, LEFT.uuid, "", 6 * PAGE, 2 * PAGE, BOTH), Refusal.FAILED, "gives 8192 bytes"),
    ("front", Lease(1, LEFT.uuid, "", 6 * PAGE, PAGE, Access.READ), Refusal.RIGHTS, "does not allow"),
    ("front", OwnerCopy("process memory"), Refusal.NO_ROUTE, "ask it for the bytes"),
    ("front", Refused(Refusal.FORGED, "the code is wrong"), Refusal.FORGED, "front refuses: the code is wrong"),
])
def test_a_lie_is_refused_in_words(owner: str, answer: Resolution, refusal: Refusal, words: str) -> None:
    with pytest.raises(Denied, match=words) as denied:
        checks.admit(DOMAINS[owner], reference(owner), Access.WRITE, answer, REGIONS)
    assert denied.value.refusal is refusal


def ask(source: Reference, target: Reference, *, source_offset: int = 0, target_offset: int = 0,
        length: int = 100) -> tuple[checks.Claim, checks.Claim]:
    asked = CopyRequest(mint(source, SECRET), mint(target, SECRET), source_offset, target_offset, length)
    return checks.request(DOMAINS["back"], asked, BY_UUID)


def test_a_request_names_two_claims() -> None:
    source, target = ask(reference("front"), reference("back"), source_offset=PAGE - 100, target_offset=7)
    assert (source.owner.name, source.access, source.offset) == ("front", Access.READ, PAGE - 100)
    assert (target.owner.name, target.access, target.offset, target.length) == ("back", Access.WRITE, 7, 100)


@pytest.mark.parametrize(("source", "target", "more", "refusal"), [
    (reference("front"), reference("middle"), {}, Refusal.RIGHTS),
    (reference("front", access=Access.WRITE), reference("back"), {}, Refusal.RIGHTS),
    (reference("front"), reference("back", access=Access.READ), {}, Refusal.RIGHTS),
    (reference("front", incarnation=2), reference("back"), {}, Refusal.STALE),
    (reference("front"), reference("back", incarnation=4), {}, Refusal.STALE),
    (Reference(UUID(int=77), 3, 0, 0, BOTH, 0, PAGE), reference("back"), {}, Refusal.NO_ROUTE),
    (reference("front"), reference("back"), {"source_offset": PAGE - 99}, Refusal.RANGE),
    (reference("front"), reference("back"), {"target_offset": PAGE - 99}, Refusal.RANGE),
    (reference("front"), reference("back"), {"length": PAGE + 1}, Refusal.RANGE),
    (reference("front"), reference("back"), {"source_offset": (1 << 64) - 1}, Refusal.RANGE),
    (reference("front", 1 << 40), reference("back", 1 << 40), {"length": checks.MOST + 1}, Refusal.RANGE),
])
def test_requests_that_are_refused_before_anybody_is_asked(source: Reference, target: Reference, more: dict[str, int],
                                                           refusal: Refusal) -> None:
    with pytest.raises(Denied) as denied:
        ask(source, target, **more)
    assert denied.value.refusal is refusal


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    try:
        asked = frames.parse_copy(body)
    except frames.ControlError:
        return
    with pytest.raises(Denied):
        checks.request(DOMAINS["back"], asked, BY_UUID)


@settings(deadline=None)
@given(st.binary(max_size=100), st.integers(0, 65534))
def test_any_bytes_are_an_answer_or_refused(status: bytes, error: int) -> None:
    try:
        answer = frames.parse_answer(error, status)
    except frames.ControlError:
        return
    assert isinstance(answer, Lease | OwnerCopy | Refused)


spans = st.builds(Span, st.sampled_from(sorted(REGIONS)), st.integers(0, 30), st.integers(0, 30))


@settings(deadline=None)
@given(spans, spans)
def test_source_and_target_have_no_byte_in_common(one: Span, other: Span) -> None:
    def bytes_of(span: Span) -> set[tuple[UUID, int]]:
        return {(span.region, at) for at in range(span.start, span.start + span.length)}

    try:
        checks.apart(one, other)
    except Denied:
        assert bytes_of(one) & bytes_of(other)
    else:
        assert not bytes_of(one) & bytes_of(other)


def test_frames_come_back_as_they_went() -> None:
    who = frames.Identity(UUID(int=5), 9, "front")
    assert frames.parse_identity(frames.identity(who)) == who
    raw = mint(reference("front"), SECRET)
    assert frames.parse_resolve(frames.resolve(raw, Access.READ)) == (raw, Access.READ)
    asked = CopyRequest(raw, raw, 1, 2, 3)
    assert frames.parse_copy(frames.copy(asked)) == asked
    lease = Lease(4, UUID(int=6), "", 5, 6, BOTH)
    for leased in (dataclasses.replace(asked, source_lease=lease), dataclasses.replace(asked, target_lease=lease)):
        assert frames.parse_copy(frames.copy(leased)) == leased
        assert len(frames.copy(leased)) <= frames.BROKER_ACCEPTS.parameter_bytes
    for body in (frames.copy(asked) + b"x", b"\x03\x01" + frames.copy(asked)[2:], b"\x03\x03" + frames.copy(leased)[2:],
                 frames.copy(leased)[:-48] + frames.answer(OwnerCopy(""))):
        with pytest.raises(frames.ControlError):
            frames.parse_copy(body)
    assert frames.parse_lease(frames.revoke(7)) == frames.parse_lease(frames.release(7)) == 7
    assert frames.parse_answer(0, frames.answer(lease)) == lease
    assert isinstance(frames.parse_answer(0, frames.answer(OwnerCopy("x"))), OwnerCopy)
    assert frames.parse_answer(2, b"no\x1b") == Refused(Refusal.FORGED, "no?")
    assert frames.parse_answer(99, b"") == Refused(Refusal.FAILED, "refused with code 99")
    assert frames.parse_copied(frames.copied(11)) == 11
