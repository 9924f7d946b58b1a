"""Transactions of an endpoint whose frames the C core moves and checks: for data pumps, and for handlers in C.

    engine = Engine(requests=64)
    endpoint = engine.endpoint(open_port("ivshmem:link/requests"), client)
    ...                                          # endpoint.pump() until connected, as with any other
    engine.submit(b"...", cookie=1)              # many of them
    for cookie, completion in engine.poll(1.0):  # one notify, then whatever has completed
        ...

The endpoint's life (HELLO, quotas, disconnect, BYE) and its messages stay in Python, unchanged. Once HELLO has come,
the core takes the replies to what `submit` sent, and answers requests by its handler if it has one; each other frame
goes to the endpoint's session, which is also the only judge of frames that break a rule. The peer cannot tell: it may
be an engine or a plain endpoint. What the endpoint's `trace` is set to, the core's transactions go to as well, from the
next `poll` on; up to 160 of their moments are with the core until there are more, or nothing comes. Only over shared
memory. Belongs to the thread of its endpoint. Depends on idc._core, idc.endpoint and idc.transport.shared.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from idc._core import ffi, lib
from idc.endpoint import frames
from idc.endpoint.endpoint import Client, Endpoint, Resources
from idc.endpoint.frames import HANDLER_FAILED, HEADER_BYTES, MAX_SLOTS, Kind
from idc.endpoint.lifecycle import State
from idc.endpoint.results import Completion, Result
from idc.errors import DisconnectedError, MisuseError, ProtocolError, TooBigError
from idc.ringbase import Deadline

if TYPE_CHECKING:
    from collections.abc import Sequence

    from idc._core import Pointer
    from idc.endpoint.frames import Quotas
    from idc.remote.resources import Remote
    from idc.trace.hook import EndpointTrace
    from idc.transport.base import Masking, Rings
    from idc.transport.shared import SharedCarrier, SharedPort
    from idc.words import Readable

    #: What `poll` returns: cookies as submitted, and how it ended.
    Completed = list[tuple[int, Completion]]

#: Events taken in one call into the core.
BATCH: Final = 64
#: Requests handled in one call: then the interpreter has its turn, for signals.
BUDGET: Final = 1 << 14
#: Moments that the core can note in one call, while they are traced, and how many are worth to be taken from it: as
#: many as one event has (`idc.trace.hook`, which is not loaded for an endpoint without a trace).
MOMENTS: Final = 4096
SOME: Final = 160
#: Bytes of one.
MOMENT: Final = 24


class Engine:
    """The core's share of one endpoint, and the resources of all of it, set aside now. Serves one endpoint at a time.

    Args:
        requests: transactions outstanding at a time by `submit`.
        accepts: what the peer may do: see Quotas.
        handler: a C function (`idc_handler` in idc/endpoint/transact.h) that answers requests; NULL leaves them to
            the client. What it leaves open (IDC_AGAIN) goes to the client too.
        context: handed to the handler; it and the handler must outlive the engine.
        python_requests: transactions outstanding at a time by the endpoint's own `submit_transaction`. Of the peer's
            quota these come first.
        messages: own messages outstanding at a time.
        remote: see Resources.
        pump: a `struct idc_pump` (idc/pump/pump.h), which moves data whenever the engine works, and in whose loop it
            waits; it must outlive the engine. NULL: there are only frames to move.

    Attributes:
        resources: of the endpoint.
        completed: what the next `poll` returns.
        wanted_trace: where moments go from the next call into the core on: the endpoint's `trace`.
    """

    def __init__(self, requests: int = 64, accepts: Quotas | None = None, *, handler: Pointer = ffi.NULL,
                 context: Pointer = ffi.NULL, python_requests: int = 0, messages: int = 16,
                 remote: Remote | None = None, pump: Pointer = ffi.NULL) -> None:
        if requests < 0 or python_requests < 0 or requests + python_requests > MAX_SLOTS:
            raise MisuseError(f"{requests} and {python_requests} requests: a side has {MAX_SLOTS} slots at most")
        self.resources = _Resources(requests, accepts, python_requests, messages, remote)
        quotas = self.resources.accepts
        self._slots = ffi.new("struct idc_pending[]", max(requests, 1))
        self._held = ffi.new("uint32_t[]", max(quotas.requests, 1))
        self._core = ffi.new("struct idc_engine *", {
            "handler": handler, "context": context, "slots": self._slots, "held": self._held, "base": python_requests,
            "count": requests, "accepts": quotas.requests, "parameter_bytes": quotas.parameter_bytes,
            "status_bytes": quotas.status_bytes})
        if pump != ffi.NULL:
            pump.engine = self._core
        self._run, self._runner = (lib.idc_pump_run, pump) if pump != ffi.NULL else (lib.idc_engine_run, self._core)
        self._events = ffi.new("struct idc_event[]", BATCH)
        self._status = self._inbox = ffi.NULL
        self._inbox_bytes = 0
        self._carrier: _EngineCarrier | None = None
        self._endpoint: Endpoint | None = None
        self._trace: EndpointTrace | None = None
        self.wanted_trace: EndpointTrace | None = None
        self._moments = ffi.NULL
        self.completed: Completed = []

    def endpoint(self, port: SharedPort, client: Client | None = None) -> Endpoint:
        """An endpoint whose transactions this engine moves. Raises MisuseError while it serves another."""
        made = _Endpoint(self, port, client or Client())
        self._make_room(port.frame_bytes)  # nobody uses the old room now
        self._endpoint = made
        return made

    @property
    def outstanding(self) -> int:
        """Transactions of `submit` that have not completed; what has completed may still wait for `poll`."""
        return int(self._core.outstanding)

    def submit(self, parameters: Readable, cookie: int = 0) -> Result:
        """Send a transaction, leaving the peer asleep until `notify`, `poll` or a pump of the endpoint.

        Args:
            parameters: at most what the peer accepts.
            cookie: 64 bits of the caller's own, that come back with the completion.

        Returns:
            OK, BACK_PRESSURED, NOT_CONNECTED or CLOSED; nothing was sent unless OK.

        Raises:
            TooBigError: the parameters are longer than the peer accepts.
        """
        endpoint, carrier = self._connected()
        if carrier is None:
            gone = endpoint is None or endpoint.state in (State.DESTROYED, State.DESTROYING)
            return Result.CLOSED if gone else Result.NOT_CONNECTED
        rc = lib.idc_engine_submit(self._core, ffi.from_buffer(parameters), len(parameters), cookie)
        if rc == lib.IDC_OK:
            return Result.OK
        if rc == lib.IDC_AGAIN:
            return Result.BACK_PRESSURED
        if rc == lib.IDC_TOOBIG:
            raise TooBigError(f"{len(parameters)} bytes in a request, the peer accepts "
                              f"{self._core.peer_parameter_bytes}")
        assert endpoint is not None
        carrier.broken = carrier.failure(rc)
        endpoint.pump(0.0)  # which meets that end and draws the consequences
        return Result.NOT_CONNECTED

    def notify(self) -> None:
        """Wake the peer for what was submitted."""
        if self._carrier is not None:
            with contextlib.suppress(DisconnectedError):
                self._carrier.flush()

    def poll(self, timeout: float = 0.0) -> Completed:
        """Drive the endpoint, waiting up to `timeout` seconds for something to happen, and take what has completed.

        What was lost with a connection completes with *outcome unknown*.
        """
        endpoint, carrier = self._connected()
        if not self.completed and endpoint is not None:
            if carrier is None:
                endpoint.pump(timeout)
            elif carrier.fill(timeout):
                endpoint.pump(0.0)
        done, self.completed = self.completed, []
        return done

    def _connected(self) -> tuple[Endpoint | None, _EngineCarrier | None]:
        endpoint = self._endpoint
        up = endpoint is not None and endpoint.state is State.CONNECTED
        return endpoint, self._carrier if up else None

    def _make_room(self, frame_bytes: int) -> None:
        if frame_bytes > self._inbox_bytes:
            self._inbox_bytes = frame_bytes
            self._inbox = ffi.new("uint8_t[]", BATCH * frame_bytes)
            self._status = ffi.new("uint8_t[]", frame_bytes)

    # -- for the carrier

    def start(self, carrier: _EngineCarrier, peer: Quotas, sender: Pointer, receiver: Pointer) -> None:
        """A connection has begun: the peer's HELLO came."""
        core = self._core
        core.tx, core.rx, core.status, core.trips = sender, receiver, self._status, carrier.trips.struct
        core.peer_parameter_bytes = peer.parameter_bytes
        core.peer_status_bytes = min(peer.status_bytes, carrier.frame_bytes - HEADER_BYTES)
        core.most = max(min(core.count, peer.requests - core.base), 0)
        if lib.idc_engine_start(core) != lib.IDC_OK:
            raise MisuseError("these rings carry no messages")
        self._carrier = carrier
        self._turn()

    def run(self, spin_ns: int, timeout_ns: int) -> tuple[int, list[bytes]]:
        """One call into the core: its result, and the frames that it left to Python."""
        core, inbox, left = self._core, self._inbox, []
        core.budget = BUDGET
        if self.wanted_trace is not self._trace:
            self._turn()
        count = self._run(self._runner, inbox, BATCH * self._inbox_bytes, self._events, BATCH, spin_ns, timeout_ns)
        if self._trace is not None and (core.moments_count >= SOME or (count <= 0 and timeout_ns != 0)):
            self._take_moments(self._trace)
        for index in range(count):
            event = self._events[index]
            body = ffi.unpack(ffi.cast("char *", inbox + event.at), event.len)
            if event.kind == lib.IDC_COMPLETED:
                self.completed.append((event.cookie, completion(event.error, body)))
            else:
                left.append(body)
        return count, left

    def _turn(self) -> None:
        """Tracing is turned on, or off."""
        if self._trace is not None:
            self._take_moments(self._trace)
        trace, core = self.wanted_trace, self._core
        self._trace = trace
        if trace is not None and self._moments == ffi.NULL:
            core.moments_room = SOME + MOMENTS + core.count
            self._moments = ffi.new("uint64_t[]", 3 * core.moments_room)
        core.moments = ffi.NULL if trace is None else self._moments

    def _take_moments(self, trace: EndpointTrace) -> None:
        core = self._core
        if core.moments_count:
            trace.add(memoryview(ffi.buffer(self._moments, MOMENT * core.moments_count)))
            core.moments_count = 0

    def answered(self, tag: int) -> None:
        """Python has answered a request that the core left to it."""
        lib.idc_engine_answered(self._core, tag)

    def stop(self, carrier: _EngineCarrier, reason: str) -> None:
        """The connection is over: what is outstanding has an unknown outcome."""
        if self._carrier is not carrier:
            return
        self._carrier = None
        if self._trace is not None:
            self._take_moments(self._trace)
        self._core.trips = ffi.NULL
        unknown = Completion(Result.OUTCOME_UNKNOWN, reason=reason)
        for slot in self._slots[0:self._core.count]:
            if slot.busy:
                slot.busy = 0
                self.completed.append((slot.cookie, unknown))
        self._core.outstanding = 0


def completion(error: int, status: bytes) -> Completion:
    """What a reply with these means."""
    if error == HANDLER_FAILED:
        return Completion(Result.ERROR, error, b"", frames.reason_text(status) or "the handler failed")
    return Completion(Result.OK, error, status)


class _Resources(Resources):
    """With the engine's slots, which need room in the carrier as well."""

    def __init__(self, engine_requests: int, accepts: Quotas | None, requests: int, messages: int,
                 remote: Remote | None) -> None:
        super().__init__(accepts, requests=requests, messages=messages, remote=remote)
        self._engine_requests = engine_requests

    @property
    def frames(self) -> int:
        """See there."""
        return super().frames + self._engine_requests


class _Endpoint(Endpoint):
    """Tells the engine what it is traced by: to ask at each call into the core would cost 3 % of a transaction."""

    def __init__(self, engine: Engine, port: SharedPort, client: Client) -> None:
        super().__init__(_EnginePort(engine, port), client, engine.resources)
        self._engine = engine
        engine.wanted_trace = None

    @property
    def trace(self) -> EndpointTrace | None:
        """See there."""
        return self._trace

    @trace.setter
    def trace(self, trace: EndpointTrace | None) -> None:
        Endpoint.trace.fset(self, trace)  # type: ignore[attr-defined]
        self._engine.wanted_trace = trace


class _EnginePort:
    """See `idc.transport.base.Port`: one of a shared region, whose carriers the engine reads first."""

    def __init__(self, engine: Engine, port: SharedPort) -> None:
        self._engine = engine
        self._port = port
        self.look = port.look
        self.wait = port.wait
        self.fileno = port.fileno
        self.close = port.close
        self.regions = port.regions

    @property
    def masking(self) -> Masking:
        """See there."""
        return self._port.masking

    @property
    def patience(self) -> float | None:
        """See there."""
        return self._port.patience

    def connection(self) -> _EngineCarrier | None:
        """See there."""
        carrier = self._port.connection()
        return None if carrier is None else _EngineCarrier(self._engine, carrier)


class _EngineCarrier:
    """See `idc.transport.base.Carrier`: what the core has dealt with is not among the frames."""

    flushes = False
    line = None

    def __init__(self, engine: Engine, carrier: SharedCarrier) -> None:
        self.capacity = carrier.capacity
        self.frame_bytes = carrier.frame_bytes
        self.near = carrier.near
        self.flush = carrier.flush
        self.flows = carrier.flows
        self.trips = carrier.trips
        self.broken: DisconnectedError | None = None
        self._engine = engine
        self._carrier = carrier
        self._sender, self._receiver = carrier.channel.sender, carrier.channel.receiver
        self._left: list[bytes] = []
        self._started = False
        self.posted = False

    @property
    def rings(self) -> Rings:
        """See there."""
        return self._carrier.rings  # type: ignore[no-any-return]

    def post(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        self._carrier.post(frame, body)
        if frame[0] == Kind.REPLY:
            self._engine.answered(frames.HEADER.unpack_from(frame)[3])

    def send(self, frame: bytes, body: bytes = b"") -> None:
        """See there."""
        self.post(frame, body)
        with contextlib.suppress(DisconnectedError):
            self.flush()

    def traced(self, trace: EndpointTrace | None) -> bool:
        """See there."""
        del trace
        return False

    def exchange(self, frame: bytes, body: bytes, timeout: float) -> Sequence[bytes]:
        """See there. The core reads first, so whatever comes is left to `take`."""
        self.posted = False
        self.post(frame, body)
        self.posted = True
        with contextlib.suppress(DisconnectedError):
            self.flush()
        self.posted = False
        return ()

    def take(self, timeout: float) -> Sequence[bytes]:
        """See there. Before HELLO one frame at a time, so that the core has each after it."""
        if self._started:
            self.fill(0.0 if self._left else timeout)
            left, self._left = self._left, []
            if not left and self.broken is not None:
                raise self.broken
            return left
        first = self._carrier.take(timeout)  # whose first one comes alone
        if first and first[0][:1] == bytes([Kind.HELLO]):
            with contextlib.suppress(ProtocolError):  # the session says the same, to who can act on it
                peer = frames.parse_hello(frames.parse(first[0])[3])
                self._engine.start(self, peer, self._sender._ring, self._receiver._ring)
                self._started = True
        return first

    def fill(self, timeout: float) -> bool:
        """Let the core work; whether there is something for the endpoint to do."""
        waiting = Deadline(timeout)
        while self.broken is None:
            rc, left = self._engine.run(self._receiver._spin_ns, waiting.ns)
            self._left += left
            if rc != lib.IDC_INTR:
                if rc < 0 and rc not in (lib.IDC_AGAIN, lib.IDC_TIMEOUT):
                    self.broken = self.failure(rc)
                break
            waiting.update()
        return bool(self._left) or self.broken is not None

    def failure(self, rc: int) -> DisconnectedError:
        """What a result of the core means, which ends the connection."""
        for ring in (self._receiver, self._sender):
            if ring._ring.ended == rc:
                error = ring._fail(rc)
                assert isinstance(error, DisconnectedError)
                return error
        if rc == lib.IDC_CORRUPT:
            return ProtocolError("the peer does not take what it has asked for: the ring is full")
        raise self._receiver._fail(rc)

    def arm(self) -> bool:
        """See there. The engine's completions count: `poll` is due for them."""
        return not self._left and not self._engine.completed and self._carrier.arm()

    def close(self) -> None:
        """See there."""
        endpoint: Any = self._engine._endpoint
        self._engine.stop(self, endpoint.reason)
        self._carrier.close()
