"""The project's own files that go into an image, read once, so that what is hashed is what is built.

May import images.archive, images.errors.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from images import archive
from images.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import ModuleType

_HERE = Path(__file__).resolve().parent
#: Where Debian's Python looks for packages; `idc` and `guest` lie here in the guest.
SITE = "usr/lib/python3/dist-packages"
_KINDS = {".py", ".c", ".h", ".typed"}
#: Written by a build of the C core for the host, next to its sources.
_GENERATED = {"_core.c"}


def hash_of(*parts: object) -> str:
    """16 hexadecimal digits that stand for `parts`: strings, bytes, numbers, and nested sequences of them."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        match part:
            case bytes():
                kind, content = b"b", part
            case str() | int() | float():
                kind, content = type(part).__name__[:1].encode(), str(part).encode()
            case list() | tuple():
                digest.update(b"l%d:" % len(part))
                for item in part:
                    add(item)
                return
            case archive.Entry():
                add((part.path, part.mode, part.data, part.device))
                return
            case _:
                raise TypeError(f"no stable hash for {type(part).__name__}")
        digest.update(b"%s%d:" % (kind, len(content)) + content)

    add(parts)
    return digest.hexdigest()[:16]


@functools.cache
def code_of(thing: ModuleType | Callable[..., object]) -> str:
    """What a module or function of the builder does, for a key: its code without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body
                         if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    return ast.dump(tree)


def _read(directory: Path, prefix: str, keep: Iterable[Path]) -> list[archive.Entry]:
    return [archive.file(f"{prefix}{path.relative_to(directory)}", path.read_bytes()) for path in sorted(keep)]


def package_entries(package: str, root: Path = _HERE.parent) -> list[archive.Entry]:
    """The source files of one of our packages, as `package/...`."""
    directory = root / package
    found = [path for path in directory.rglob("*")
             if path.suffix in _KINDS and path.name not in _GENERATED and "__pycache__" not in path.parts]
    if not found:
        raise ImageError(f"the package {package} is not beside the image builder, in {root}")
    return [archive.Entry(entry.path, entry.mode & ~0o111, entry.data)
            for entry in _read(directory, f"{package}/", found)]


def tree_entries() -> list[archive.Entry]:
    """Our files laid over the root: init and settings."""
    directory = _HERE / "rootfs" / "tree"
    return [*_read(directory, "", (path for path in directory.rglob("*") if path.is_file())),
            archive.link("usr/sbin/init", "/usr/bin/busybox")]


def initramfs_script() -> bytes:
    """The initramfs' /init."""
    return (_HERE / "rootfs" / "initramfs" / "init").read_bytes()
