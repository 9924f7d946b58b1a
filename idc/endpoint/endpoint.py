"""An endpoint: one end of a connection between two domains, as clients use it. Design and rules are in docs/idc.md.

Nothing happens by itself: `pump` does what is due, and waits for it if asked. Faces that block, or run under asyncio,
are built on it. An endpoint belongs to one thread at a time. Depends on idc.endpoint, idc.transport.base, idc.errors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.endpoint import frames, quick
from idc.endpoint.callbacks import call_each, deliver
from idc.endpoint.client import Client, Resources, Status
from idc.endpoint.frames import Quotas
from idc.endpoint.lifecycle import Action, Event, State, step
from idc.endpoint.pauses import Pauses
from idc.endpoint.results import Completion, Result
from idc.endpoint.session import IncomingAsk, IncomingMessage, IncomingTransaction, Session
from idc.errors import CorruptError, DisconnectedError, MisuseError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc._core import Pointer
    from idc.buffers.local import LocalBuffer
    from idc.endpoint.party import Party
    from idc.endpoint.session import Done, Incoming
    from idc.remote.buffer import RemoteBuffer
    from idc.remote.reference import Access
    from idc.remote.registration import Registration
    from idc.remote.routes import Route
    from idc.trace.hook import EndpointTrace
    from idc.transport.base import Carrier, Frame, Port

#: Seconds between two looks for a peer that is not connected, where nothing else wakes the endpoint.
UNCONNECTED_LOOK = 0.05

# Members of an Enum are looked up by a call of Python code: too much on the path of each frame in an emulated guest.
_CONNECTED, _OK = State.CONNECTED, Result.OK
_request, _unpack, _new = lib.idc_line_request, ffi.unpack, object.__new__

__all__ = ["Client", "Endpoint", "Resources", "Status"]

log = logging.getLogger("idc.endpoint")


class Endpoint:
    """One end of a connection.

    Args:
        port: where the peer is met; the endpoint closes it.
        client: who is told.
        resources: not in use by another endpoint.
        name: of the peer, as the configuration or who mediates says; for messages.

    Attributes:
        state: see `idc.endpoint.lifecycle`.
        reason: why the last connection ended, in words.
        connections: how many there were so far.
        told: of a transaction that the core has sent (`Slots.line`) and has no answer to.

    Raises:
        MisuseError: the resources are in use.
    """

    def __init__(self, port: Port, client: Client, resources: Resources, name: str = "the peer") -> None:
        if resources.user is not None:
            raise MisuseError("these resources serve another endpoint; it has to be destroyed first")
        resources.user = self
        self.state = State.ABSENT
        self.reason = ""
        self.connections = 0
        self.told: Done | None = None
        self._trace: EndpointTrace | None = None
        self._flushed: Callable[[], None] | None = None  # what it is told, unless the carrier does
        self._port = port
        self._client = client
        self._resources = resources
        self._party: Party | None = None
        if resources.remote is not None:
            self._party = resources.remote.party(name, self.notify)
        self._carrier: Carrier | None = None
        self._session: Session | None = None
        self._inbox: deque[Frame] = deque()
        self._dirty = False
        self._line: Pointer | None = None  # while all that is due is to wait for a request, which the core may take
        self._body = self._status = ffi.NULL  # its parameters; and the status of an answer to this side's
        self._core: Pointer | None = None  # the same, as long as the connection stands
        self._broken: DisconnectedError | None = None
        self._destroyed: list[Callable[[], None]] = []
        self._pauses = Pauses()

    # -- the client's calls

    def submit_transaction(self, parameters: bytes, done: Done | None = None, *, ordered: bool = False,
                           notify: bool = True) -> Result:
        """Send a transaction; `done` is called with its Completion, from within `pump`.

        Args:
            parameters: at most what the peer accepts.
            done: called once, whatever happens, if the result here is OK.
            ordered: complete in the order of submission, among those that ask for it. Else as answers come.
            notify: False leaves the peer asleep until `notify()`, or the next `pump`: submit many, notify once.

        Returns:
            OK, BACK_PRESSURED, NOT_CONNECTED or CLOSED; nothing was sent unless OK.

        Raises:
            TooBigError: the parameters are longer than the peer accepts.
        """
        session, carrier = self._session, self._carrier
        if session is None or carrier is None or self.state is not _CONNECTED:
            return self._unconnected()
        now = carrier.send if notify and self._flushed is None else None
        try:
            result = session.submit_transaction(parameters, done, ordered=ordered, post=now)
        except DisconnectedError as error:
            return self._lost(error)
        if notify and self._dirty:
            self.notify()
        return result

    def call(self, parameters: bytes, done: Done, timeout: float) -> bytes | Result:
        """As `submit_transaction` and one `pump`, for who waits for the answer: in few steps where nothing else is due.

        Returns:
            The status, and `done` is not called; or the result of the submission.

        Raises:
            TooBigError: the parameters are longer than the peer accepts.
        """
        session, carrier, line = self._session, self._carrier, self._core
        if line is not None and (line.other or line.got):
            self._hold()  # they came before
        if (session is None or carrier is None or self.state is not _CONNECTED or self._inbox
                or self._party is not None or self._broken is not None):
            return self.submit_transaction(parameters, done)
        try:
            result = session.call(parameters, done, carrier, timeout, self._inbox.extend)
        except DisconnectedError as error:
            return self._lost(error)
        if type(result) is bytes:
            self._dirty = False  # all that was posted went with it
            if self._core is not None:
                self._quicken()
            return result
        if self._inbox:
            self._hold()  # what was kept is for `_take`
        if self._dirty:
            self.notify()
        return result

    def unanswered(self) -> None:
        """A transaction that the core has sent (`Slots.line`) waits for its answer here, or for what else came."""
        line, session = self._core, self._session
        self._hold()
        if line is not None and session is not None and line.begun:
            session.begun(line.tag, line.begun)

    def interrupted(self) -> None:
        """Whoever sent a transaction by the core, or by `call`, has left it."""
        self._hold()
        if self._core is not None:
            self._core.posted = 0

    def submit_message(self, body: bytes, done: Done | None = None, *, notify: bool = True) -> Result:
        """Send a message; `done` is called when the receiver has completed it. Otherwise as `submit_transaction`."""
        session, carrier = self._session, self._carrier
        if session is None or carrier is None or self.state is not _CONNECTED:
            return self._unconnected()
        now = carrier.send if notify and self._flushed is None else None
        try:
            result = session.submit_message(body, done, post=now)
        except DisconnectedError as error:
            return self._lost(error)
        if notify and self._dirty:
            self.notify()
        return result

    def register(self, buffer: LocalBuffer, access: Access, *, filled: Callable[[int, int], None] | None = None,
                 returned: Callable[[], None] | None = None, direct: bool = True,
                 outlives: bool = False) -> Registration:
        """Let others reach a buffer, by references that the registration mints and that go in any message.

        Args:
            buffer: of any type. Pages of a pool are retained: they neither move nor go meanwhile.
            access: most that a reference can allow.
            filled: told (offset, length) within the buffer when a holder says that it has filled that.
            returned: told when pages that were handed over are back.
            direct: False gives nobody a lease: the bytes go by owner copy only.
            outlives: stays until it is unregistered; by default it is unregistered when this connection ends.

        Raises:
            BackPressuredError: all registrations are in use.
            NotConnectedError: there is no connection that it could belong to.
            MisuseError: the endpoint has no resources for remote buffers, or the buffer was released.
        """
        return self._sharing.register(buffer, access, filled=filled, returned=returned, direct=direct,
                                      outlives=outlives)

    def remote(self, reference: bytes, *, route: Route | None = None,
               revoked: Callable[[], None] | None = None) -> RemoteBuffer:
        """The buffer behind a reference that came through this connection.

        Args:
            reference: its bytes.
            route: force it, for tests and measurements.
            revoked: told when the owner wants back what is held of it here.

        Raises:
            MisuseError: the bytes are no reference, or the endpoint has no resources for remote buffers.
            BackPressuredError: too many are open.
            NotConnectedError: there is no connection.
        """
        return self._sharing.remote(reference, route=route, revoked=revoked)

    @property
    def _sharing(self) -> Party:
        if self._party is None:
            raise MisuseError("this endpoint has no resources for remote buffers: pass Resources(remote=Remote(...))")
        return self._party

    def notify(self) -> None:
        """Wake the peer for what was submitted."""
        if self._dirty and self._carrier is not None:
            self._dirty = False
            try:
                self._carrier.flush()
            except DisconnectedError as error:
                self._lost(error)
                return
            if self._flushed is not None:
                self._flushed()

    @property
    def trace(self) -> EndpointTrace | None:
        """What this end logs to, of `idc.trace.Tracer.endpoint`; None, as at first: to nothing. Set it at any time."""
        return self._trace

    @trace.setter
    def trace(self, trace: EndpointTrace | None) -> None:
        if self._trace is not None:
            self._trace.drain()
        self._trace = trace
        if self._session is not None:
            self._session.trace = self._flushed = None
        if self._carrier is not None:
            if self._session is not None:
                self._session.send = self._carrier.send
            self._note(trace, self._carrier)
        if trace is not None:
            trace.state(self.state.value, self.reason)

    @property
    def outstanding(self) -> int:
        """Own messages and transactions that have not completed."""
        return self._resources.requests.outstanding + self._resources.messages.outstanding

    @property
    def peer_quotas(self) -> Quotas:
        """What the peer accepts; nothing while not connected."""
        if self._session is None or self.state is not State.CONNECTED:
            return Quotas(0, 0, 0, 0)
        return self._session.peer

    @property
    def quotas(self) -> Quotas:
        """What this side accepts."""
        return self._resources.accepts

    @property
    def status(self) -> Status:
        """How it is, for people and monitors: a peer that is slow or stopped, or rings without end, shows here."""
        masking = self._port.masking
        return Status(self.state, self.reason, self.connections, self.outstanding,
                      0 if self._session is None else self._session.held, masking.times, masking.now)

    def disconnect(self, reason: str = "closed by the other side") -> None:
        """End this connection; what is outstanding completes with *outcome unknown*. A new one follows `done`."""
        if self.state is State.CONNECTED:
            self._end(Event.LOST, "closed by this side", bye=reason)

    def accuse(self, reason: str) -> None:
        """End this connection because the peer broke a rule of the client's own; it is told which.

        As after a breach of the endpoint's protocol, the next connection waits a while, ever longer.
        """
        if self.state is State.CONNECTED:
            self._lost(ProtocolError(reason), bye=reason)

    def destroy(self, done: Callable[[], None] | None = None) -> None:
        """End for good: `done` is called after the client was told disconnect and disappear; if called again, each is.

        The resources are free then. May be called from within any callback.
        """
        if self.state is State.DESTROYED and self._resources.user is not self:
            if done is not None:
                done()
            return
        if done is not None:
            self._destroyed.append(done)
        self._end(Event.DESTROY, "destroyed by this side", bye="the endpoint was destroyed")

    def abandon(self) -> None:
        """Destroy on behalf of a client that will not complete the disconnect, nor what it received."""
        self.destroy()
        if self.state is State.DESTROYING:
            self._step(Event.DONE)

    # -- driving it

    def pump(self, timeout: float = 0.0) -> bool:
        """Do what is due; if nothing is, wait up to `timeout` seconds for something. Whether anything happened."""
        if (line := self._line) is not None:
            session, body, _room = self._session, self._body, self._carrier  # which holds the memory
            assert session is not None
            try:
                rc = _request(line, timeout)
                if rc >= 0:
                    came = _new(IncomingTransaction)
                    came.parameters = _unpack(body, rc)
            except BaseException:
                self._hold()  # what came is for the next turn
                raise
            if rc < 0:
                return self._other(line, rc, timeout)
            if not line.holds:
                return True  # a signal's handler has driven this, and dealt with it
            came._line, came._open, came._session = line, True, session  # no call from the look on: no signal
            session.current = came
            try:
                self._client.transaction(self, came)
            except Exception as error:  # as in `_take`
                self._raised(came, error)
            except BaseException:
                self._hold()
                raise
            if came._open or self._line is None:
                self._hold()
                self._after()
            return True
        if self._party is None and self.state is _CONNECTED:
            return self._turn(timeout)
        party, worked = self._party, False
        if party is not None:
            worked = party.work()
            if worked or party.busy:
                timeout = 0.0
            elif (due := party.patience) is not None:
                timeout = min(timeout, due)
        if self.state is _CONNECTED:
            return self._take(timeout) or worked
        if self.state is State.DESTROYED:
            return worked
        return self._establish(timeout) or worked

    def fileno(self) -> int:
        """Readable when `pump` has something to do, once `arm` has said True."""
        return self._port.fileno()

    def arm(self) -> bool:
        """Before sleeping on `fileno`: False if there is something to do already, so pump instead."""
        if self.state is State.DESTROYED:
            return True
        self.notify()
        if self._trace is not None:
            self._trace.drain()
        self._port.wait(0.0)  # takes the wake-ups so far: what comes from here on makes it readable again
        if self._inbox or (self._party is not None and self._party.busy):
            return False
        if self.state is State.CONNECTED and self._carrier is not None:
            try:
                return self._carrier.arm()
            except DisconnectedError:
                return False
        return not self._progress()

    @property
    def patience(self) -> float | None:
        """Longest sleep on `fileno`, seconds, before `pump` is due anyway; None when only a wake-up counts."""
        if self.state is State.CONNECTED:
            due = self._port.patience
        else:
            due = None if self.state is State.DESTROYED else UNCONNECTED_LOOK
        party = self._party.patience if self._party is not None else None
        return min((sleep for sleep in (due, party) if sleep is not None), default=None)

    def _establish(self, timeout: float) -> bool:
        if self._progress():
            return True
        if timeout <= 0:
            return False
        pause = self._pauses.left
        if pause > 0 and self.state is State.PRESENT:
            time.sleep(min(pause, timeout))
        else:
            self._port.wait(timeout)
        return self._progress()

    def _progress(self) -> bool:
        if self.state is State.DESTROYING:
            return False  # only the client's `done` leads on
        before = self.state, self._session
        there = self._port.look()
        if there and self.state in (State.ABSENT, State.VANISHING):
            self._step(Event.APPEARED)
        elif not there and self.state in (State.PRESENT, State.DISCONNECTING):
            self._drop("the peer disappeared")
            self._step(Event.DISAPPEARED)
        if self.state is State.PRESENT and self._pauses.left <= 0:
            self._greet()
        return (self.state, self._session) != before

    def _greet(self) -> None:
        if self._carrier is None:
            carrier = self._port.connection()
            if carrier is None:
                return
            self._begin(carrier)
            if self._carrier is None:
                return  # it does not fit, or is over already
        assert self._session is not None
        try:
            self._inbox.extend(self._carrier.take(0.0))
            while self._inbox and not self._session.greeted:
                self._session.receive(self._inbox.popleft())
        except DisconnectedError as error:
            self._drop(str(error))
            self._pauses.failed()
            return
        if self._session.greeted:
            self.connections += 1
            self._pauses.connected()
            self._prepare(self._carrier, self._session)
            if self._party is not None:
                self._party.begin(self._session, near=self._carrier.near)
            self._step(Event.CONNECTED)

    def _prepare(self, carrier: Carrier, session: Session) -> None:
        if self._party is None and (line := carrier.line) is not None:
            quick.prepare(line, session.accepts, session.peer, carrier.trips)
            session.hold, session.due = self._hold, self._drain
            self._core = line
            self._body, self._status = quick.bodies(line)

    def _begin(self, carrier: Carrier) -> None:
        resources = self._resources
        accepts, asks = resources.accepts, None
        if (remote := resources.remote) is not None:
            asks, room = remote.asks, carrier.frame_bytes - frames.HEADER_BYTES
            if room >= frames.ASK_BYTES:  # else the frames are refused below, with both numbers
                accepts = replace(accepts, asks=remote.serves, ask_bytes=min(remote.ask_bytes, room))
        session = Session(accepts, resources.requests, resources.messages, self._post, asks)
        self._carrier, self._session, self._broken = carrier, session, None
        session.send, session.waiting, session.broke = carrier.send, self._inbox, self._broke
        if carrier.trips is not None:
            session.timed = carrier.trips.took
        self._inbox.clear()
        if self._trace is not None:
            self._note(self._trace, carrier)
        try:
            resources.check(carrier, accepts)
            carrier.post(frames.hello(accepts))
            carrier.flush()
        except DisconnectedError as error:
            self._drop(str(error))
            self._pauses.failed()

    def _note(self, trace: EndpointTrace | None, carrier: Carrier) -> None:
        """The moments of a connection's frames go there from now on: by the carrier, or else by the session."""
        if trace is not None:
            trace.connected(carrier)
        elsewhere = carrier.traced(trace)
        if trace is not None and not elsewhere and self._session is not None:
            self._session.trace, self._flushed = trace.note, trace.flushed
            self._session.send = self._post  # `notify` tells of it
            self._hold()  # it notes what the core would not

    def _post(self, frame: bytes, body: bytes = b"") -> None:
        carrier = self._carrier
        assert carrier is not None
        try:
            if body:
                carrier.post(frame, body)
            else:
                carrier.post(frame)
        except DisconnectedError as error:
            self._broke(error)
            raise
        self._dirty, self._line = True, None

    def _broke(self, error: DisconnectedError) -> None:
        self._line = None
        self._broken = error  # an answer that could not be sent is not its sender's fault: `pump` ends it

    def _take(self, timeout: float) -> bool:
        if self._dirty and not (self._carrier is not None and self._carrier.flushes):
            self.notify()
        inbox = self._inbox
        try:
            if self._broken is not None:
                raise self._broken
            if inbox:
                frame = inbox.popleft()
            else:
                if self._carrier is None:
                    return True  # it was lost just now
                taken = self._carrier.take(timeout)
                if not taken:
                    if self._trace is not None:
                        self._trace.drain()
                    return False
                frame = taken[0]
                if len(taken) > 1:
                    inbox.extend(taken)
                    inbox.popleft()
            client = self._client
            while True:
                event = self._session.receive(frame)  # type: ignore[union-attr] # a handler may have made a new one
                if type(event) is IncomingTransaction:
                    try:
                        client.transaction(self, event)
                    except Exception as error:  # whatever a handler raises is its submitter's to know
                        self._raised(event, error)
                else:
                    self._handle(event)
                if self._broken is not None:
                    raise self._broken
                if not inbox or self.state is not _CONNECTED:
                    break
                frame = inbox.popleft()
        except ProtocolError as error:
            self._lost(error, bye=str(error))
        except DisconnectedError as error:
            self._lost(error)
        if self._dirty:
            self.notify()
        return True

    def _other(self, line: Pointer, rc: int, timeout: float) -> bool:
        """No request came by the core, or not only one."""
        if rc in quick.NOTHING:
            self._drain()
            return False
        if rc == quick.INTERRUPTED:
            timeout = max(timeout - line.waited_ns / 1e9, 0.0)
        self._hold()
        return self._turn(timeout)

    def _turn(self, timeout: float) -> bool:
        session = self._session
        if self._resources.requests.line is not None or (session is not None and session.current is not None):
            self._hold()  # what is taken from here on is behind what it has, and judged with it
        worked = self._take(timeout)
        if self._core is not None:
            self._quicken()
        return worked

    def _hold(self) -> None:
        """The core takes and sends nothing before a turn ends. What it has is the session's now, or in the inbox."""
        self._line = None
        if self._session is not None:
            self._session.settle()
        line, slots = self._core, self._resources.requests
        if line is not None and (line.holds or line.got or line.other):
            quick.give_back(line, self._inbox)
        if slots.user is self:
            slots.unquicken()

    def _drain(self) -> None:
        """Log what is noted."""
        if self._trace is not None:
            self._trace.drain()

    def _after(self) -> None:
        """The end of a turn."""
        if self._broken is not None:
            self._lost(self._broken)
        elif self._dirty:
            self.notify()

    def _quicken(self) -> None:
        """Leave to the core what is usual, if nothing else is due or under way."""
        session, line, slots = self._session, self._core, self._resources.requests
        if (session is None or line is None or session.trace is not None or self._dirty or self._inbox
                or self._broken is not None or self.state is not _CONNECTED or line.holds):
            return
        idle = slots.count == len(slots.free)  # else what comes next is an answer
        if idle and not session.held and session.accepts.requests:
            self._line = line
        if idle and slots.line is None and slots.count and session.peer.requests:
            slots.quicken(line, self._status, self)

    def _handle(self, event: Incoming | IncomingAsk | list[tuple[Done | None, Completion]]) -> None:
        if type(event) is list:
            if len(event) == 1:
                done, completion = event[0]
                if done is not None:
                    done(completion)
            else:
                deliver(event)
        elif type(event) is IncomingAsk:
            self._sharing.serve(event)
        else:
            assert isinstance(event, IncomingMessage)
            try:
                self._client.message(self, event)
            except Exception as error:  # as with a transaction
                self._raised(event, error)

    def _raised(self, event: Incoming, error: Exception) -> None:
        log.error("a handler of %s failed", type(self._client).__name__, exc_info=error)
        if not event.completed:
            if isinstance(event, IncomingTransaction):
                event.fail(f"{type(error).__name__}: {error}")
            else:
                event.complete()

    # -- the end of a connection

    def _unconnected(self) -> Result:
        gone = self.state in (State.DESTROYED, State.DESTROYING)
        return Result.CLOSED if gone else Result.NOT_CONNECTED

    def _lost(self, error: DisconnectedError, bye: str = "") -> Result:
        self._end(Event.LOST, str(error), bye=bye, fault=isinstance(error, ProtocolError | CorruptError))
        return Result.NOT_CONNECTED

    def _end(self, event: Event, reason: str, *, bye: str, fault: bool = False) -> None:
        """The lifecycle first closes the carrier, so that nothing more can be sent or taken, then tells the client."""
        if self._carrier is not None:
            self._drop(reason, bye=bye)
            if fault:
                self._pauses.failed()
        self._step(event)

    def _drop(self, reason: str, bye: str = "") -> None:
        self._hold()
        carrier, self._carrier, self._core = self._carrier, None, None
        self._dirty = False
        self._broken = None
        self._inbox.clear()
        if carrier is None:
            return
        self.reason = reason
        with contextlib.suppress(DisconnectedError):
            if bye:
                carrier.post(frames.bye(bye))
            carrier.flush()
        carrier.close()

    def _step(self, event: Event) -> None:
        self.state, actions = step(self.state, event)
        if self._trace is not None:
            self._trace.state(self.state.value, self.reason)
        call_each(functools.partial(self._act, action) for action in actions)

    def _act(self, action: Action) -> None:
        if action is Action.FAIL_ALL:
            ended = self._session.end(self.reason) if self._session is not None else []
            parties = [functools.partial(self._party.end, self.reason)] if self._party is not None else []
            call_each([functools.partial(deliver, ended), *parties])
        elif action is Action.TELL_APPEAR:
            self._client.appear(self)
        elif action is Action.TELL_CONNECT:
            self._client.connect(self)
        elif action is Action.TELL_DISCONNECT:
            self._tell_disconnect()
        elif action is Action.TELL_DISAPPEAR:
            self._client.disappear(self)
        else:
            self._resources.user = None
            told, self._destroyed = self._destroyed, []
            call_each([self._port.close, *told])

    def _tell_disconnect(self) -> None:
        session, called = self._session, False

        def done() -> None:
            nonlocal called
            if called:
                raise MisuseError("done of this disconnect was called before")
            called = True
            if session is not None and session.held:
                session.on_last = lambda: self._step(Event.DONE)
            else:
                self._step(Event.DONE)

        self._client.disconnect(self, done)
