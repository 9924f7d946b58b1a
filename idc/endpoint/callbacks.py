"""Calls of which each has to be made, whatever another raises. Depends on nothing."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from idc.endpoint.results import Completion

log = logging.getLogger("idc.endpoint")


def call_each(calls: Iterable[Callable[[], None]]) -> None:
    """Make all of them, whatever one raises: nobody else's completion, and no step of the lifecycle, is lost by that.

    The first exception is raised in the end; what is raised after it is logged.
    """
    first: BaseException | None = None
    for call in calls:
        try:
            call()
        except BaseException as error:  # Ctrl-C too: it comes out in the end
            if first is not None:
                log.exception("another callback failed after %r", first)
            first = first or error
    if first is not None:
        raise first


def deliver(completions: Iterable[tuple[Callable[[Completion], None] | None, Completion]]) -> None:
    """Tell each who waits for one."""
    call_each(functools.partial(done, completion) for done, completion in completions if done is not None)
