"""A domain of the registry's tests in a process of its own: registry_domain.py MODE ADDRESS [ARGUMENT]."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from idc.domain import Domain, Service
from idc.endpoint import Completion, Result
from idc.errors import IdcError, OutcomeUnknownError
from idc.registry import Event, Registry
from idc.registry.frames import Op, Request
from idc.transport.address import open_port

if TYPE_CHECKING:
    from collections.abc import Callable

ECHO = Service("echo")


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def ephemeral(registry: Registry) -> None:
    """Is there until it is killed."""
    registry.write(f"{registry.home}/up", "1", ephemeral=True)
    registry.write(f"{registry.home}/stays", "1")
    say("up")
    while True:
        registry.pump(1.0)


def watcher(registry: Registry) -> None:
    """Says what it is told."""

    def told(event: Event) -> None:
        say(f"{event.path} {event.changes}")

    registry.watch(registry.home, told)
    while True:
        registry.pump(1.0)


def numbers(registry: Registry) -> None:
    """Writes numbers one after the other, and says each once it is acknowledged; also the sum of a counter's steps."""
    number = 0
    while True:
        number += 1
        while True:
            try:
                registry.write(f"{registry.home}/n", str(number))
                break
            except OutcomeUnknownError:
                continue
        say(number)


def spin(registry: Registry) -> None:
    """Works hard, at nothing."""
    say("going")
    while True:
        pass


def keep_full(registry: Registry, request: Request, again: Callable[[Completion], None]) -> None:
    """Has as much under way as there may be, for ever."""
    while True:
        try:
            while registry.submit(request, again) is Result.OK:
                pass
        except IdcError as error:
            say(error)
        registry.pump(0.1)


def flood(registry: Registry) -> None:
    """All that it is allowed to have under way, always: large writes, lists, refused reads, watches, transactions."""
    for _ in range(32):
        registry.watch(registry.home, lambda _event: None)
    registry.write(f"{registry.home}/x", b"")
    say("going")
    serial = 0

    def again(completion: Completion) -> None:
        nonlocal serial
        serial += 1
        request = [
            Request(Op.WRITE, f"{registry.home}/x", rest=serial.to_bytes(8, "little") * 256),
            Request(Op.WRITE, f"{registry.home}/n{serial % 900}", rest=b"x"),
            Request(Op.LIST, registry.home),
            Request(Op.READ, "/domain/back/secret"),
            Request(Op.BEGIN),
            Request(Op.RM, f"{registry.home}/n{serial % 900}"),
        ][serial % 6]
        registry.submit(request, again)

    keep_full(registry, Request(Op.READ, registry.home), again)


def trees(registry: Registry) -> None:
    """Has the registry look through all of as many nodes as it may have, again and again: TREE from behind the last
    one, and events that bring what is there."""
    for first in range(0, 1000, 200):
        with registry.transaction(together=True) as t:
            for number in range(first, first + 200):
                t.write(f"{registry.home}/n{number}", b"")
    for _ in range(32):
        registry.watch(registry.home, lambda _event: None, nodes=True)
    registry.write(f"{registry.home}/x", b"")
    say("going")
    serial = 0

    def again(completion: Completion) -> None:
        nonlocal serial
        serial += 1
        if serial % 16:
            registry.submit(Request(Op.TREE, registry.home, rest=b"/n998"), again)
        else:
            registry.submit(Request(Op.WRITE, f"{registry.home}/x", rest=serial.to_bytes(8, "little")), again)

    keep_full(registry, Request(Op.TREE, registry.home, rest=b"/n998"), again)


def serve(address: str, place: str) -> None:
    """Offers a service that the other side finds in the registry."""
    domain = Domain({"echo": place}, registry=address)
    domain.serve(ECHO, lambda parameters: parameters[::-1])
    domain.publish(ECHO)
    say("serving")
    domain.run()


def main() -> None:
    mode, address, *rest = sys.argv[1:]
    if mode == "serve":
        serve(address, *rest)
        return
    with Registry(open_port(address), timeout=15) as registry:
        {"ephemeral": ephemeral, "watcher": watcher, "numbers": numbers, "spin": spin, "flood": flood,
         "trees": trees}[mode](registry)


if __name__ == "__main__":
    main()
