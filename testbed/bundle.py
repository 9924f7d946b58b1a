"""Everything that one needs to look into a failure elsewhere, in one archive. May depend on everything but the CLI.

Gathered by whoever asks, not by the testbed's own process: that may be what hangs. What cannot be had is said in
the file where it would have been. No memory of guests goes in, and of regions only the header page and a decoded
dump, which shows the first bytes of what waits in the rings.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import platform
import subprocess
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host import wire
from idc import dump
from idc.layout import HEADER_BYTES
from testbed import doctor
from testbed.control import Control, one_line
from testbed.errors import SpecError, TestbedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from testbed.registry import Entry

QUERIES = ("query-status", "query-pci", "query-chardev", "query-iothreads", "query-cpus-fast", "query-version")
ASK_SECONDS = 15.0
#: Of a log only the newest so many bytes.
LOG_BYTES = 8 << 20
_SUFFIXES = (".log", ".toml", ".json")


class Bundle:
    """A tar.gz being written under a temporary name; `close` gives it its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = path.name.removesuffix(".tar.gz")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            self._tar = tarfile.open(self._temporary, "x:gz")  # noqa: SIM115 - closed by close() or abandon()
        except OSError as error:
            raise SpecError(f"cannot write {path}: {error.strerror}", hint="-o takes another place") from error

    def add(self, name: str, content: str | bytes) -> None:
        """A file with that content."""
        data = content.encode() if isinstance(content, str) else content
        info = tarfile.TarInfo(f"{self._root}/{name}")
        info.size, info.mtime, info.mode = len(data), int(time.time()), 0o644
        self._tar.addfile(info, io.BytesIO(data))

    def add_result(self, name: str, make: Callable[[], str | bytes]) -> None:
        """What `make` returns; or, in a file beside, why it could not."""
        try:
            content = make()
        except (TestbedError, OSError) as error:
            text = one_line(error) if isinstance(error, TestbedError) else f"{type(error).__name__}: {error}"
            self.add(f"{name}.failed", f"{text}\n")
        else:
            self.add(name, content)

    def close(self) -> None:
        """All is there: give it its name."""
        self._tar.close()
        self._temporary.rename(self.path)

    def abandon(self) -> None:
        """Leave nothing."""
        self._tar.close()
        self._temporary.unlink(missing_ok=True)


def make(path: Path, *, entry: Entry | None = None, directory: Path | None = None) -> None:
    """Write the archive.

    Args:
        path: a name that ends with .tar.gz; replaced if it exists.
        entry: a running testbed, None if it is over.
        directory: its run's directory, which may be one that was kept.

    Raises:
        SpecError: the archive cannot be written.
    """
    bundle = Bundle(path)
    try:
        bundle.add("versions.txt", versions())
        bundle.add("doctor.json", json.dumps([asdict(check) for check in doctor.examine()], indent=1))
        where = Path(entry.directory) if entry is not None else directory
        if where is not None:
            for file in sorted(where.rglob("*")):
                if file.suffix in _SUFFIXES and file.is_file() and not file.is_symlink():
                    bundle.add_result(f"run/{file.relative_to(where)}", lambda file=file: _tail(file))  # type: ignore[misc]
        if entry is not None:
            _add_live(bundle, entry)
        bundle.close()
    except OSError as error:
        bundle.abandon()
        raise SpecError(f"cannot write {path}: {error.strerror}", hint="-o takes another place") from error
    except BaseException:
        bundle.abandon()
        raise


def _tail(file: Path) -> bytes:
    with file.open("rb") as log:
        log.seek(max(0, file.stat().st_size - LOG_BYTES))
        return log.read()


def versions() -> str:
    """Machine, kernel, Python, QEMU: a line each."""
    try:
        qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True,
                              timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError) as error:
        qemu = f"QEMU: {error}"
    release = Path("/etc/os-release")
    distribution = next((line for line in release.read_text().splitlines() if line.startswith("PRETTY_NAME=")), "") \
        if release.exists() else ""
    return "\n".join([platform.platform(), distribution, f"Python {platform.python_version()}", qemu,
                      f"{os.cpu_count()} CPUs", f"made {time.strftime('%Y-%m-%d %H:%M:%S %z')}", ""])


def _add_live(bundle: Bundle, entry: Entry) -> None:
    status: dict[str, Any] = {"vms": [], "regions": []}

    def ask(op: str, **fields: str) -> dict[str, Any]:
        with Control(entry) as link:
            link.sock.settimeout(ASK_SECONDS)
            return link.call(op, fields)

    def ask_status() -> str:
        status.update(ask("status"))
        return json.dumps(status, indent=1)

    bundle.add_result("status.json", ask_status)
    for vm in status["vms"]:
        for query in QUERIES:
            bundle.add_result(f"qmp/{vm['name']}/{query}.json", lambda vm=vm, query=query: json.dumps(  # type: ignore[misc]
                ask("qmp", vm=vm["name"], command=query)["answer"], indent=1))
    for region in status["regions"]:
        found: list[tuple[bytes, dump.RegionDump]] = []

        def look(name: str = region["name"], found: list[tuple[bytes, dump.RegionDump]] = found) -> str:
            found.append(read_region(entry, name))
            return "".join(f"{line}\n" for line in dump.lines(found[0][1]))

        bundle.add_result(f"regions/{region['name']}.txt", look)
        if found:
            bundle.add(f"regions/{region['name']}.header", found[0][0])


def read_region(entry: Entry, region: str) -> tuple[bytes, dump.RegionDump]:
    """The raw header page and the decoded dump of a live region. Raises Refused, SupervisorGone."""
    with Control(entry) as link:
        link.sock.settimeout(ASK_SECONDS)
        reply, fds = link.call_fds("memory", {"region": region})
        try:
            with mmap.mmap(fds[0], reply["size"], prot=mmap.PROT_READ) as memory:
                return memory[:HEADER_BYTES], dump.decode(memory)
        finally:
            wire.close_all(fds)
