"""The parts of an image: what each is made from (its key) and how it is made.

    packages   which versions, by apt                    <- spec, mirrors
    base       root tree of Debian packages, tar         <- versions
    dev        tree with compiler and headers, tar       <- versions
    kernel     kernel, chosen modules, initramfs modules <- version of the kernel package, lists of modules
    core       idc/_core*.so                             <- dev, idc/core
    image      erofs + initramfs + manifest              <- base, kernel, core, idc, guest, rootfs/

A part is made in the cache's tmp/ and renamed, so what exists is complete. May import all of `images` but `build`.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from images import archive, modules, sandbox
from images import kernel as kernel_formats
from images.apt import Apt, Package, mode
from images.errors import ImageError, Progress
from images.image import KERNEL_ARGUMENTS, MANIFEST
from images.kernel import unpack_bzimage
from images.modules import ModuleTree, closure
from images.sources import SITE, code_of, hash_of, initramfs_script, package_entries, tree_entries
from images.spec import BUILDER_VERSION, ImageSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from images.cache import Cache
    from images.runner import Runner


@dataclass(frozen=True)
class Versions:
    """The packages of each tree, in the versions the lists had when they were resolved."""

    root: tuple[Package, ...]
    dev: tuple[Package, ...]
    kernel: Package

    @property
    def busybox(self) -> Package:
        """The one for the initramfs. Raises ImageError if the root has none."""
        for package in self.root:
            if package.name == "busybox-static":
                return package
        raise ImageError("packages must name busybox-static: the guest's init is busybox")

    def to_json(self) -> dict[str, Any]:
        """As stored."""
        return {"root": [[p.name, p.version] for p in self.root], "dev": [[p.name, p.version] for p in self.dev],
                "kernel": [self.kernel.name, self.kernel.version]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Versions:
        """From what `to_json` wrote."""
        return cls(tuple(Package(*item) for item in data["root"]), tuple(Package(*item) for item in data["dev"]),
                   Package(*data["kernel"]))


@dataclass(frozen=True)
class Sources:
    """Our own files, read once."""

    idc: tuple[archive.Entry, ...]
    guest: tuple[archive.Entry, ...]
    tree: tuple[archive.Entry, ...]
    initramfs: bytes

    @classmethod
    def read(cls) -> Sources:
        """From where this package lies."""
        return cls(tuple(package_entries("idc")), tuple(package_entries("guest")), tuple(tree_entries()),
                   initramfs_script())

    def core(self) -> list[archive.Entry]:
        """What the extension is made from: the C core, and the C of endpoint, transport, pump and measurements."""
        beside = tuple(f"idc/{name}/" for name in ("block", "endpoint", "measure", "pump", "transport"))
        return [entry for entry in self.idc if entry.path.startswith("idc/core/") or entry.path == "idc/__init__.py"
                or (entry.path.startswith(beside) and entry.path.endswith((".c", ".h")))]


def packages_key(spec: ImageSpec, mirrors: tuple[str, ...]) -> str:
    """Key of the resolved versions."""
    return hash_of(BUILDER_VERSION, spec.suite, spec.arch, spec.kernel_package, spec.packages, spec.dev_packages,
                   mirrors)


@dataclass(frozen=True)
class Keys:
    """The key of every part made from packages, and the image's hash."""

    base: str
    dev: str
    kernel: str
    core: str
    image: str


def make_keys(spec: ImageSpec, versions: Versions, sources: Sources) -> Keys:
    """Keys from everything that can change a part, the code that makes it included. Reads that code, nothing else."""
    data = versions.to_json()
    common = (BUILDER_VERSION, spec.suite, spec.arch)
    shop, packing = Workshop, code_of(archive)
    base = hash_of(common, spec.packages, data["root"], sandbox.BASE_HOOK, sandbox.EXCLUDED,
                   code_of(shop.base), code_of(shop._mmdebstrap))
    dev = hash_of(common, spec.dev_packages, data["dev"], code_of(shop.dev), code_of(shop._mmdebstrap))
    kernel = hash_of(common, data["kernel"], versions.busybox.version, spec.modules, spec.boot_modules, packing,
                     code_of(shop.kernel), code_of(kernel_formats), code_of(modules))
    core = hash_of(dev, sources.core(), sandbox.CORE, packing, code_of(shop.core), code_of(shop._sandbox))
    image = hash_of(base, kernel, core, spec.name, spec.compression, sources.idc, sources.guest, sources.tree,
                    sources.initramfs, sandbox.ROOT, KERNEL_ARGUMENTS, packing,
                    code_of(shop.image), code_of(shop._sandbox), code_of(_initrd))
    return Keys(base, dev, kernel, core, image)


@dataclass
class Workshop:
    """Makes the parts of one image. The caller holds the cache's lock."""

    spec: ImageSpec
    cache: Cache
    runner: Runner
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def log(self, kind: str) -> Path:
        """The log of a part, of its last making."""
        return self.cache.logs / f"{kind}.log"

    @contextmanager
    def making(self, kind: str, text: str) -> Iterator[Path]:
        """Start a log and a clock, and give a directory for unfinished work."""
        self.log(kind).write_bytes(b"")
        self.progress(text)
        started = time.monotonic()
        work = self.cache.tmp / kind
        work.mkdir()
        yield work
        shutil.rmtree(work)
        self.seconds[kind] = round(time.monotonic() - started, 2)

    def packages(self, mirrors: tuple[str, ...], path: Path) -> tuple[Apt, Versions]:
        """Resolve all packages from fresh lists."""
        with self.making("packages", "looking up packages") as work:
            mode()
            self.runner.run("making a namespace to build in", ["mmdebstrap", "--unshare-helper", "true"],
                            self.log("packages"))  # before anything is downloaded for nothing
            apt = Apt(self.spec, self.cache, self.runner, self.log("packages"))
            apt.configure(mirrors)
            apt.update()
            kernels = [package for package in apt.resolve([self.spec.kernel_package], essential=False)
                       if package.name.startswith("linux-image-") and package.name != self.spec.kernel_package]
            if len(kernels) != 1:
                raise ImageError(f"{self.spec.kernel_package} stands for {len(kernels)} kernels, not for one")
            versions = Versions(tuple(apt.resolve(self.spec.packages, essential=True)),
                                tuple(apt.resolve(self.spec.dev_packages, essential=False)), kernels[0])
            made = work / "packages.json"
            made.write_text(json.dumps(versions.to_json()))
            self.cache.publish(made, path)
        return apt, versions

    def download(self, apt: Apt, versions: Versions) -> tuple[Path, Path]:
        """Fetch all packages into the cache; returns the kernel's and busybox's."""
        with self.making("download", "downloading packages (those already here are kept)"):
            kernel, busybox = apt.download_one(versions.kernel), apt.download_one(versions.busybox)
            apt.download(self.spec.packages, essential=True)
            apt.download(self.spec.dev_packages, essential=False)
        return kernel, busybox

    def _mmdebstrap(self, kind: str, apt: Apt, out: Path, variant: str, packages: tuple[str, ...], *more: str) -> None:
        self.runner.run(f"building the {kind} tree", [
            "mmdebstrap", f"--mode={mode()}", f"--variant={variant}", f"--include={','.join(packages)}",
            f"--architectures={self.spec.arch}", "--format=tar",
            # lists and archives are ours, from one moment, with keys named; device nodes come from the kernel
            "--skip=update,output/dev,check/signed-by", f"--aptopt={apt.options}",
            '--setup-hook=mkdir -p "$1"/var/lib/apt/lists/partial "$1"/var/cache/apt/archives',
            f"--setup-hook=sync-in {apt.lists} /var/lib/apt/lists",
            f"--setup-hook=sync-in {self.cache.debs} /var/cache/apt/archives",
            *more, self.spec.suite, out, apt.sources,
        ], self.log(kind))  # fmt: skip

    def base(self, apt: Apt, path: Path) -> None:
        """The root tree of Debian packages."""
        with self.making("base", f"installing {len(self.spec.packages)} packages and what they need") as work:
            made = work / "base.tar"
            self._mmdebstrap("base", apt, made, "essential", self.spec.packages,
                             # what a kill leaves is thrown away, so nothing has to reach the disk in order
                             "--dpkgopt=force-unsafe-io", "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
                             *(f"--dpkgopt=path-exclude={glob}" for glob in sandbox.EXCLUDED),
                             f"--customize-hook={sandbox.BASE_HOOK}")
            self.cache.publish(made, path)

    def dev(self, apt: Apt, path: Path) -> None:
        """The tree with compiler and headers."""
        with self.making("dev", "unpacking the compiler") as work:
            made = work / "dev.tar"
            self._mmdebstrap("dev", apt, made, "extract", self.spec.dev_packages)
            self.cache.publish(made, path)

    def kernel(self, package: Path, busybox: Path, path: Path) -> None:
        """Kernel, modules, the kernel's package itself, and busybox; no part of it is installed anywhere."""
        with self.making("kernel", f"unpacking {package.name}") as work:
            unpacked, made = work / "unpacked", work / "kernel"
            self.runner.run("unpacking busybox", ["dpkg-deb", "--extract", busybox, unpacked], self.log("kernel"))
            self.runner.run("unpacking the kernel", ["dpkg-deb", "--extract", package, unpacked], self.log("kernel"))
            (directory,) = (unpacked / "lib" / "modules").iterdir()
            release = directory.name
            builtin = [Path(line).name for line in (directory / "modules.builtin").read_text().split()]
            available = ModuleTree(directory)
            wanted = closure(self.spec.modules, available, builtin)
            early = closure(self.spec.boot_modules, available, builtin)
            root = f"usr/lib/modules/{release}"
            kept = [directory / "modules.builtin", directory / "modules.builtin.modinfo", directory / "modules.order",
                    *(directory / available[name].path for name in wanted)]
            made.mkdir()
            (made / "modules.tar").write_bytes(archive.make_tar(
                archive.file(f"{root}/{file.relative_to(directory)}", file.read_bytes(), 0o644) for file in kept))
            (made / "early.cpio").write_bytes(archive.make_cpio([
                *(archive.file(f"modules/{name}.ko", (directory / available[name].path).read_bytes(), 0o644)
                  for name in early),
                archive.file("modules/order", "".join(f"{name}.ko\n" for name in early).encode())]))
            (made / "kernel").write_bytes(unpack_bzimage((unpacked / "boot" / f"vmlinuz-{release}").read_bytes()))
            shutil.copyfile(unpacked / "bin" / "busybox", made / "busybox")
            os.link(package, made / package.name)
            (made / "kernel.json").write_text(json.dumps({
                "release": release, "modules": sorted(wanted), "early": early, "package": package.name}))
            self.cache.publish(made, path)

    def core(self, sources: Sources, dev: Path, path: Path) -> None:
        """The C core, compiled in the development tree."""
        with self.making("core", "compiling the C core for the guest") as work:
            made, packed = work / "core.tar", work / "sources.tar"
            packed.write_bytes(archive.make_tar(archive.with_parents(sources.core())))
            self._sandbox("core", "compiling the C core", sandbox.CORE, [dev, packed], made)
            self.cache.publish(made, path)

    def kbuild(self, apt: Apt, packages: tuple[str, ...], path: Path) -> None:
        """The tree in which modules for a kernel are compiled."""
        with self.making("kbuild", "unpacking kernel headers and compiler") as work:
            made = work / "kbuild.tar"
            self._mmdebstrap("kbuild", apt, made, "extract", packages)
            self.cache.publish(made, path)

    def module(self, kbuild: Path, sources: Sequence[archive.Entry], release: str, name: str, path: Path) -> None:
        """A user's own modules, compiled in the tree that `kbuild` made."""
        with self.making("module", f"compiling {name} for {release}") as work:
            made, packed, out = work / "module", work / "sources.tar", work / "module.tar"
            packed.write_bytes(archive.make_tar(archive.with_parents(sources)))
            self._sandbox("module", f"compiling {name}", sandbox.MODULE, [kbuild, packed], out, release)
            made.mkdir()
            with tarfile.open(out) as archived:
                # Python 3.11.4 brought filters; where there is none, the archive is still our own.
                archived.extraction_filter = getattr(tarfile, "data_filter", None)
                archived.extractall(made)
            self.cache.publish(made, path)

    def _sandbox(self, kind: str, what: str, script: str, inputs: list[Path], out: Path, *words: str) -> None:
        self.runner.run(what, ["mmdebstrap", "--unshare-helper", "sh", "-c", script, "sh", *words], self.log(kind),
                        stdout=out, inputs=dict(enumerate(inputs, start=3)))

    def image(self, keys: Keys, versions: Versions, sources: Sources, parts: dict[str, Path],
              path: Path) -> None:
        """The root file system with our files laid over, the initramfs, the manifest."""
        with self.making("image", "writing the root file system") as work:
            label, started = path.name, time.monotonic()
            made, overlay = work / "image", work / "overlay.tar"
            made.mkdir()
            about = json.loads((parts["kernel"] / "kernel.json").read_text())
            python = [entry for entry in (*sources.idc, *sources.guest) if not entry.path.endswith((".c", ".h"))]
            overlay.write_bytes(archive.make_tar([*sources.tree, *(
                archive.Entry(f"{SITE}/{entry.path}", entry.mode, entry.data) for entry in python)]))
            files = {"kernel": f"{label}.vmlinux", "initrd": f"{label}.initrd", "rootfs": f"{label}.erofs",
                     "kernel_deb": about["package"]}
            options = [f"-z{self.spec.compression}"] if self.spec.compression else []
            self._sandbox("image", "writing the root file system", sandbox.ROOT,
                          [parts["base"], overlay, parts["core"], parts["kernel"] / "modules.tar"],
                          made / files["rootfs"], about["release"], str(uuid.uuid5(uuid.NAMESPACE_OID, label)),
                          *options)
            kernel = parts["kernel"]
            (made / files["initrd"]).write_bytes(_initrd(sources, kernel / "busybox", kernel / "early.cpio"))
            os.link(parts["kernel"] / "kernel", made / files["kernel"])
            os.link(parts["kernel"] / about["package"], made / files["kernel_deb"])
            self.seconds["image"] = round(time.monotonic() - started, 2)
            manifest = {
                "name": self.spec.name, "hash": keys.image, "files": files, "kernel_arguments": list(KERNEL_ARGUMENTS),
                "kernel_release": about["release"], "modules": about["modules"], "boot_modules": about["early"],
                "packages": versions.to_json(), "parts": sorted(part.name for part in parts.values()),
                "bytes": {key: (made / name).stat().st_size for key, name in files.items()}, "seconds": self.seconds,
            }  # fmt: skip
            (made / MANIFEST).write_text(json.dumps(manifest, indent=1))
            self.cache.publish(made, path)


def _initrd(sources: Sources, busybox: Path, early: Path) -> bytes:
    """busybox, our /init and mount points; then the modules as a second archive, which the kernel unpacks as well."""
    return archive.make_cpio([
        *(archive.directory(name) for name in ("dev", "proc", "sys", "ro", "rw", "root")),
        archive.file("busybox", busybox.read_bytes()), archive.file("init", sources.initramfs),
    ]) + early.read_bytes()  # fmt: skip
