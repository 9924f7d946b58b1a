"""What can go wrong between two domains: one tree of exceptions. Depends on nothing.

    IdcError
    ├── BackPressuredError      nothing to take, or no room, right now; try again or wait
    ├── TimedOutError           (also a TimeoutError) not within the time given; the connection still stands
    ├── TooBigError             the message does not fit a slot, or the buffer; nothing was moved
    ├── MisuseError             (also a ValueError) arguments or state that the library refuses
    │   └── HiddenError         the bytes of hidden pages were asked for by someone who may only pass them on
    ├── RefusedError            a request about a remote buffer was refused; `code` is the Refusal
    ├── FileRangeError          (also an OSError) the file under a buffer failed; `errno` says how
    ├── TransactionError        the other side completed the transaction with an error code of its own
    ├── RegistryError           the registry refused a request; `code` is the Fault
    │   ├── NoSuchKeyError      there is no such node
    │   ├── DeniedError         its permissions do not allow that to this domain
    │   ├── ConflictError       others changed what the transaction relied on: repeat it
    │   └── QuotaError          this domain has used up what it may have there
    ├── HandlerFailedError      the other side's handler of a message or transaction raised; the text says what
    └── DisconnectedError       this connection is over, for good
        ├── NotConnectedError   there was none yet
        ├── ClosedError         this side closed it
        ├── OutcomeUnknownError it was lost with a transaction under way, which may have been executed
        ├── PeerGoneError       the other side closed it, died or started again
        ├── ProtocolError       the other side broke the rules of frames; the text says which
        └── CorruptError        the shared memory holds what no honest peer writes; `reason` says what

Delivery is at most once: after DisconnectedError the fate of what the peer had not answered is unknown.
"""

from __future__ import annotations


class IdcError(Exception):
    """Base of all errors of the inter-domain communication library."""


class BackPressuredError(IdcError):
    """The ring is full (sending) or empty (receiving) at the moment.

    Attributes:
        done: bytes moved before that, of a call that moves bytes.
    """

    def __init__(self, text: str, done: int = 0) -> None:
        super().__init__(text)
        self.done = done


class TimedOutError(IdcError, TimeoutError):
    """Not within the time given; the connection still stands.

    Attributes:
        done: bytes moved before that, of a call that moves bytes.
    """

    def __init__(self, text: str, done: int = 0) -> None:
        super().__init__(text)
        self.done = done


class TooBigError(IdcError):
    """A message longer than a slot of the ring, or than the buffer to receive it; nothing was moved."""


class MisuseError(IdcError, ValueError):
    """Arguments or a state that the library refuses: a mistake of the caller, not of the peer."""


class HiddenError(MisuseError):
    """Hidden pages are not mapped here: they can be sliced, registered and passed on, not read or written."""


class RefusedError(IdcError):
    """A request about a remote buffer was refused: by its owner, a peer between, a broker, or this library.

    Attributes:
        code: an `idc.remote.Refusal`, or a number that this version does not know.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class FileRangeError(IdcError, OSError):
    """The file under a buffer could not be read or written in full.

    Attributes:
        errno: as the kernel gave it; ENODATA where the file ended before the range did.
        done: bytes moved before that.
    """

    def __init__(self, number: int, text: str, done: int = 0) -> None:
        super().__init__(number, text)
        self.done = done


class TransactionError(IdcError):
    """The other side completed the transaction with an error code of its own.

    Attributes:
        code: 1 to 65534; what it means is the service's business.
        status: what came with it.
    """

    def __init__(self, code: int, status: bytes) -> None:
        super().__init__(f"the transaction completed with error {code}")
        self.code = code
        self.status = status


class RegistryError(IdcError):
    """The registry refused a request.

    Attributes:
        code: an `idc.registry.Fault`, or a number that this version does not know.
    """

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class NoSuchKeyError(RegistryError):
    """The registry has no such node."""


class DeniedError(RegistryError):
    """The node's permissions do not allow that to this domain, or it may not know whether there is such a node."""


class ConflictError(RegistryError):
    """Others changed what a transaction has read or written since it began; nothing of it was done: repeat it."""


class QuotaError(RegistryError):
    """This domain has as many nodes, bytes, watches or transactions in the registry as it may have."""


class HandlerFailedError(IdcError):
    """The other side's handler raised; the text is its exception's."""


class DisconnectedError(IdcError):
    """This connection is over, for good; attach again for a new one.

    Attributes:
        done: bytes moved before that, of a call that moves bytes.
    """

    def __init__(self, text: str, done: int = 0) -> None:
        super().__init__(text)
        self.done = done


class NotConnectedError(DisconnectedError):
    """There is no connection yet."""


class ClosedError(DisconnectedError):
    """This side has closed the connection."""


class OutcomeUnknownError(DisconnectedError):
    """The connection was lost with a transaction under way: it was executed once, or not at all."""


class PeerGoneError(DisconnectedError):
    """The other side closed the connection, died, or started again."""


class ProtocolError(DisconnectedError):
    """The other side sent what no honest peer sends; the text says what."""


class CorruptError(DisconnectedError):
    """The shared memory holds what no honest peer writes.

    Attributes:
        reason: which word, in words.
        value: what it held.
    """

    def __init__(self, reason: str, value: int, done: int = 0) -> None:
        super().__init__(f"corrupt shared memory: {reason} (found {value:#x}); the connection is over", done)
        self.reason = reason
        self.value = value
