"""Keeps transparent huge pages from processes that are started. Depends on nothing.

prctl(2) PR_SET_THP_DISABLE is inherited through fork and exec, and it is a property of the process, not of the thread:
so it is set here, in the process that starts another one, and set back when that one runs. What this process maps
anew meanwhile gets small pages, which is slower by nothing that could be measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_SET_THP_DISABLE, _GET_THP_DISABLE = 41, 42
_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Processes that start in the block have no huge pages. Not for two threads at once. Raises OSError."""
    before = _prctl(_GET_THP_DISABLE)
    _prctl(_SET_THP_DISABLE, 1)
    try:
        yield
    finally:
        _prctl(_SET_THP_DISABLE, before)


def _prctl(option: int, value: int = 0) -> int:
    result: int = _libc.prctl(option, value, 0, 0, 0)
    if result >= 0:
        return result
    if ctypes.get_errno() == errno.EINVAL:
        return 0  # a kernel that was built without huge pages
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl(PR_SET_THP_DISABLE)")
