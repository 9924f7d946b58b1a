"""The closed set of results, and what a completed submission carries. Depends on nothing. See docs/idc.md."""

from __future__ import annotations

import enum
from typing import NamedTuple


class Result(enum.Enum):
    """What became of something submitted or completed; there are no others."""

    OK = "ok"
    BACK_PRESSURED = "back-pressured"
    NOT_CONNECTED = "not connected"
    CLOSED = "closed"
    OUTCOME_UNKNOWN = "outcome unknown"
    ERROR = "error"


class Completion(NamedTuple):
    """How a message or transaction ended at its submitter.

    Attributes:
        result: OK, ERROR (the handler failed, `reason` says how), or OUTCOME_UNKNOWN (the connection was lost).
        error: the back end's own code, 0 to 65534; 0 is none. Meaningful with OK.
        status: what the back end returned; empty for a message.
        reason: in words, where the result is not OK.
    """

    result: Result
    error: int = 0
    status: bytes = b""
    reason: str = ""
