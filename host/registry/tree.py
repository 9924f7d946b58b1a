"""The tree itself: nodes that never change, and edits that make a new state of an old one. No I/O.

    Edit(state, who) ── write, mkdir, rm, permit ──▶ .state, .changes (for watches), .effects (for the log)

A state is a root that shares all unchanged nodes with the state it was made of, so that keeping an old one, for a
transaction or for what is on disk already, costs nothing but what has changed since. Each domain is charged for the
nodes that it wrote last, and only for those. Depends on idc.registry.frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

from idc.errors import MisuseError
from idc.registry import frames
from idc.registry.frames import HOST, MOST_NAMED, Fault, Permissions, Permit

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Parts = tuple[str, ...]

#: Components of "/domain/NAME", which only the host can remove.
_HOME_DEPTH: Final = 2


class Refused(Exception):
    """A request that is not done; nothing has changed."""

    def __init__(self, fault: Fault, text: str) -> None:
        super().__init__(text)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Node:
    """One node.

    Attributes:
        value: bytes.
        permissions: who may do what.
        payer: the domain that wrote it last, and is charged for it.
        session: of the payer, if it is ephemeral; else empty.
        serial: of the edit that last changed value or permissions.
        names: of the edit that last made or removed a node right below.
        deep: of the edit that last changed anything at or below.
        children: by name.
    """

    value: bytes
    permissions: Permissions
    payer: str
    session: bytes = b""
    serial: int = 0
    names: int = 0
    deep: int = 0
    children: Mapping[str, Node] = field(default_factory=dict)

    def cost(self, name: str) -> int:
        """Bytes that its payer is charged for it under that name."""
        return len(name) + len(self.value)


class Usage(NamedTuple):
    """What a domain is charged for."""

    nodes: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What one domain may have.

    Attributes:
        nodes: nodes that it wrote last.
        bytes: of their names and values.
        watches: set at a time.
        transactions: open at a time.
        steps: operations of one transaction.
        history: commits of others that a transaction outlasts; what has changed meanwhile is kept for it.
    """

    nodes: int = 1024
    bytes: int = 1 << 18
    watches: int = 64
    transactions: int = 8
    steps: int = 256
    history: int = 4096


@dataclass(frozen=True, slots=True)
class State:
    """The whole tree at one moment.

    Attributes:
        root: of the tree.
        usage: by domain; the host is not charged.
        domains: uuid of the control region whose domain a home was made for, by name.
    """

    root: Node
    usage: Mapping[str, Usage] = field(default_factory=dict)
    domains: Mapping[str, bytes] = field(default_factory=dict)


class Change(NamedTuple):
    """A node before and after; None where there is none."""

    path: str
    before: Node | None
    after: Node | None


class Effect(NamedTuple):
    """What is done to a path, as the log keeps it: a node without those below it, or its removal."""

    path: str
    node: Node | None


def empty() -> State:
    """A tree with nothing but "/" and "/domain", which anybody may read."""
    open_to_all = Permissions(HOST, Permit.READ)
    domain = Node(b"", open_to_all, HOST)
    return State(Node(b"", open_to_all, HOST, children={"domain": domain}))


def text(parts: Parts) -> str:
    """The path of components."""
    return "/" + "/".join(parts)


def find(root: Node, parts: Parts) -> tuple[Node, int]:
    """(the deepest node on the way that there is, how many components lead to it)."""
    node = root
    for depth, name in enumerate(parts):
        below = node.children.get(name)
        if below is None:
            return node, depth
        node = below
    return node, len(parts)


def look(root: Node, path: str) -> Node | None:
    """The node there, whoever asks."""
    parts = frames.split(path)
    node, depth = find(root, parts)
    return node if depth == len(parts) else None


def node_for(root: Node, who: str, path: str, want: Permit) -> Node:
    """The node, for a domain that wants to do that with it. Raises Refused.

    That there is no such node is told only to whoever may read the deepest node above it.
    """
    parts = frames.split(path)
    node, depth = find(root, parts)
    there = depth == len(parts)
    if not node.permissions.of(who) & (want if there else Permit.READ):
        raise Refused(Fault.DENIED, f"{who} may not {_words(want)} this")
    if not there:
        raise Refused(Fault.NOT_FOUND, f"there is no node {text(parts[:depth + 1])}")
    return node


def walk(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    """The node and all below it, those above first."""
    yield path, node
    base = path.rstrip("/")
    for name, below in node.children.items():
        yield from walk(below, f"{base}/{name}")


def counted(root: Node) -> dict[str, Usage]:
    """What each domain is charged for."""
    usage: dict[str, Usage] = {}
    for path, node in walk(root, "/"):
        _charge(usage, node.payer, 1, node.cost(path.rpartition("/")[2]))
    return usage


class Edit:
    """Changes of one party to a state; `state` is the one with them.

    Args:
        state: to begin from.
        who: a domain, or HOST.
        session: of `who`, for ephemeral nodes.
        serial: of this edit: larger than that of any before.
        limits: of `who`.

    Each method raises Refused, with nothing of it done.
    """

    def __init__(self, state: State, who: str, session: bytes, serial: int, limits: Limits) -> None:
        self.state = state
        self.who = who
        self.serial = serial
        self.changes: list[Change] = []
        self.effects: list[Effect] = []
        self._session = session
        self._limits = limits

    def write(self, path: str, value: bytes, *, ephemeral: bool = False) -> None:
        """See `idc.registry.Registry.write`."""
        parts = frames.split(path)
        node, depth = find(self.state.root, parts)
        if not node.permissions.of(self.who) & Permit.WRITE:
            raise Refused(Fault.DENIED, f"{self.who} may not write this")  # nor know which of the nodes there are
        if ephemeral and not self._session:
            raise Refused(Fault.REFUSED, "an ephemeral node needs a session: say HELLO first")
        session = self._session if ephemeral else b""
        if depth < len(parts):
            self._create(node, parts, depth, value, session)
            return
        if session and node.children:
            raise Refused(Fault.REFUSED, "there are nodes below it, so it cannot be ephemeral")
        self._set(parts, node, replace(node, value=value, payer=self.who, session=session, serial=self.serial,
                                       deep=self.serial))

    def mkdir(self, path: str) -> None:
        """See `idc.registry.Registry.mkdir`."""
        parts = frames.split(path)
        node, depth = find(self.state.root, parts)
        if depth < len(parts):
            self.write(path, b"")
        elif not node.permissions.of(self.who) & Permit.WRITE:
            raise Refused(Fault.DENIED, f"{self.who} may not write this")

    def rm(self, path: str) -> None:
        """See `idc.registry.Registry.rm`."""
        node = node_for(self.state.root, self.who, path, Permit.WRITE)
        parts = frames.split(path)
        if not parts or (parts[0] == "domain" and len(parts) <= _HOME_DEPTH and self.who != HOST):
            raise Refused(Fault.DENIED, "this node stays; remove those below it")
        gone = list(walk(node, path))
        for where, each in gone:
            if not each.permissions.of(self.who) & Permit.WRITE:
                raise Refused(Fault.DENIED, f"{self.who} may not remove {where}" if where == path else
                              f"{self.who} may not remove all that is below")
        usage = dict(self.state.usage)
        for where, each in gone:
            _charge(usage, each.payer, -1, -each.cost(where.rpartition("/")[2]))
        self._replace(parts, None, usage)
        self.changes += [Change(where, each, None) for where, each in gone]
        self.effects.append(Effect(path, None))

    def permit(self, path: str, permissions: Permissions) -> None:
        """See `idc.registry.Registry.set_permissions`."""
        node = node_for(self.state.root, self.who, path, Permit.NOTHING | Permit.READ)
        if self.who not in (HOST, node.permissions.owner):
            raise Refused(Fault.DENIED, "only its owner and the host may change its permissions")
        if permissions.owner != node.permissions.owner and self.who != HOST:
            raise Refused(Fault.DENIED, "only the host may give it another owner")
        self._set(frames.split(path), node, replace(node, permissions=permissions, serial=self.serial,
                                                    deep=self.serial))

    def admit(self, domain: str, uuid: bytes) -> None:
        """Make the home of a domain, for the host; that of a former domain of this name goes first."""
        if self.state.domains.get(domain, uuid) != uuid:
            self.dismiss(domain)
        if look(self.state.root, frames.home(domain)) is None:
            self.write(frames.home(domain), b"")
        self.state = replace(self.state, domains={**self.state.domains, domain: uuid})

    def dismiss(self, domain: str) -> None:
        """Remove what a domain owned, for the host: its home, and nodes elsewhere with all below them."""
        for path in _owned(self.state.root, "", domain):
            self.rm(path)
        self.state = replace(self.state, domains={name: uuid for name, uuid in self.state.domains.items()
                                                  if name != domain})

    # -- within

    def _create(self, parent: Node, parts: Parts, depth: int, value: bytes, session: bytes) -> None:
        """Make the nodes that are missing on the way."""
        if parent.session:
            raise Refused(Fault.REFUSED, f"{text(parts[:depth])} is ephemeral: it has no nodes below it")
        made: list[Node] = []
        permissions = parent.permissions
        for at in range(depth, len(parts)):
            permissions = self._inherited(permissions, parts[:at + 1])
            last = at == len(parts) - 1
            made.append(Node(value if last else b"", permissions, self.who, session if last else b"",
                             self.serial, self.serial, self.serial))
        usage = dict(self.state.usage)
        for name, node in zip(parts[depth:], made, strict=True):
            _charge(usage, self.who, 1, node.cost(name))
        self._check(usage)
        whole = made[-1]
        for name, node in zip(reversed(parts[depth + 1:]), reversed(made[:-1]), strict=True):
            whole = replace(node, children={name: whole})
        self._replace(parts[:depth + 1], whole, usage)
        for at, node in enumerate(made, depth + 1):
            self.changes.append(Change(text(parts[:at]), None, node))
            self.effects.append(Effect(text(parts[:at]), node))

    def _inherited(self, parent: Permissions, parts: Parts) -> Permissions:
        """Of a new node: its parent's, but a domain owns what it makes, and the parent's owner keeps what it may."""
        if parts[0] == "domain" and len(parts) == _HOME_DEPTH:
            return Permissions(parts[1])
        if self.who in (HOST, parent.owner):
            return parent
        named = [(name, permit) for name, permit in parent.named if name not in (self.who, parent.owner)]
        if parent.owner != HOST:
            named.append((parent.owner, Permit.BOTH))
        if len(named) > MOST_NAMED:
            raise Refused(Fault.REFUSED, f"{text(parts)} would have permissions for more than {MOST_NAMED} domains")
        try:
            return Permissions(self.who, parent.default, tuple(named))
        except MisuseError as error:
            raise Refused(Fault.REFUSED, str(error)) from error

    def _set(self, parts: Parts, before: Node, after: Node) -> None:
        name = parts[-1] if parts else ""
        usage = dict(self.state.usage)
        _charge(usage, before.payer, -1, -before.cost(name))
        _charge(usage, after.payer, 1, after.cost(name))
        if after.payer == self.who:
            self._check(usage)
        self._replace(parts, after, usage)
        self.changes.append(Change(text(parts), before, after))
        self.effects.append(Effect(text(parts), after))

    def _check(self, usage: Mapping[str, Usage]) -> None:
        if self.who == HOST:
            return
        before, after = self.state.usage.get(self.who, Usage()), usage.get(self.who, Usage())
        for what, had, has, most in (("nodes", before.nodes, after.nodes, self._limits.nodes),
                                     ("bytes of names and values", before.bytes, after.bytes, self._limits.bytes)):
            if has > most and has > had:
                raise Refused(Fault.QUOTA, f"{self.who} would have {has} {what}, {most} is its quota")

    def _replace(self, parts: Parts, node: Node | None, usage: Mapping[str, Usage]) -> None:
        self.state = replace(self.state, root=put(self.state.root, parts, node, self.serial), usage=usage)


def put(node: Node, parts: Parts, new: Node | None, serial: int) -> Node:
    """The node with another one at `parts` below it, or none; those on the way must be there. `new` as it is at ()."""
    if not parts:
        assert new is not None
        return new
    name, rest = parts[0], parts[1:]
    children = dict(node.children)
    if rest:
        children[name] = put(children[name], rest, new, serial)
        return replace(node, children=children, deep=serial)
    same = (name in children) == (new is not None)
    if new is None:
        del children[name]
    else:
        children[name] = new
    return replace(node, children=children, deep=serial, names=node.names if same else serial)


def _owned(node: Node, path: str, owner: str) -> list[str]:
    """The topmost nodes of that owner."""
    if node.permissions.owner == owner:
        return [path]
    return [found for name, below in node.children.items() for found in _owned(below, f"{path}/{name}", owner)]


def _charge(usage: dict[str, Usage], payer: str, nodes: int, size: int) -> None:
    if payer == HOST:
        return
    had = usage.get(payer, Usage())
    now = Usage(had.nodes + nodes, had.bytes + size)
    if now.nodes:
        usage[payer] = now
    else:
        usage.pop(payer, None)


def _words(want: Permit) -> str:
    return " and ".join(str(one.name).lower() for one in (Permit.READ, Permit.WRITE) if one & want)
