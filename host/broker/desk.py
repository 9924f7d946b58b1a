"""Requests, leases and copies under way: the broker's logic with no I/O. Time, links and memory are passed in.

    asker: COPY ──▶ checks.request ──▶ each reference: leased? else RESOLVE at its owner ──▶ checks.admit
          ──▶ checks.apart ──▶ the asker's queue ──▶ a piece at a time, askers in turn ──▶ answer

A domain can hold up only itself: askers take turns by pieces of bounded length, an owner that does not answer costs its
askers a time-out, and who names refused references faster than a rate is refused without any owner being asked.
Depends on host.broker.checks, host.broker.records and idc.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

from host.broker import checks
from host.broker.checks import Denied, Domain, Span
from host.broker.records import Counts, Held, Job, Limits, Meter, Question, Seat, Side
from idc.remote import controlframes as frames
from idc.remote.resolution import Lease, OwnerCopy, Refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from uuid import UUID

    from host.broker.records import Answer
    from idc.layout import RegionHeader
    from idc.remote.reference import Access
    from idc.remote.resolution import Resolution


class Outside(Protocol):
    """What the desk needs done."""

    def ask(self, owner: Domain, reference: bytes, access: Access,
            answered: Callable[[Resolution | None], None]) -> bool:
        """RESOLVE at the owner; False, and nothing sent, if its link takes no more now. None: the link was lost."""

    def release(self, owner: Domain, lease: int) -> None:
        """RELEASE to the owner, if its link takes it."""

    def copy(self, source: Span, target: Span) -> None:
        """Copy, at once. Raises Denied if the memory cannot be had."""


#: Domains that are gone whose meters are kept, the latest.
_REMEMBERED: Final = 256


class Desk:
    """All that is under way.

    Args:
        outside: does what the desk decides.
        limits: see there.
    """

    def __init__(self, outside: Outside, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.regions: Mapping[UUID, RegionHeader] = {}
        self._outside = outside
        self._seats: dict[UUID, Seat] = {}
        self._turns: deque[Seat] = deque()
        self._meters: OrderedDict[UUID, Meter] = OrderedDict()
        self._names: dict[UUID, str] = {}

    # -- domains and regions

    def arrive(self, domain: Domain, now: float) -> None:
        """A domain's control link is connected; `leave` was called for the connection before."""
        meter = self._meters.setdefault(domain.uuid, Meter(Counts(), self.limits.refusals, now))
        self._meters.move_to_end(domain.uuid)
        self._names[domain.uuid] = domain.name
        while len(self._meters) > max(_REMEMBERED, len(self._seats) + 1):
            del self._names[self._meters.popitem(last=False)[0]]
        self._seats[domain.uuid] = Seat(domain, meter)

    def leave(self, uuid: UUID) -> None:
        """Its control link is lost: what it asked for is given up, what others ask of it is refused or interrupted."""
        seat = self._seats.pop(uuid, None)
        if seat is None:
            return
        for job in tuple(seat.jobs):
            self._finish(job, Refusal.FAILED, "the asker is gone")
        gone = f"the control link of {seat.domain.name} was lost"
        for other in tuple(self._seats.values()):
            for job in tuple(other.jobs):
                if any(side.claim.owner.uuid == uuid for side in job.sides):
                    self._give_up(job, gone)
        for _, done in seat.revoking:
            done()

    def regions_changed(self, regions: Mapping[UUID, RegionHeader]) -> None:
        """The regions that exist now. Jobs and leases of any other are given up."""
        gone = self.regions.keys() - regions.keys()
        self.regions = regions
        if not gone:
            return
        for seat in tuple(self._seats.values()):
            for key, held in tuple(seat.leases.items()):
                if held.lease.region in gone:
                    del seat.leases[key]
                    self._outside.release(seat.domain, held.lease.lease)
            for job in tuple(seat.jobs):
                if any(side.held is not None and side.held.lease.region in gone for side in job.sides):
                    self._give_up(job, "its region was dropped")

    @property
    def domains(self) -> dict[UUID, Domain]:
        """Those that are connected."""
        return {uuid: seat.domain for uuid, seat in self._seats.items()}

    @property
    def counts(self) -> dict[str, Counts]:
        """By domain's name, of those that are here or were lately."""
        return {self._names[uuid]: meter.counts for uuid, meter in self._meters.items()}

    @property
    def leases(self) -> int:
        """Kept, of all owners."""
        return sum(len(seat.leases) for seat in self._seats.values())

    @property
    def jobs(self) -> int:
        """Requests that are not answered."""
        return sum(len(seat.jobs) for seat in self._seats.values())

    # -- requests

    def copy(self, uuid: UUID, parameters: bytes, answer: Answer, now: float) -> None:
        """COPY came by the control link of that domain; `answer` is called once, unless the link is lost before."""
        seat = self._seats[uuid]
        seat.meter.counts.requests += 1
        try:
            asked = frames.parse_copy(parameters)
            source, target = checks.request(seat.domain, asked, self.domains)
        except frames.ControlError as error:
            self._refuse(seat, answer, Refusal.MALFORMED, str(error))
            return
        except Denied as denied:
            self._refuse(seat, answer, denied.refusal, str(denied))
            return
        job = Job(seat, Side(source), Side(target), answer, now + self.limits.patience)
        seat.jobs.add(job)
        for side, given in ((job.source, asked.source_lease), (job.target, asked.target_lease)):
            if job.over:
                break
            if given is None:
                self._resolve(job, side, now)
            else:
                self._take(job, side, given)
        self._start(job)

    def revoke(self, uuid: UUID, lease: int, done: Callable[[], None]) -> None:
        """REVOKE came by its link: the lease is used no more from here on; `done` once no copy under way relies on it.

        What has begun to be copied is finished first, what waits is refused.
        """
        seat = self._seats[uuid]
        for key in [key for key, held in seat.leases.items() if held.lease.lease == lease]:
            del seat.leases[key]
        helds = []
        for other in tuple(self._seats.values()):
            for job in tuple(other.jobs):
                used = [side.held for side in job.sides if side.held is not None and side.claim.owner.uuid == uuid
                        and side.held.lease.lease == lease]
                helds += used
                if used and not job.done:
                    self._finish(job, Refusal.WITHDRAWN, f"{seat.domain.name} has revoked it")
        if any(held.users for held in helds):
            seat.revoking.append((helds, done))
        else:
            done()

    def tick(self, now: float) -> None:
        """Send what a link had no room for, and give up what an owner did not answer."""
        for seat in tuple(self._seats.values()):
            self._send_unsent(seat)
            for job in tuple(seat.jobs):
                if now >= job.deadline and any(side.held is None for side in job.sides):
                    silent = next(side for side in job.sides if side.held is None).claim.owner
                    self._seats[silent.uuid].meter.counts.timeouts += 1
                    self._finish(job, Refusal.BUSY, f"{silent.name} did not answer within {self.limits.patience:g} s")

    def next_tick(self) -> float | None:
        """When `tick` is due though nothing happens; None if it is not."""
        return min((job.deadline for seat in self._seats.values() for job in seat.jobs
                    if any(side.held is None for side in job.sides)), default=None)

    def work(self) -> bool:
        """Copy one piece, of the asker whose turn it is. Whether there was one."""
        if not self._turns:
            return False
        seat = self._turns.popleft()
        job = seat.queue[0]
        source, target = job.source.span, job.target.span
        assert source is not None
        assert target is not None
        count = min(self.limits.piece, source.length - job.done)
        try:
            if count:
                self._outside.copy(Span(source.region, source.start + job.done, count),
                                   Span(target.region, target.start + job.done, count))
        except Denied as denied:
            self._finish(job, denied.refusal, str(denied))
        else:
            job.done += count
            seat.meter.counts.pieces += 1
            seat.meter.counts.copied += count
            if job.done == source.length:
                self._finish(job, 0, "")
        if seat.queue:
            self._turns.append(seat)
        return True

    # -- within

    def _resolve(self, job: Job, side: Side, now: float) -> None:
        """Have the side's lease: kept from before, asked for already, or to be asked for."""
        owner = self._seats[side.claim.owner.uuid]
        key = side.claim.key
        held = owner.leases.get(key)
        if held is not None:
            owner.leases.move_to_end(key)
            self._hold(side, held)
            return
        if not self._may_ask(job.asker, now):
            self._finish(job, Refusal.BUSY, "too many of the asker's references were refused lately: slower")
            return
        question = owner.questions.get(key)
        if question is None:
            question = owner.questions[key] = Question(side.claim)
            owner.unsent.append(question)
        question.waiting.append((job, side))
        self._send_unsent(owner)

    def _take(self, job: Job, side: Side, given: Lease) -> None:
        """The asker's lease on its own buffer: as good as its answer to RESOLVE, for this one copy."""
        claim = side.claim
        try:
            if claim.owner.uuid != job.asker.domain.uuid:
                raise Denied(Refusal.RIGHTS, f"a lease of the asker's on a buffer of {claim.owner.name}")
            self._hold(side, Held(checks.admit(claim.owner, claim.reference, claim.access, given, self.regions)))
        except Denied as denied:
            self._finish(job, denied.refusal, str(denied))

    def _send_unsent(self, owner: Seat) -> None:
        while owner.unsent:
            question = owner.unsent.popleft()
            question.sent = True
            claim = question.claim
            if not self._outside.ask(owner.domain, claim.raw, claim.access, partial(self._answered, owner, question)):
                question.sent = False
                owner.unsent.appendleft(question)
                return
            owner.meter.counts.asked += 1

    def _answered(self, owner: Seat, question: Question, answer: Resolution | None) -> None:
        if answer is None or self._seats.get(owner.domain.uuid) is not owner:
            return  # the link was lost: `leave` answers the askers
        claim, waiting = question.claim, question.waiting
        del owner.questions[claim.key]
        try:
            lease = checks.admit(owner.domain, claim.reference, claim.access, answer, self.regions)
        except Denied as denied:
            if isinstance(answer, Lease):
                self._outside.release(owner.domain, answer.lease)
            for job, _ in tuple(waiting):
                if not isinstance(answer, OwnerCopy):
                    job.asker.meter.tokens -= 1
                self._finish(job, denied.refusal, str(denied))
        else:
            held = owner.leases[claim.key] = Held(lease)
            for job, side in tuple(waiting):
                self._hold(side, held)
                self._start(job)
            self._trim(owner)
        self._send_unsent(owner)

    def _may_ask(self, asker: Seat, now: float) -> bool:
        rate = self.limits.refusals
        meter = asker.meter
        meter.tokens = min(rate, meter.tokens + (now - meter.refilled) * rate)
        meter.refilled = now
        return meter.tokens >= 1

    def _trim(self, owner: Seat) -> None:
        """Give back the leases that were used longest ago, as far as nothing uses them now."""
        excess = len(owner.leases) - self.limits.leases
        for key, held in tuple(owner.leases.items()) if excess > 0 else ():
            if excess > 0 and not held.users:
                excess -= 1
                del owner.leases[key]
                self._outside.release(owner.domain, held.lease.lease)

    def _hold(self, side: Side, held: Held) -> None:
        side.held = held
        held.users += 1

    def _start(self, job: Job) -> None:
        """Queue it, if both sides are there now."""
        source, target = job.source, job.target
        if job.over or source.held is None or target.held is None or job in job.asker.queue:
            return
        try:
            source.span = checks.span(source.claim, source.held.lease)
            target.span = checks.span(target.claim, target.held.lease)
            checks.apart(source.span, target.span)
        except Denied as denied:
            self._finish(job, denied.refusal, str(denied))
            return
        job.asker.queue.append(job)
        if job.asker not in self._turns:
            self._turns.append(job.asker)

    def _give_up(self, job: Job, why: str) -> None:
        if job.done:
            self._finish(job, Refusal.FAILED, f"{why} after {job.done} bytes were copied")
        else:
            self._finish(job, Refusal.STALE, why)

    def _finish(self, job: Job, code: int, reason: str) -> None:
        if job.over:
            return
        job.over = True
        seat = job.asker
        seat.jobs.discard(job)
        if job in seat.queue:
            seat.queue.remove(job)
            if not seat.queue and seat in self._turns:
                self._turns.remove(seat)
        owners = []
        for side in job.sides:
            if side.held is not None:
                side.held.users -= 1
                owners.append(self._seats.get(side.claim.owner.uuid))
            else:
                self._forget(job, side)
        if code:
            self._refuse(seat, job.answer, Refusal(code), reason)
        else:
            job.answer(0, frames.copied(job.done))
        for owner in owners:
            if owner is not None:
                self._quiet(owner)

    def _forget(self, job: Job, side: Side) -> None:
        """A question without anybody left to wait is not sent; one that was sent keeps its place until the answer."""
        owner = self._seats.get(side.claim.owner.uuid)
        question = owner.questions.get(side.claim.key) if owner is not None else None
        if owner is None or question is None:
            return
        question.waiting = [entry for entry in question.waiting if entry[0] is not job]
        if not question.waiting and not question.sent:
            del owner.questions[side.claim.key]
            owner.unsent.remove(question)

    def _quiet(self, owner: Seat) -> None:
        """Answer those REVOKEs whose leases nothing uses any more."""
        settled = [entry for entry in owner.revoking if not any(held.users for held in entry[0])]
        owner.revoking = [entry for entry in owner.revoking if entry not in settled]
        for _, done in settled:
            done()

    def _refuse(self, seat: Seat, answer: Answer, refusal: Refusal, reason: str) -> None:
        seat.meter.counts.refused += 1
        answer(int(refusal), frames.reason(reason))
