"""Packages: from which mirror, which versions, downloaded where. Runs apt with a configuration of its own.

Every tree is made from one set of package lists, so that the C core is compiled against the very libc and Python that
the guest runs. apt downloads as the user who builds, into the cache, and resumes where it was cut off.
May import images.spec, images.cache, images.runner.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from images.errors import SEARCH_PATH, ImageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from images.cache import Cache
    from images.runner import Runner
    from images.spec import ImageSpec

#: Options of the host's apt that have to hold for ours too: how to get out, and clocks of archived mirrors.
_PASSED_ON = re.compile(r"Acquire::(https?|ftp)::(Proxy|Verify|CaInfo)|Acquire::(Check-Valid-Until|Check-Date|Retries)")
_INSTALL = re.compile(r"^Inst (\S+) \((\S+) ", re.MULTILINE)
_KEYRINGS = ("/usr/share/keyrings/debian-archive-keyring.gpg", "/usr/share/keyrings/debian-archive-keyring.pgp")


@dataclass(frozen=True)
class Package:
    """A package in one version."""

    name: str
    version: str


def keyring() -> Path:
    """The Debian archive's public keys, which an Ubuntu host may lack."""
    for path in map(Path, _KEYRINGS):
        if path.exists():
            return path
    raise ImageError("the Debian archive's keys are missing; try: apt-get install debian-archive-keyring")


def mirror_sources(mirrors: Sequence[str], spec: ImageSpec) -> list[str]:
    """Lines of sources.list for mirrors given as URLs; one that ends in `-security` serves the security suite."""
    lines = []
    for mirror in mirrors:
        security = mirror.rstrip("/").endswith("-security")
        suites = [f"{spec.suite}-security"] if security else [spec.suite, f"{spec.suite}-updates"]
        lines += [f"deb [arch={spec.arch}] {mirror} {suite} main" for suite in suites]
    return lines


def host_sources(targets: str, spec: ImageSpec) -> list[str]:
    """Lines of sources.list for Debian mirrors of this suite among the host's own.

    `targets` is what `apt-get indextargets` printed in the format of `_TARGETS`. Empty if the suite itself is missing.
    """
    suites = {f"{spec.suite}{part}" for part in ("", "-updates", "-security")}
    found: dict[tuple[str, str], None] = {}
    for line in targets.splitlines():
        origin, codename, release, component, uri = line.split("|")
        if origin == "Debian" and codename in suites and component == "main":
            found[uri, release] = None
    if not any(release == spec.suite for _, release in found):
        return []
    return [f"deb [arch={spec.arch}] {uri} {release} main" for uri, release in found]


_TARGETS = "$(ORIGIN)|$(CODENAME)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)"


def signed(lines: Sequence[str], keys: Path) -> str:
    """sources.list: `lines`, each to be checked against `keys` unless it says otherwise."""
    return "".join((line if "signed-by=" in line else line.replace("[", f"[signed-by={keys} ", 1)) + "\n"
                   for line in lines)


class Apt:
    """apt with its own lists, archives and sources, all in the cache."""

    def __init__(self, spec: ImageSpec, cache: Cache, runner: Runner, log: Path) -> None:
        self._spec, self._cache, self._runner, self._log = spec, cache, runner, log
        self.lists = cache.apt / "lists"
        self.sources = cache.apt / "sources.list"
        self.options = cache.apt / "options"

    def _run(self, what: str, *words: str, directory: Path | None = None) -> str:
        environment = {"APT_CONFIG": str(self._cache.apt / "apt.conf")}
        return self._runner.run(what, words, self._log, environment=environment, directory=directory)

    def configure(self, mirrors: Sequence[str]) -> None:
        """Write sources and options: the mirrors given, else the host's own for this suite, else mmdebstrap's."""
        apt = self._cache.apt
        for path in (self.lists / "partial", apt / "parts", apt / "preferences", self._cache.debs / "partial"):
            path.mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        dump = self._runner.run("reading apt's configuration", ["apt-config", "dump"], self._log)
        passed_on = "".join(f"{line}\n" for line in dump.splitlines() if _PASSED_ON.match(line))
        self.options.write_text(f'{passed_on}Acquire::Languages "none";\nAPT::Install-Recommends "false";\n')
        if mirrors:
            lines = mirror_sources(mirrors, self._spec)
        else:
            targets = self._runner.run("asking apt for the host's mirrors", [
                "apt-get", "indextargets", "--format", _TARGETS, "Created-By: Packages"], self._log)
            lines = host_sources(targets, self._spec) or self._mmdebstrap_sources()
        self.sources.write_text(signed(lines, keyring()))
        (apt / "apt.conf").write_text(
            f'#include "{self.options}";\n'
            f'Dir::State "{apt}";\nDir::State::status "{apt}/status";\nDir::Cache "{apt}";\n'
            f'Dir::Cache::archives "{self._cache.debs}";\nDir::Etc "{apt}";\nDir::Etc::parts "{apt}/parts";\n'
            f'Dir::Etc::preferencesparts "{apt}/preferences";\nDir::Etc::sourceparts "{apt}/parts";\n'
            f'APT::Architecture "{self._spec.arch}";\nAPT::Architectures "{self._spec.arch}";\n'
            # it downloads as whoever builds: _apt cannot write into a user's cache
            'APT::Sandbox::User "";\nAcquire::Retries "3";\n')

    def _mmdebstrap_sources(self) -> list[str]:
        """What mmdebstrap would use with no mirror named: it knows Debian's own, also on a host that is not Debian."""
        text = self._runner.run("asking mmdebstrap for its default mirrors", [
            "mmdebstrap", f"--mode={mode()}", "--variant=custom", "--format=null",
            "--skip=update,download,chroot/mount", f"--architectures={self._spec.arch}",
            '--customize-hook=sed "s/^deb /SOURCE deb /" "$1"/etc/apt/sources.list >&2',
            self._spec.suite, "/dev/null"], self._log)
        text = self._log.read_text(errors="replace")
        lines = [line.removeprefix("SOURCE ") for line in text.splitlines() if line.startswith("SOURCE deb ")]
        if not lines:
            raise ImageError(f"no mirror for {self._spec.suite} is known here; give one with --mirror "
                             f"(log: {self._log})")
        arch = f"deb [arch={self._spec.arch}] "
        return [line if "[" in line else line.replace("deb ", arch, 1) for line in dict.fromkeys(lines)]

    def update(self) -> None:
        """Fetch the package lists."""
        self._run("fetching the package lists", "apt-get", "update", "--error-on=any")

    def resolve(self, packages: Sequence[str], *, essential: bool) -> list[Package]:
        """`packages` and all they depend on, in the versions that would be installed; sorted."""
        wanted = [*(["?essential"] if essential else []), *packages]
        text = self._run(f"resolving {shlex.join(packages)[:60]}", "apt-get", "install", "--simulate", "--quiet",
                         *wanted)
        found = [Package(name.partition(":")[0], version) for name, version in _INSTALL.findall(text)]
        return sorted(found, key=lambda package: package.name)

    def download(self, packages: Sequence[str], *, essential: bool) -> None:
        """Fetch what `resolve` named into the cache; what is there already is not fetched again."""
        wanted = [*(["?essential"] if essential else []), *packages]
        self._run("downloading packages", "apt-get", "install", "--download-only", "--assume-yes", "--quiet", *wanted)

    def download_one(self, package: Package) -> Path:
        """Fetch a single package without what it depends on."""
        name = f"{package.name}_{package.version.replace(':', '%3a')}_{self._spec.arch}.deb"
        self._run(f"downloading {package.name}", "apt-get", "download", f"{package.name}={package.version}",
                  directory=self._cache.debs)
        path = self._cache.debs / name
        if not path.exists():
            raise ImageError(f"apt-get download did not write {path}; see {self._log}")
        return path


def mode() -> str:
    """mmdebstrap's mode for whoever builds. Raises ImageError with what an ordinary user lacks."""
    if os.geteuid() == 0:
        return "root"
    if shutil.which("newuidmap", path=SEARCH_PATH) is None:
        raise ImageError("building as an ordinary user needs newuidmap; try: apt-get install uidmap")
    return "unshare"
