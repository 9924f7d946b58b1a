"""One connection's messages and transactions, with no I/O: frames in, events and frames out. Rules in docs/idc.md.

A slot is what a submission holds from its frame to its answer. A tag names a slot and how often it has been used, so
that an answer to a former use is recognised. Slots are made once, by `Slots`, and serve one session after another.
Depends on idc.endpoint.frames, idc.endpoint.results and idc.errors.
"""

from __future__ import annotations

from collections import deque
from time import monotonic_ns
from typing import TYPE_CHECKING, Final

from idc._core import lib
from idc.endpoint import frames
from idc.endpoint.frames import HANDLER_FAILED, HEADER_BYTES, Kind, Quotas
from idc.endpoint.results import Completion, Result
from idc.errors import DisconnectedError, MisuseError, PeerGoneError, ProtocolError, TooBigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from idc._core import Pointer
    from idc.endpoint.endpoint import Endpoint
    from idc.transport.base import Carrier, Frame

    Done = Callable[[Completion], None]

_SLOT_MASK: Final = 0xFFFF
#: Bytes of a body from which on a copy costs more than to pass it beside its header.
LONG: Final = 4096
#: Of a moment in a trace; as in `idc.trace.hook`, which an endpoint without a trace does not load.
RECEIVED: Final = 64
# Members of an Enum are looked up by a call of Python code: too much on the path of each frame in an emulated guest.
_OK, _BACK_PRESSURED = Result.OK, Result.BACK_PRESSURED
_MESSAGE, _DONE, _REQUEST, _REPLY = int(Kind.MESSAGE), int(Kind.DONE), int(Kind.REQUEST), int(Kind.REPLY)
_HELLO, _BYE = int(Kind.HELLO), int(Kind.BYE)
_new = object.__new__
_pack, _unpack = frames.HEADER.pack, frames.HEADER.unpack_from
_DELIVERED: Final = Completion(_OK)
#: Transactions whose tag has none of these bits are timed: one of eight uses of each slot.
_UNTIMED: Final = 0x70000
_answer = lib.idc_line_answer


class _Slot:
    """One outstanding submission."""

    __slots__ = ("answer", "done", "index", "ordered", "tag", "uses")

    def __init__(self, index: int) -> None:
        self.index = index
        self.uses = index & 0xFFFF  # so that the uses that are timed are spread over the slots
        self.tag = -1  # not in use
        self.done: Done | None = None
        self.ordered = False
        self.answer: Completion | None = None


class Slots:
    """The slots of one kind of submission: requests, or messages.

    Args:
        count: most of them outstanding at a time.

    Attributes:
        free: those that nothing holds, the longest free first.
        line: by which the core sends a transaction, in the slot that has been free for longest; None where it may not.
            `unquicken` takes it back.
        status: where the answer's status is, then.
        user: whose line it is; its `told` is told of what the core has sent, and has no answer to.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._all = [_Slot(index) for index in range(count)]
        self.free = deque(self._all)
        self._order: deque[_Slot] = deque()
        self.line: Pointer | None = None
        self.status: Pointer = None
        self.user: Endpoint | None = None

    @property
    def outstanding(self) -> int:
        """Slots in use."""
        return self.count - len(self.free)

    def take(self, done: Done | None, *, ordered: bool) -> int:
        """A tag for a new submission; the caller has checked that one is free."""
        if self.line is not None:
            self.unquicken()
        slot = self.free.popleft()
        slot.uses = slot.uses + 1 & 0xFFFF
        slot.tag = slot.uses << 16 | slot.index
        slot.done = done
        slot.ordered = ordered
        slot.answer = None
        if ordered:
            self._order.append(slot)
        return slot.tag

    def quicken(self, line: Pointer, status: Pointer, user: Endpoint) -> None:
        """Let the core send transactions, one at a time; nothing is outstanding."""
        slot = self.free[0]
        line.tag = slot.uses << 16 | slot.index
        line.posted = 0  # what `Carrier.exchange` sent is outstanding, or was answered
        self.status, self.user = status, user
        self.line = line

    def unquicken(self) -> None:
        """No more of that. What the core has sent, and has no answer to, is outstanding from here on."""
        line, user, self.line = self.line, self.user, None
        if line is None or user is None:
            return
        slot, tag = self.free[0], line.tag
        slot.uses = tag >> 16
        if line.posted:
            line.posted = 0
            slot.tag, slot.done, slot.ordered, slot.answer = tag, user.told, False, None
            self.free.popleft()  # the first call here, so that no signal is handled before all is done

    def waits(self, tag: int) -> bool:
        """Whether the submission of that tag is outstanding."""
        return self._all[tag & _SLOT_MASK].tag == tag

    def cancel(self, tag: int) -> None:
        """Take a submission back that never reached the carrier."""
        slot = self._all[tag & _SLOT_MASK]
        if slot.ordered:
            self._order.remove(slot)
        slot.done, slot.tag, slot.ordered = None, -1, False
        self.free.append(slot)

    def answer(self, tag: int, completion: Completion) -> list[tuple[Done | None, Completion]]:
        """Complete the submission of that tag: what may be delivered now, in order. Raises ProtocolError."""
        index = tag & _SLOT_MASK
        slot = self._all[index] if index < self.count else None
        if slot is None or slot.tag != tag or slot.answer is not None:
            raise ProtocolError(f"an answer to tag {tag:#x}, which is not outstanding")
        if not slot.ordered:
            done, slot.done, slot.tag = slot.done, None, -1
            self.free.append(slot)
            return [(done, completion)]
        slot.answer = completion
        ready = []
        while self._order and (answer := self._order[0].answer) is not None:
            ready.append(self._release(self._order.popleft(), answer))
        return ready

    def fail(self, completion: Completion) -> list[tuple[Done | None, Completion]]:
        """Complete all that is outstanding; answers that came, and only waited for their turn, stand."""
        failed = [*self._order, *(slot for slot in self._all if slot.tag != -1 and not slot.ordered)]
        self._order.clear()
        return [self._release(slot, slot.answer or completion) for slot in failed]

    def _release(self, slot: _Slot, completion: Completion) -> tuple[Done | None, Completion]:
        done, slot.done, slot.tag, slot.ordered = slot.done, None, -1, False
        self.free.append(slot)
        return done, completion


class _Incoming:
    """What a peer sent and this side has to complete, once."""

    __slots__ = ("_open", "_session", "_tag")

    def __init__(self, session: Session, tag: int) -> None:
        self._session = session
        self._tag = tag
        self._open = True

    @property
    def completed(self) -> bool:
        """Whether this side has completed it."""
        return not self._open

    def _finish(self, what: str) -> None:
        if not self._open:
            raise MisuseError(f"this {what} has been completed before")
        self._open = False


class IncomingMessage(_Incoming):
    """A message received. The sender's quota is held until `complete`.

    Attributes:
        body: what was sent.
    """

    __slots__ = ("body",)

    def __init__(self, session: Session, tag: int, body: bytes) -> None:
        super().__init__(session, tag)
        self.body = body

    def complete(self) -> Result:
        """Say that it is finished with: OK, or CLOSED if its connection is over. Raises MisuseError the second time."""
        self._finish("message")
        return self._session.finish_message(self._tag)


class IncomingTransaction(_Incoming):
    """A transaction received, to be completed now or later, in any order.

    Attributes:
        parameters: what the submitter passed.
    """

    __slots__ = ("_line", "parameters")  # by that line the core answers it, which alone knows its tag, until `settle`

    def __init__(self, session: Session, tag: int, parameters: bytes) -> None:
        self._session = session
        self._tag = tag
        self._open = True
        self._line: Pointer | None = None
        self.parameters = parameters

    def complete(self, status: bytes = b"", error: int = 0) -> Result:
        """Answer it.

        Args:
            status: at most as long as the submitter accepts.
            error: a code of the client's own, 0 to 65534; 0 is none.

        Returns:
            OK, or CLOSED if its connection is over: the answer goes nowhere.

        Raises:
            MisuseError: completed before, or the code does not fit.
            TooBigError: status too long; the transaction stays open.
        """
        line = self._line
        if line is not None and self._open:
            try:
                rc = _answer(line, status, len(status), error)
            except BaseException as raised:
                if not line.holds and self._line is line:  # a signal's handler raised, after that went
                    self._open = False
                    raise
                if not isinstance(raised, TypeError | OverflowError):  # it is other memory, or no such number
                    raise
                rc = -1
            if rc >= 0:
                self._open = False
                if rc > 0:
                    self._session.due()
                return _OK
        session = self._session
        if line is not None and self._open:
            session.hold()
        if (self._open and not session.over and 0 <= error < HANDLER_FAILED
                and len(status) <= session.short):
            self._open = False  # from here on as `finish_transaction`, with a call less
            held, tag = session._held_requests, self._tag
            held.discard(tag)
            if session.trace is not None:
                session.trace((monotonic_ns(), _REPLY, tag))
            try:
                if held or session.waiting:
                    session._post(_pack(_REPLY, 0, error, tag) + status)
                else:
                    session.send(_pack(_REPLY, 0, error, tag) + status)
            except DisconnectedError as lost:
                return session.lost(lost)
            return _OK
        if not 0 <= error < HANDLER_FAILED:
            raise MisuseError(f"error code {error} of a transaction: must be 0 to {HANDLER_FAILED - 1}")
        if len(status) > session.peer.status_bytes:
            session.check_status(status)
        if not self._open:
            self._finish("transaction")
        self._open = False
        return session.finish_transaction(self._tag, status, error)

    def fail(self, reason: str) -> Result:
        """Answer it with *error* and a reason in words."""
        if self._line is not None and self._open:
            self._session.hold()
        self._finish("transaction")
        body = frames.reason_bytes(reason)[:self._session.peer.status_bytes]
        return self._session.finish_transaction(self._tag, body, HANDLER_FAILED)


class IncomingAsk(_Incoming):
    """A request about a remote buffer, for the library: the client never sees one.

    Attributes:
        kind: one of `frames.ASKS`.
        body: what was sent.
    """

    __slots__ = ("body", "kind")

    def __init__(self, session: Session, tag: int, kind: Kind, body: bytes) -> None:
        super().__init__(session, tag)
        self.kind = kind
        self.body = body

    @property
    def over(self) -> bool:
        """Whether its connection is over: an answer goes nowhere."""
        return self._session.over

    def answer(self, body: bytes = b"") -> Result:
        """Grant it: OK, or CLOSED if its connection is over. Raises MisuseError the second time."""
        self._finish("request")
        return self._session.finish_ask(self._tag, body, 0)

    def refuse(self, code: int, reason: str) -> Result:
        """Refuse it, with a code and in words."""
        self._finish("request")
        return self._session.finish_ask(self._tag, frames.reason_bytes(reason), code)


Incoming = IncomingMessage | IncomingTransaction


def _nothing() -> None:
    """Where nothing is to be done."""


def _status_of(taken: Sequence[Frame], tag: int) -> bytes | None:
    """What came, if that is the answer with that tag, without an error, and nothing else."""
    if len(taken) != 1:
        return None
    first, begins = taken[0], _pack(_REPLY, 0, 0, tag)
    if type(first) is bytes:
        return first[HEADER_BYTES:] if first.startswith(begins) else None
    return first[1] if first[0] == begins else None  # type: ignore[return-value]


class Session:
    """One connection, from HELLO to its end.

    Args:
        accepts: what this side lets the peer do.
        requests, messages, asks: this side's slots; none of them may be in use.
        post: gives a frame to the carrier, a long body beside it (`Carrier.post`). It never waits: the carrier has room
            for every slot.

    Attributes:
        peer: what the peer accepts; nothing until its HELLO.
        held: received items that this side has not completed, also after the end.
        on_last: called, after the end, when the last of them is.
        trace: is given the moment of each frame posted and received (see `idc.trace.hook`); None: nobody is, or the
            carrier sees to it.
        timed: is told how long a transaction took, ns, of one in eight; None: nobody is.
        send: as `post`, and wakes the peer; for an answer after which no other is due.
        waiting: frames that came and were not given to `receive`: whoever answers a request before the last of them
            need not wake the peer for each.
        broke: is told why an answer could not be sent.
        short: bytes of a status that the peer accepts, and that is no long one.
        current: the transaction that came last by the core, which may hold it yet; see `settle`.
        hold: `settle`, and what its user does at that.
        due: called when the core has noted many moments of a trace.
    """

    def __init__(self, accepts: Quotas, requests: Slots, messages: Slots, post: Callable[..., None],
                 asks: Slots | None = None) -> None:
        self.accepts = accepts
        self.peer = Quotas(0, 0, 0, 0)
        self.short = 0
        self.send = post
        self.waiting: Collection[Frame] = ()
        self.broke: Callable[[DisconnectedError], None] | None = None
        self.current: IncomingTransaction | None = None
        self.hold = self.settle
        self.due: Callable[[], None] = _nothing
        self.greeted = False
        self.over = False
        self.on_last: Callable[[], None] | None = None
        self.trace: Callable[[tuple[int, int, int]], None] | None = None
        self.timed: Callable[[int], None] | None = None
        self._begun: dict[int, int] = {}
        self._requests = requests
        self._messages = messages
        self._asks = Slots(0) if asks is None else asks
        self._post = post
        self._held_asks: set[int] = set()
        self._held_requests: set[int] = set()
        self._held_messages: set[int] = set()

    @property
    def held(self) -> int:
        """Received items that the client has not completed."""
        current = self.current
        by_core = current is not None and current._open and current._line is not None
        return len(self._held_requests) + len(self._held_messages) + by_core

    def settle(self) -> None:
        """Take a request over that the core holds, for whom it was received, and which is not answered."""
        current, self.current = self.current, None
        if current is not None and (line := current._line) is not None:
            current._line = None
            if line.holds and current._open:
                line.holds = 0
                current._tag = tag = line.request
                self._held_requests.add(tag)  # the first call here, see `Slots.unquicken`

    # -- this side submits

    def submit_transaction(self, parameters: bytes, done: Done | None, *, ordered: bool,
                           post: Callable[..., None] | None = None) -> Result:
        """OK or BACK_PRESSURED. Raises TooBigError. `post`: for this frame, in place of the session's."""
        return self._submit(_REQUEST, self._requests, self.peer.requests, parameters, done, ordered, post)

    def submit_message(self, body: bytes, done: Done | None, *, post: Callable[..., None] | None = None) -> Result:
        """As `submit_transaction`."""
        return self._submit(_MESSAGE, self._messages, self.peer.messages, body, done, False, post)

    def submit_ask(self, kind: Kind, body: bytes, done: Done) -> Result:
        """OK or BACK_PRESSURED. Raises TooBigError. The completion's status is the answer, its error a refusal's code.
        """
        return self._submit(kind, self._asks, self.peer.asks, body, done, False)

    def call(self, parameters: bytes, done: Done, carrier: Carrier, timeout: float,
             keep: Callable[[Sequence[Frame]], None]) -> bytes | Result:
        """A transaction whose answer is all that is waited for, in few steps.

        Args:
            done: called if the answer is not what comes next.
            carrier: of this connection.
            timeout: seconds to wait for the answer here.
            keep: given what came in place of the answer.

        Returns:
            The status, and nothing is the matter with it; or as `submit_transaction`, and the rest is as after that.
        """
        slots, peer = self._requests, self.peer
        if slots.line is not None:
            slots.unquicken()
        free = slots.free
        if len(parameters) > peer.parameter_bytes or not free or slots.count - len(free) >= peer.requests:
            return self.submit_transaction(parameters, done, ordered=False)
        if self.trace is not None:  # one that the carrier does not tell
            return self.submit_transaction(parameters, done, ordered=False)
        slot = free.popleft()  # as `take`, with a call less
        slot.uses = slot.uses + 1 & 0xFFFF
        slot.tag = tag = slot.uses << 16 | slot.index
        slot.done, slot.answer = done, None
        timed = self.timed if not tag & _UNTIMED else None
        begun = monotonic_ns() if timed is not None else 0
        try:
            taken = carrier.exchange(_pack(_REQUEST, 0, 0, tag), parameters, timeout)
        except BaseException:
            if not carrier.posted:
                slots.cancel(tag)
            raise
        status = taken if isinstance(taken, bytes) else _status_of(taken, tag)
        if status is not None and len(status) <= self.accepts.status_bytes:
            slot.done, slot.tag = None, -1
            free.append(slot)
            if timed is not None:
                timed(monotonic_ns() - begun)
            return status
        if timed is not None:
            self._begun[tag] = begun
        if isinstance(taken, bytes):
            keep([_pack(_REPLY, 0, 0, tag) + taken])  # too long: for `receive` to say so
        elif taken:
            keep(taken)
        return _OK

    def _submit(self, kind: int, slots: Slots, quota: int, body: bytes, done: Done | None,
                ordered: bool, post: Callable[..., None] | None = None) -> Result:
        most = self.peer.ask_bytes if slots is self._asks else self.peer.parameter_bytes
        if len(body) > most:
            raise TooBigError(f"{len(body)} bytes in a {Kind(kind).name.lower()}, the peer accepts {most}")
        if slots.line is not None:
            slots.unquicken()  # what the core has sent counts
        free = slots.free
        if not free or slots.count - len(free) >= quota:
            return _BACK_PRESSURED
        tag = slots.take(done, ordered=ordered)
        if self.trace is not None:
            self.trace((monotonic_ns(), kind, tag))
        if not tag & _UNTIMED and kind == _REQUEST and self.timed is not None:
            self._begun[tag] = monotonic_ns()
        if post is None:
            post = self._post
        try:
            if len(body) < LONG:
                post(_pack(kind, 0, 0, tag) + body)
            else:
                post(_pack(kind, 0, 0, tag), body)
        except BaseException:
            slots.cancel(tag)
            raise
        return _OK

    # -- this side completes

    def check_status(self, status: bytes) -> None:
        """Raise TooBigError for a status that the submitter does not accept."""
        if not self.over and len(status) > self.peer.status_bytes:
            raise TooBigError(f"a status of {len(status)} bytes, the submitter accepts {self.peer.status_bytes}")

    def finish_transaction(self, tag: int, status: bytes, error: int) -> Result:
        """See IncomingTransaction."""
        self._held_requests.discard(tag)
        if self.trace is not None:
            self.trace((monotonic_ns(), _REPLY, tag))
        give = self._post if self._held_requests or self.waiting else self.send
        if len(status) < LONG:
            return self._answer(_pack(_REPLY, 0, error, tag) + status, give=give)
        return self._answer(_pack(_REPLY, 0, error, tag), status, give)

    def finish_message(self, tag: int) -> Result:
        """See IncomingMessage."""
        self._held_messages.discard(tag)
        if self.trace is not None:
            self.trace((monotonic_ns(), _DONE, tag))
        return self._answer(_pack(_DONE, 0, 0, tag))

    def finish_ask(self, tag: int, body: bytes, code: int) -> Result:
        """See IncomingAsk."""
        self._held_asks.discard(tag)
        if self.trace is not None:
            self.trace((monotonic_ns(), int(Kind.ANSWER), tag))
        return self._answer(frames.encode(Kind.ANSWER, tag, body, code))

    def _answer(self, frame: bytes, body: bytes = b"", give: Callable[..., None] | None = None) -> Result:
        if self.over:
            if not self.held and (told := self.on_last) is not None:
                self.on_last = None
                told()
            return Result.CLOSED
        give = give or self._post
        try:
            if body:
                give(frame, body)
            else:
                give(frame)
        except DisconnectedError as error:
            return self.lost(error)
        return _OK

    def lost(self, error: DisconnectedError) -> Result:
        """An answer could not be sent: whoever drives the endpoint learns of the end by itself."""
        if self.broke is not None:
            self.broke(error)
        return Result.CLOSED

    # -- the peer's frames

    def receive(self, frame: Frame) -> Incoming | IncomingAsk | list[tuple[Done | None, Completion]]:
        """What a frame means: something received, or completions to deliver.

        Raises:
            ProtocolError: the peer broke a rule.
            PeerGoneError: it says that the connection is over, and why.
        """
        if type(frame) is bytes and len(frame) >= HEADER_BYTES:
            kind, flags, error, tag = _unpack(frame)
            body = frame[HEADER_BYTES:]
            if flags:
                frames.parse(frame)  # which says so
        else:
            kind, error, tag, body = frames.parse(frame)
        if self.trace is not None:
            self.trace((monotonic_ns(), RECEIVED + kind, tag))
        if self.greeted:
            if kind == _REQUEST:
                held, accepts = self._held_requests, self.accepts
                if len(body) > accepts.parameter_bytes or len(held) >= accepts.requests or tag in held:
                    self._hold(held, accepts.requests, tag, body, "transactions")  # which says what is wrong
                held.add(tag)
                came = _new(IncomingTransaction)  # as by its constructor, whose call costs more than all of this
                came._session, came._tag, came._open, came.parameters = self, tag, True, body
                came._line = None
                return came
            if kind == _REPLY:
                if not tag & _UNTIMED and self._begun:
                    self._time(tag)
                return self._requests.answer(tag, self._completion(error, body))
        return self._receive_other(kind, error, tag, body)

    def begun(self, tag: int, when: int) -> None:
        """A transaction that the core submitted is timed, and was begun then, if it is outstanding yet."""
        if self._requests.waits(tag):
            self._begun[tag] = when

    def _time(self, tag: int) -> None:
        begun = self._begun.pop(tag, None)
        if begun is not None and self.timed is not None:
            self.timed(monotonic_ns() - begun)

    def _receive_other(self, kind: int, error: int, tag: int,
                       body: bytes) -> Incoming | IncomingAsk | list[tuple[Done | None, Completion]]:
        if kind == _HELLO:
            if self.greeted:
                raise ProtocolError("a second HELLO")
            self.peer = frames.parse_hello(body)
            self.short = min(self.peer.status_bytes, LONG - 1)
            self.greeted = True
            return []
        if kind == _BYE:
            raise PeerGoneError(f"the peer ended the connection: {frames.reason_text(body) or 'no reason given'}")
        if not self.greeted:
            raise ProtocolError(f"a frame of kind {kind} before HELLO")
        if kind == _DONE:
            if body:
                raise ProtocolError(f"{len(body)} bytes with the completion of a message")
            return self._messages.answer(tag, _DELIVERED)
        if kind == _MESSAGE:
            self._hold(self._held_messages, self.accepts.messages, tag, body, "messages")
            return IncomingMessage(self, tag, body)
        if kind == Kind.ANSWER:
            return self._asks.answer(tag, self._answered(error, body))
        if kind in frames.ASKS:
            self._hold(self._held_asks, self.accepts.asks, tag, body, "requests about remote buffers")
            return IncomingAsk(self, tag, Kind(kind), body)
        raise ProtocolError(f"a frame of unknown kind {kind}")

    def _completion(self, error: int, body: bytes) -> Completion:
        if len(body) > self.accepts.status_bytes:
            raise ProtocolError(f"a status of {len(body)} bytes, {self.accepts.status_bytes} are accepted")
        if error == HANDLER_FAILED:
            return Completion(Result.ERROR, error, b"", frames.reason_text(body) or "the handler failed")
        return Completion(_OK, error, body)

    def _answered(self, code: int, body: bytes) -> Completion:
        if len(body) > self.accepts.ask_bytes:
            raise ProtocolError(f"an answer of {len(body)} bytes, {self.accepts.ask_bytes} are accepted")
        if code:
            return Completion(Result.ERROR, code, reason=frames.reason_text(body) or f"refused with code {code}")
        return Completion(Result.OK, 0, body)

    def _hold(self, held: set[int], quota: int, tag: int, body: bytes, what: str) -> None:
        most = self.accepts.ask_bytes if held is self._held_asks else self.accepts.parameter_bytes
        if len(body) > most:
            raise ProtocolError(f"{len(body)} bytes sent, {most} are accepted")
        if len(held) >= quota:
            raise ProtocolError(f"more than {quota} {what} at a time")
        if tag in held:
            raise ProtocolError(f"tag {tag:#x} is used for two {what} at a time")
        held.add(tag)

    def held_elsewhere(self, tags: Iterable[int]) -> None:
        """Messages that were received without this, and are not completed: so that it judges by them too."""
        self._held_messages = set(tags)

    # -- the end

    def end(self, reason: str) -> list[tuple[Done | None, Completion]]:
        """Over: what is outstanding completes with *outcome unknown*. Again: nothing."""
        if self.over:
            return []
        self.over = True
        unknown = Completion(Result.OUTCOME_UNKNOWN, reason=reason)
        return self._asks.fail(unknown) + self._requests.fail(unknown) + self._messages.fail(unknown)
