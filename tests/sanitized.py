"""The library with a C core under AddressSanitizer and UBSan, for a process of its own: a tree, and its environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Of a process that AddressSanitizer ends.
EXIT_CODE = 99
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"


def build(tree: Path, *, edit: tuple[str, str, str] | None = None) -> dict[str, str]:
    """Copy `idc` and `host` to `tree` and compile the core there; `edit` is (file of the core, old, new) text.

    Returns the environment in which Python imports that tree. Python's own allocator is out of the way, so that each
    buffer that the core is handed has AddressSanitizer's fences.
    """
    for package in ("idc", "host"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__", "_core*"))
    if edit is not None:
        path = tree / "idc" / "core" / edit[0]
        text = path.read_text()
        assert edit[1] in text, f"{path.name} has changed: give this test the new wording"
        path.write_text(text.replace(edit[1], edit[2]))
    done = subprocess.run([sys.executable, str(tree / "idc" / "core" / "build.py")], capture_output=True, text=True,
                          check=False, env=os.environ | {"CFLAGS": FLAGS, "LDFLAGS": FLAGS})
    assert done.returncode == 0, done.stdout + done.stderr
    library = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return os.environ | {
        "PYTHONPATH": str(tree), "PYTHONMALLOC": "malloc", "LD_PRELOAD": library.stdout.strip(),
        # what the interpreter never frees is no leak of ours; a report ends the process with a code of its own
        "ASAN_OPTIONS": f"detect_leaks=0:exitcode={EXIT_CODE}", "UBSAN_OPTIONS": "print_stacktrace=1",
    }  # fmt: skip
