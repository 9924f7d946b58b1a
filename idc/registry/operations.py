"""Operations that work the same within a transaction and outside. Depends on idc.registry.frames and idc.errors."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from idc.errors import NoSuchKeyError, RegistryError
from idc.registry import frames
from idc.registry.frames import Fault, FrameError, Op, Request

if TYPE_CHECKING:
    from idc.registry.frames import Permissions


class Operations:
    """What one can do with nodes. All raise, besides what each says:

    DeniedError: the permissions do not allow it.
    RegistryError: refused for another reason, which the text says.
    MisuseError: no path, or a value that is too long.
    TimedOutError: no answer in time, or the registry is not there.
    ConflictError: within a transaction: others changed what it relies on. Repeat it.
    """

    def _ask(self, request: Request) -> bytes:
        """The status of the answer."""
        raise NotImplementedError

    def _wrote(self, path: str, value: bytes | None) -> None:
        """Remember an ephemeral node, or that there is none at or below the path any more."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        """A node's value. Raises NoSuchKeyError."""
        return self._ask(Request(Op.READ, path))

    def get(self, path: str) -> bytes | None:
        """A node's value; None if there is no such node."""
        try:
            return self.read(path)
        except NoSuchKeyError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is such a node."""
        return self.get(path) is not None

    def write(self, path: str, value: bytes | str, *, ephemeral: bool = False) -> None:
        """Set a node's value, and make the node and those above it where there are none.

        Args:
            path: of the node.
            value: 2048 bytes at most; text is written in UTF-8.
            ephemeral: the node vanishes when this domain's link or life ends; it can have no nodes below.

        Raises:
            QuotaError: too many nodes or bytes of this domain.
            OutcomeUnknownError: the link was lost meanwhile: it was done, or not.
        """
        data = value.encode() if isinstance(value, str) else value
        self._ask(Request(Op.WRITE, path, rest=data, ephemeral=ephemeral))
        self._wrote(path, data if ephemeral else None)

    def mkdir(self, path: str) -> None:
        """Make a node with an empty value, unless there is one. Raises as `write`."""
        self._ask(Request(Op.MKDIR, path))

    def rm(self, path: str) -> None:
        """Remove a node and all below it; each must allow it. Raises NoSuchKeyError, OutcomeUnknownError."""
        self._ask(Request(Op.RM, path))
        self._wrote(path, None)

    def list(self, path: str) -> list[str]:
        """Names of the nodes right below, sorted. Raises NoSuchKeyError."""
        names: list[str] = []
        more = True
        while more:
            status = self._ask(Request(Op.LIST, path, rest=names[-1].encode() if names else b""))
            try:
                page, more = frames.parse_names(status)
            except FrameError as error:
                raise RegistryError(Fault.MALFORMED, f"the registry answers with {error}") from error
            names += page
            more = more and bool(page)
        return names

    def tree(self, path: str) -> dict[str, bytes]:
        """Values of the node and of those below it, by their paths below it; "" is the node's own. Left out is what
        this domain may not read, and all below that. Of up to 4,000 bytes all are of one moment, of more within a
        transaction. Raises NoSuchKeyError.
        """
        found: dict[str, bytes] = {}
        more, after = True, b""
        while more:
            status = self._ask(Request(Op.TREE, path, rest=after))
            try:
                page, more = frames.parse_nodes(status)
            except FrameError as error:
                raise RegistryError(Fault.MALFORMED, f"the registry answers with {error}") from error
            found |= page
            more = more and bool(page)
            after = b"/" + list(page)[-1].encode("latin-1") if page else b""
        return found

    def permissions(self, path: str) -> Permissions:
        """A node's permissions. Raises NoSuchKeyError."""
        try:
            return frames.parse_permissions(self._ask(Request(Op.ACCESS, path)))
        except FrameError as error:
            raise RegistryError(Fault.MALFORMED, f"the registry answers with {error}") from error

    def set_permissions(self, path: str, permissions: Permissions) -> None:
        """Replace a node's permissions, as its owner or the host; only the host changes the owner.

        Raises NoSuchKeyError, OutcomeUnknownError.
        """
        self._ask(Request(Op.PERMIT, path, rest=frames.pack_permissions(permissions)))


def within(request: Request, transaction: int) -> Request:
    """The same as part of a transaction."""
    return replace(request, transaction=transaction)
