"""`testbed doctor`, `dump`, `bundle`: looking into what is wrong. May import typer and what it looks with."""

from __future__ import annotations

import dataclasses
import mmap
import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from idc import dump as decoder
from testbed import bundle as bundles
from testbed import doctor as doctors
from testbed import registry
from testbed.cli_common import Json, complete_testbed, out, print_json, table
from testbed.control import Control
from testbed.errors import SpecError, nearest
from testbed.registry import NoSuchTestbed

_GZIP = b"\x1f\x8b"


def doctor(
    probe: Annotated[bool, typer.Option("--probe", help="Prove KVM by booting a guest, if not done yet.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine has and lacks, KVM included.

    The exit code is 1 if something that is needed is missing.
    """
    checks = doctors.examine(probe=probe)
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        rows = [(check.state, check.name, check.found, check.remedy) for check in checks]
        table(("", "WHAT", "FOUND", "TO DO"), rows)
        packages = sorted({check.remedy.removeprefix("apt install ") for check in checks
                           if check.remedy.startswith("apt install ")})
        if packages:
            out(f"\nall of it: apt install {shlex.join(packages)}")
    if any(check.state == "fail" for check in checks):
        raise typer.Exit(1)


def dump(
    what: Annotated[str, typer.Argument(metavar="REGION|FILE", help="A running testbed's region, or a raw copy.")],
    as_json: Json = False,
) -> None:
    """Decode a region: header, channels, rings.

    The exit code is 1 if something in it is inconsistent; lines that say what begin with "!".
    """
    path = Path(what)
    if path.is_file():
        found = _decode_file(path)
    else:
        entry, region = _find_region(what)
        found = bundles.read_region(entry, region)[1]
    if as_json:
        print_json(_plain(found))
    else:
        out("\n".join(decoder.lines(found)))
    if found.problems:
        raise typer.Exit(1)


def _decode_file(path: Path) -> decoder.RegionDump:
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                return decoder.decode(b"")
            if file.read(len(_GZIP)) == _GZIP:
                raise SpecError(f"{path} is packed",
                                hint="unpack it with tar -xf; of a bundle, this command reads regions/NAME.header")
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                return decoder.decode(memory)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from error


def _find_region(text: str) -> tuple[registry.Entry, str]:
    """The testbed that has a region of that name; "TESTBED/REGION" says which."""
    bed, slash, name = text.rpartition("/")
    known: dict[str, list[registry.Entry]] = {}
    for entry in [registry.find(bed)] if slash else registry.running():
        with Control(entry) as link:
            for region in link.call("status")["regions"]:
                known.setdefault(region["name"], []).append(entry)
    entries = known.get(name, [])
    if len(entries) == 1:
        return entries[0], name
    if entries:
        raise NoSuchTestbed(f"several testbeds have a region {name!r}",
                            hint="write " + " or ".join(f"{entry.name}/{name}" for entry in entries))
    raise NoSuchTestbed(f"{text!r} is no file, and no region of a running testbed{nearest(name, known, every=True)}")


def _plain(found: decoder.RegionDump) -> dict[str, Any]:
    data = dataclasses.asdict(found)
    if found.header is not None:
        data["header"]["uuid"] = str(found.header.uuid)
        for member, entry in zip(data["header"]["members"], found.header.members, strict=True):
            member["rights"] = entry.rights.name.lower()
        for channel, named in zip(data["header"]["channels"], found.header.channels, strict=True):
            channel["kind"] = named.kind.name.lower()
    return data


def bundle(
    what: Annotated[str, typer.Argument(metavar="[TESTBED|DIRECTORY]", autocompletion=complete_testbed,
                                        help="A running one, or the directory of kept logs.")] = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.tar.gz")] = None,
) -> None:
    """Pack all one needs after a failure into a tar.gz."""
    directory = Path(what) if what and Path(what).is_dir() else None
    entry = None if directory is not None else registry.find(what)
    name = directory.name if directory is not None else entry.name if entry is not None else ""
    path = output or Path(f"testbed-{name}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    bundles.make(path, entry=entry, directory=directory)
    out(str(path))
