"""Which kernel modules an image keeps: names, dependencies, loading order. Pure but for reading module files.

Dependencies come from the modules' own .modinfo section rather than from depmod's modules.dep: the kernel package
brings no modules.dep, and the host need not have depmod for our kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from images.errors import ImageError

if TYPE_CHECKING:
    from pathlib import Path

_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SOFTDEP = re.compile(rb"\0softdep=pre: ([^\0]*)\0")


@dataclass(frozen=True)
class Module:
    """One module: path below the module directory, and the names it needs first."""

    path: Path
    depends: tuple[str, ...]
    soft: tuple[str, ...] = ()


def normal_name(name: str) -> str:
    """The name the kernel uses: `vfio-pci.ko` and `vfio_pci` are the same module."""
    return name.removesuffix(".ko").replace("-", "_")


def parse_modinfo(content: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hard and soft ("pre:") dependencies written in a module file, as kernel names."""

    def names(text: bytes, separator: bytes | None) -> tuple[str, ...]:
        return tuple(normal_name(word.decode()) for word in text.split(separator) if word)

    hard = _DEPENDS.search(b"\0" + content)
    soft = b" ".join(found.partition(b"post:")[0] for found in _SOFTDEP.findall(b"\0" + content))
    return names(hard[1], b",") if hard else (), names(soft, None)


class ModuleTree(Mapping[str, Module]):
    """The modules below `directory` (/lib/modules/VERSION) by kernel name; a file is read when it is asked for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._paths = {normal_name(path.name): path for path in sorted(directory.rglob("*.ko"))}

    def __getitem__(self, name: str) -> Module:
        path = self._paths[name]
        depends, soft = parse_modinfo(path.read_bytes())
        return Module(path.relative_to(self._directory), depends, soft)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def closure(wanted: Iterable[str], available: Mapping[str, Module], builtin: Iterable[str] = ()) -> list[str]:
    """`wanted` and everything it needs, in an order in which insmod can load it.

    Names compiled into the kernel (`builtin`) are left out. A soft dependency that does not exist is left out too, as
    modprobe does. Raises ImageError for a module that does not exist.
    """
    inside = {normal_name(name) for name in builtin}
    order: dict[str, None] = {}
    open_names: set[str] = set()

    def visit(name: str, asked_by: str) -> None:
        if name in order or name in inside or name in open_names:
            return
        if name not in available:
            raise ImageError(f"this kernel has no module {name}, which {asked_by} needs")
        open_names.add(name)
        module = available[name]
        for need in (*module.depends, *(soft for soft in module.soft if soft in available)):
            visit(need, name)
        order[name] = None

    for name in wanted:
        visit(normal_name(name), "the image")
    return list(order)
