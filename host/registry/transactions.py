"""Open transactions: optimistic, upon a state that does not change, checked and done again at the end. No I/O.

Whatever an operation touches is noted as it was in the state the transaction began with. At the end the same must hold
in the state that has come about meanwhile; then the operations are done once more, on that one, as one edit. So those
that succeed are as if each had been done alone, at its end. Depends on host.registry.tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from host.registry import tree
from host.registry.tree import Edit, Limits, Node, Refused, State
from idc.registry import frames
from idc.registry.frames import Fault, Op, Permit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from idc.registry.frames import Request

#: What was changed at or below, in the set of names, or in the node: as `Node` counts it. None: no such node.
_MARKS: dict[str, Callable[[Node], int]] = {
    "node": lambda node: node.serial, "names": lambda node: node.names, "all": lambda node: node.deep,
}


def apply(edit: Edit, request: Request) -> None:
    """Do one operation that changes something. Raises Refused."""
    if request.op is Op.WRITE:
        edit.write(request.path, request.rest, ephemeral=request.ephemeral)
    elif request.op is Op.MKDIR:
        edit.mkdir(request.path)
    elif request.op is Op.RM:
        edit.rm(request.path)
    else:
        try:
            permissions = frames.parse_permissions(request.rest)
        except frames.FrameError as error:
            raise Refused(Fault.MALFORMED, str(error)) from error
        edit.permit(request.path, permissions)


def answer(state: State, who: str, request: Request) -> bytes:
    """The status of one operation that changes nothing. Raises Refused."""
    node = tree.node_for(state.root, who, request.path, Permit.READ)
    if request.op is Op.READ:
        return node.value
    if request.op is Op.ACCESS:
        return frames.pack_permissions(node.permissions)
    if request.op is Op.TREE:
        nodes = _readable(node, who, request.rest.decode("latin-1"))
        return frames.pack_nodes(nodes, frames.DOMAIN_ACCEPTS.status_bytes)
    names: list[str] = []
    after, room = request.rest.decode("latin-1"), frames.DOMAIN_ACCEPTS.status_bytes - 1
    for name in sorted(node.children):
        if name > after:
            room -= len(name) + 1
            if room < 0:
                return frames.pack_names(names, more=True)
            names.append(name)
    return frames.pack_names(names, more=False)


def _readable(node: Node, who: str, after: str) -> Iterator[tuple[str, bytes]]:
    """The node and those below it that `who` may read, from behind that one on; none below one that it may not, so
    that nobody has us look through what is not for it."""
    last = after[1:].split("/") if after[1:] else []
    waiting: list[tuple[list[str], Node]] = [([], node)]
    while waiting:
        parts, at = waiting.pop()
        if not at.permissions.of(who) & Permit.READ:
            continue
        if parts > last or not after:
            yield "/".join(parts), at.value
        waiting += [([*parts, name], at.children[name]) for name in sorted(at.children, reverse=True)
                    if not after or [*parts, name] >= last[:len(parts) + 1]]


#: The operations that change something.
MUTATIONS = frozenset({Op.WRITE, Op.MKDIR, Op.RM, Op.PERMIT})


class Open:
    """One open transaction.

    Args:
        state: that it begins with.
        who, session, limits: as of `Edit`.
        began: how many commits there had been.
    """

    def __init__(self, state: State, who: str, session: bytes, limits: Limits, began: int) -> None:
        self.began = began
        self.expired = False
        self._base: State | None = state
        self._session = session
        self._limits = limits
        self._edit: Edit | None = Edit(state, who, session, 0, limits)
        self._done: list[Request] = []
        self._noted: dict[tuple[str, str], int | None] = {}
        self._denied: list[Request] = []
        self._steps = 0

    def expire(self) -> None:
        """Let go of the state: it is too old."""
        self.expired = True
        self._base = self._edit = None

    def step(self, request: Request) -> bytes:
        """One operation of it. Raises Refused; the transaction stays open."""
        base, edit = self._alive()
        self._steps += 1
        if self._steps > self._limits.steps:
            raise Refused(Fault.QUOTA, f"a transaction of more than {self._limits.steps} operations")
        try:
            status = _do(edit, request)
        except Refused as refused:
            if refused.fault is Fault.DENIED:
                self._denied.append(request)  # and not how the node is: that would tell at the end that it changed
            else:
                self._note(base, edit.who, request, deep=True)
            raise
        self._note(base, edit.who, request)
        if request.op in MUTATIONS:
            self._done.append(request)
        return status

    def commit(self, state: State, serial: int) -> Edit:
        """All of it upon the state as it is now. Raises Refused, with nothing done."""
        _, edit = self._alive()
        for (path, mark), value in self._noted.items():
            if _mark(state, path, mark) != value:
                raise Refused(Fault.CONFLICT, f"{path} was changed since the transaction began: repeat it")
        for request in self._denied:
            try:
                _do(Edit(state, edit.who, self._session, serial, self._limits), request)
            except Refused as refused:
                if refused.fault is Fault.DENIED:
                    continue
            raise Refused(Fault.CONFLICT, f"{request.path} was opened since the transaction began: repeat it")
        again = Edit(state, edit.who, self._session, serial, self._limits)
        for request in self._done:
            apply(again, request)
        return again

    def _alive(self) -> tuple[State, Edit]:
        if self._base is None or self._edit is None:
            raise Refused(Fault.CONFLICT, f"more than {self._limits.history} changes came in between: repeat it")
        return self._base, self._edit

    def _note(self, base: State, who: str, request: Request, *, deep: bool = False) -> None:
        """How what the outcome depends on was at the beginning."""
        parts = frames.split(request.path)
        node, depth = tree.find(base.root, parts)
        if depth < len(parts):
            self._keep(base, tree.text(parts[:depth + 1]), "node")  # is not there
            if node.permissions.of(who) & Permit.READ:  # and this says who may know that, and do what
                self._keep(base, tree.text(parts[:depth]), "node")
            return
        self._keep(base, request.path, "all" if deep or request.op in (Op.RM, Op.TREE) else "node")
        if request.op is Op.LIST:
            self._keep(base, request.path, "names")

    def _keep(self, base: State, path: str, mark: str) -> None:
        self._noted.setdefault((path, mark), _mark(base, path, mark))


def _do(edit: Edit, request: Request) -> bytes:
    if request.op not in MUTATIONS:
        return answer(edit.state, edit.who, request)
    apply(edit, request)
    return b""


def _mark(state: State, path: str, mark: str) -> int | None:
    node = tree.look(state.root, path)
    return None if node is None else _MARKS[mark](node)
