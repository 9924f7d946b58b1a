"""What drivers make of what the registry says, with a registry that is made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from idc.device.drivers import Drivers
from idc.endpoint import State
from idc.errors import TimedOutError
from idc.registry.client import Event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from idc.registry import Registry

HERE = "/domain/vm/device"
NODES = {"id": b"1", "backend": b"back", "link": b"dev-echo-1"}


class Says:
    """A registry in which each path holds what `trees` says, as `Registry.tree` has it."""

    def __init__(self) -> None:
        self.domain = "vm"
        self.endpoint = SimpleNamespace(state=State.CONNECTED)
        self.trees: dict[str, Mapping[str, bytes]] = {}
        self.asked: list[str] = []
        self.meanwhile: Callable[[], None] = lambda: None
        self.told: dict[str, Callable[[Event], Any]] = {}

    def watch(self, path: str, callback: Callable[[Event], Any], **_: object) -> None:
        self.told[path] = callback

    def pump(self, _: float) -> bool:
        return False

    def tree(self, path: str) -> dict[str, bytes]:
        self.asked.append(path)
        self.meanwhile()
        return dict(self.trees.get(path, {}))


def drivers(says: Says) -> Drivers:
    def none(kind: str) -> Any:
        raise LookupError(kind)

    return Drivers(cast("Registry", says), lambda link: f"ivshmem:{link}", Path("/nowhere"), none)


def test_an_event_that_brings_an_end_makes_it_without_a_question() -> None:
    says = Says()
    found = drivers(says)
    says.told[HERE](Event(f"{HERE}/echo/0", 5, NODES))
    found._learn()
    assert list(found.ends) == [f"{HERE}/echo/0"]
    assert says.asked == []


def test_what_an_event_brought_is_dropped_when_all_is_read_anew() -> None:
    """The end was there and is gone again, and the later event names both and says nothing of what is there."""
    says = Says()
    found = drivers(says)
    says.told[HERE](Event(f"{HERE}/echo/0", 5, NODES))
    says.told[HERE](Event(f"{HERE}/echo", 9, None))
    found._learn()
    assert says.asked == [HERE]
    assert found.ends == {}


def test_so_it_is_when_the_registry_was_away_meanwhile() -> None:
    says = Says()
    found = drivers(says)
    says.told[HERE](Event(f"{HERE}/echo/0", 5, NODES))
    says.told[HERE](Event(f"{HERE}/echo/1/x", 5, None))

    def away() -> None:
        raise TimedOutError("it says nothing")

    says.meanwhile = away
    found._learn()
    says.meanwhile = lambda: None
    says.told[HERE](Event(HERE, 0, None))  # the first of a new connection
    found._scan_after = 0.0
    found._learn()
    assert found.ends == {}


@pytest.mark.parametrize("role", ["device", "backend"])
def test_the_other_roles_events_stay(role: str) -> None:
    says = Says()
    found = drivers(says)
    says.told[HERE](Event(f"{HERE}/echo/0", 5, NODES))
    says.told[f"/domain/vm/{role}"](Event(f"/domain/vm/{role}", 0, None))
    found._learn()
    assert list(found.ends) == ([] if role == "device" else [f"{HERE}/echo/0"])
