"""A transaction as its domain sees it. Depends on idc.registry.operations and idc.errors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Self

from idc.errors import ConflictError, IdcError, MisuseError, NoSuchKeyError, OutcomeUnknownError
from idc.registry import frames
from idc.registry.frames import Fault, Op, Request
from idc.registry.operations import Operations, within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from idc.errors import RegistryError

_CHANGES: Final = frozenset({Op.WRITE, Op.MKDIR, Op.RM, Op.PERMIT})
_LOST: Final = "the link to the registry was lost since the transaction began: repeat it"


class Transaction(Operations):
    """Several operations as one, upon the tree as it was at the beginning.

    A context manager: leaving it commits, unless an exception is on its way. Made by `Registry.transaction`. Together,
    changes wait for nothing: they are sent before whatever comes next that has an answer, the end too, which then also
    raises what they would have raised.

    Raises:
        ConflictError: at the end, and at operations: others changed what it has read or written, or the link was lost;
            nothing of it was done.
        OutcomeUnknownError: at the end: the link was lost while it was committed.
    """

    def __init__(self, ask: Callable[[Request], bytes], wrote: Callable[[str, bytes | None], None],
                 connections: Callable[[], int],
                 ask_all: Callable[[Sequence[Request]], Sequence[RegistryError | None]] | None = None) -> None:
        self._ask_registry = ask
        self._ask_all = ask_all
        self._owed: list[Request] = []
        self._lax: set[int] = set()
        self._note = wrote
        self._connections = connections
        self._number = 0
        self._began = 0
        self._noted: list[tuple[str, bytes | None]] = []

    def _ask(self, request: Request) -> bytes:
        if not self._number:
            raise MisuseError("this transaction is not open: use it in a with statement")
        if self._connections() != self._began:
            raise ConflictError(Fault.CONFLICT, _LOST)
        if self._ask_all is not None and request.op in _CHANGES:
            self._owed.append(within(request, self._number))
            return b""
        if request.op is not Op.ABORT:
            self._settle()
        try:
            return self._ask_registry(within(request, self._number))
        except OutcomeUnknownError:
            if request.op is Op.COMMIT:
                raise
            raise ConflictError(Fault.CONFLICT, _LOST) from None

    def clear(self, path: str) -> None:
        """As `rm`, but it makes no difference whether there is such a node. Raises OutcomeUnknownError."""
        with contextlib.suppress(NoSuchKeyError):
            before = len(self._owed)
            self.rm(path)
            if len(self._owed) > before:
                self._lax.add(before)

    def _settle(self) -> None:
        """Send what has waited."""
        owed, lax, self._owed, self._lax = self._owed, self._lax, [], set()
        if not owed or self._ask_all is None:
            return
        try:
            refusals = self._ask_all(owed)
        except OutcomeUnknownError:
            raise ConflictError(Fault.CONFLICT, _LOST) from None
        for number, refusal in enumerate(refusals):
            if refusal is not None and not (number in lax and isinstance(refusal, NoSuchKeyError)):
                raise refusal

    def _wrote(self, path: str, value: bytes | None) -> None:
        self._noted.append((path, value))

    def __enter__(self) -> Self:
        if self._number:
            raise MisuseError("this transaction is open already")
        self._number = frames.parse_number(self._ask_registry(Request(Op.BEGIN)))
        self._began = self._connections()
        self._noted.clear()
        self._owed.clear()
        self._lax.clear()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                try:
                    self._settle()
                except BaseException:
                    self._abort()
                    raise
                self._ask(Request(Op.COMMIT))
                for path, value in self._noted:
                    self._note(path, value)
                return
            self._abort()
        finally:
            self._number = 0

    def _abort(self) -> None:
        with contextlib.suppress(IdcError):  # it is over anyway, and what is on its way says more
            self._ask(Request(Op.ABORT))
