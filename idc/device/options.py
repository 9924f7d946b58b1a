"""Options of a device class: declared with a type, given as text or as values, kept in the registry as text. No I/O.

Depends on idc.errors.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from idc.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Value = bool | int | float | str
_TRUE: Final = ("true", "yes", "on", "1")
_FALSE: Final = ("false", "no", "off", "0")
#: Longest text of one option, bytes.
TEXT_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        default: what it is if it is not given, and of which type it is: bool, int, float or str.
        help: one line.
        least, most: bounds of a number.
        unit: of a number, for what is said of one that is out of bounds.
        choices: of a text; any if there are none.
    """

    default: Value
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()
    unit: str = ""

    def check(self, value: object, what: str) -> Value:
        """The value, if it may be one; an int does for a float. Raises MisuseError."""
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise MisuseError(f"{what}: {value!r} is no {kind.__name__}")
        assert isinstance(value, (bool, int, float, str))
        if isinstance(value, str):
            if len(value.encode()) > TEXT_BYTES:
                raise MisuseError(f"{what}: {len(value.encode())} bytes, {TEXT_BYTES} at most")
            if self.choices and value not in self.choices:
                raise MisuseError(f"{what}: {value!r} is none of {', '.join(self.choices)}")
            return value
        if self.least is not None and not value >= self.least:
            raise MisuseError(f"{what}: {value} is less than {self._bound(self.least)}")
        if self.most is not None and not value <= self.most:
            raise MisuseError(f"{what}: {value} is more than {self._bound(self.most)}")
        return value

    def _bound(self, bound: float) -> str:
        if not self.unit:
            return f"{bound:.15g}"
        both = None not in (self.least, self.most)
        return f"{bound:.15g} {self.unit}" + (f" ({self.least:.15g} to {self.most:.15g})" if both else "")

    def parse(self, text: str, what: str) -> Value:
        """The value that a text stands for. Raises MisuseError."""
        kind = type(self.default)
        if kind is str:
            return self.check(text, what)
        if kind is bool:
            if text.lower() not in _TRUE + _FALSE:
                raise MisuseError(f"{what}: {text!r} is neither true nor false")
            return text.lower() in _TRUE
        try:
            return self.check(int(text, 0) if kind is int else float(text), what)
        except ValueError as error:
            if isinstance(error, MisuseError):
                raise
            raise MisuseError(f"{what}: {text!r} is no {kind.__name__}") from None


def text(value: Value) -> str:
    """As `Option.parse` takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def fill(declared: Mapping[str, Option], given: Mapping[str, object], what: str) -> dict[str, Value]:
    """All options: those given, checked, and defaults. Raises MisuseError."""
    for name in given:
        if name not in declared:
            raise MisuseError(f"{what} has no option {name!r}{_nearest(name, declared)}")
    return {name: option.check(given[name], f"{what}, option {name}") if name in given else option.default
            for name, option in declared.items()}


def parse(declared: Mapping[str, Option], given: Mapping[str, str], what: str) -> dict[str, Value]:
    """The same of texts."""
    for name in given:
        if name not in declared:
            raise MisuseError(f"{what} has no option {name!r}{_nearest(name, declared)}")
    return {name: option.parse(given[name], f"{what}, option {name}") if name in given else option.default
            for name, option in declared.items()}


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, 1)
    return f"; did you mean {close[0]!r}?" if close else f" (there are: {', '.join(names) or 'none'})"
