"""`testbed image`: build, list, show, module, prune. May import typer and `images`; main tells errors."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

import images

app = typer.Typer(help="Guest kernel and root file system.", no_args_is_help=True)

_MIB = 1 << 20
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _say(text: str) -> None:
    typer.echo(f"image: {text}", err=True)


def _as_json(image: images.Image) -> dict[str, Any]:
    files = {"kernel": image.kernel, "initrd": image.initrd, "rootfs": image.rootfs, "kernel_deb": image.kernel_deb}
    return {**image.manifest, "label": image.label, "files": {name: str(path) for name, path in files.items()}}


def _print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


@app.command()
def build(
    mirror: Annotated[list[str] | None, typer.Option(
        help="URL of a Debian mirror; may be repeated (one ending in -security serves security updates). "
        "By default the mirrors of this machine's apt.")] = None,
    refresh: Annotated[bool, typer.Option("--refresh", help="Look for newer packages.")] = False,
    as_json: Json = False,
) -> None:
    """Build the image if it is not there yet, and print where it is."""
    image = images.ensure(progress=_say, mirrors=tuple(mirror or ()), refresh=refresh)
    if as_json:
        _print_json(_as_json(image))
    else:
        typer.echo(image.directory)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the images in the cache, the one used last first."""
    found = images.list_images()
    if as_json:
        _print_json([_as_json(image) for image in found])
        return
    for image in found:
        used = datetime.fromtimestamp((image.directory / "manifest.json").stat().st_mtime, UTC).astimezone()
        size = image.manifest["bytes"]["rootfs"] / _MIB
        typer.echo(f"{image.label}  {size:.0f} MiB  kernel {image.manifest['kernel_release']}  "
                   f"used {used:%Y-%m-%d %H:%M}")


@app.command()
def show(label: Annotated[str, typer.Argument(help="NAME-HASH, or the start of it or of the hash.")] = "",
         as_json: Json = False) -> None:
    """Show what is in an image (by default the one used last)."""
    image = images.show(label)
    if as_json:
        _print_json(_as_json(image))
        return
    about = image.manifest
    typer.echo(f"{image.label}\nkernel   {about['kernel_release']}")
    for name, path in _as_json(image)["files"].items():
        typer.echo(f"{name:<10} {about['bytes'][name] / _MIB:6.1f} MiB  {path}")
    typer.echo("seconds  " + ", ".join(f"{part} {seconds}" for part, seconds in about["seconds"].items()))
    typer.echo("append   " + " ".join(image.kernel_arguments))
    typer.echo("modules  " + " ".join(about["modules"]))
    typer.echo("packages " + " ".join(f"{name}={version}" for name, version in about["packages"]["root"]))


@app.command()
def module(
    directory: Annotated[Path, typer.Argument(help="Its sources, with a Kbuild or Makefile; see docs/own-module.md.")],
) -> None:
    """Build a kernel module of your own for the image's kernel, and print where the .ko file is."""
    typer.echo(images.build_module(directory, images.ensure(progress=_say), progress=_say))


@app.command()
def prune(
    keep: Annotated[int, typer.Option(min=0, help="How many images to keep: those used last.")] = 1,
    everything: Annotated[bool, typer.Option("--all", help="Empty the cache, downloaded packages too.")] = False,
) -> None:
    """Remove old images and the parts only they were made from."""
    removed, freed = images.prune(keep=keep, everything=everything, progress=_say)
    typer.echo(f"removed {len(removed)} items, freed {freed / _MIB:.0f} MiB")
