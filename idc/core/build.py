"""Builds the C core as the extension `idc._core` (cffi, API mode). Depends on cffi and a C compiler.

Two ways in: setuptools takes `ffibuilder` from here (`pip install .`, also -e), and running this file
puts `_core` beside `idc/__init__.py` of this very tree, which is what a build chroot and a working copy need.
Works from cffi 1.15 (Debian 12) on.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from cffi import FFI

ROOT = Path(__file__).resolve().parents[2]
CORE = ROOT / "idc" / "core"
#: What knows frames, what moves data, and what measures, is no part of the core, and lies with what calls it.
ENDPOINT = ROOT / "idc" / "endpoint"
TRANSPORT = ROOT / "idc" / "transport"
PUMP = ROOT / "idc" / "pump"
BLOCK = ROOT / "idc" / "block"
MEASURE = ROOT / "idc" / "measure"
SOURCES = (
    *(CORE / name for name in ("ring.c", "wait.c", "copy.c", "fault.c")),
    *(ENDPOINT / name for name in ("transact.c", "lane.c")),
    TRANSPORT / "wire.c",
    *(PUMP / name for name in ("pump.c", "processor.c", "tap.c")),
    *(BLOCK / name for name in ("image.c", "nbd.c")),
    *(MEASURE / name for name in ("loops.c", "paced.c", "sockets.c", "transact.c", "untraced.c")),
)
#: What is shown to cffi, in this order.
HEADERS = (CORE / "idc_core.h", ENDPOINT / "transact.h", TRANSPORT / "wire.h", ENDPOINT / "lane.h", PUMP / "pump.h",
           PUMP / "tap.h", BLOCK / "image.h", BLOCK / "nbd.h", MEASURE / "measure.h")

WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Wstrict-prototypes", "-Wpointer-arith", "-Wvla", "-Werror")
# No vectors where the source has none: packing counters for an addition is no gain, and slow under TCG. Hidden: calls
# within the library go straight to where they lead.
CFLAGS = ("-std=c11", "-O2", "-fno-tree-slp-vectorize", "-fvisibility=hidden", "-D_GNU_SOURCE", "-pthread", *WARNINGS)

# What cffi generates is not ours to keep free of warnings.
PRELUDE = """
#include "nbd.h"
#include "measure.h"
#include "tap.h"
#include "lane.h"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#pragma GCC diagnostic ignored "-Wpointer-arith"
#pragma GCC diagnostic ignored "-Wshadow"
"""


def declarations(header: str) -> str:
    """Return the part of the header between its two cdef marks.

    Raises ValueError when a mark is missing.
    """
    found = re.search(r"/\* cdef begin \*/(.*)/\* cdef end \*/", header, re.DOTALL)
    if found is None:
        raise ValueError("a header of the core has lost its 'cdef begin' or 'cdef end' mark; build.py needs both")
    return found.group(1)


def make_ffibuilder() -> FFI:
    """Return the configured builder; source paths are relative to the project root, as setuptools demands."""
    ffi = FFI()
    for header in HEADERS:
        ffi.cdef(declarations(header.read_text()))
    ffi.set_source(
        "idc._core",
        PRELUDE,
        sources=[os.path.relpath(path, ROOT) for path in SOURCES],
        include_dirs=[str(CORE), str(ENDPOINT), str(TRANSPORT), str(PUMP), str(BLOCK), str(MEASURE)],
        depends=[*map(str, HEADERS), str(CORE / "inner.h"), str(ENDPOINT / "transact.c")],
        extra_compile_args=list(CFLAGS),
        extra_link_args=["-pthread"],
    )
    return ffi


ffibuilder = make_ffibuilder()


def build_in_place() -> Path:
    """Compile in a temporary directory, then put the extension beside idc/__init__.py; returns its path."""
    with tempfile.TemporaryDirectory(prefix="idc-core-") as scratch:
        # cffi compiles inside its directory, so the relative source paths must hold there too.
        for folder in (CORE, ENDPOINT, TRANSPORT, PUMP, BLOCK, MEASURE):
            shutil.copytree(folder, Path(scratch) / "idc" / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
        built = Path(ffibuilder.compile(tmpdir=scratch))
        # The code keeps to the limited API whatever cffi names the file; setuptools names it so too, and two
        # names side by side would leave the stale one to be imported.
        target = ROOT / "idc" / "_core.abi3.so"
        # Replaced by rename: a process that has the old one mapped must not see it change.
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.copyfile(built, staged)
        staged.chmod(0o755)
        staged.replace(target)
    for stale in target.parent.glob("_core.*.so"):
        if stale != target:
            stale.unlink()
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{build_in_place()}\n")
