"""What this machine has and lacks for a testbed. Looks; starts nothing unless asked to probe, and changes nothing.

May depend on `testbed.bootstrap` (which owns the table of packages), `testbed.accel`, `testbed.registry`, `images`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import images
from testbed import accel, bootstrap, keeper, registry
from testbed.errors import TestbedError
from testbed.run import default_base, keeper_lives

if TYPE_CHECKING:
    from collections.abc import Iterator

State = Literal["ok", "warn", "fail"]
MIB = 1 << 20
#: An image build needs this much in its cache, and as much again in /tmp.
BUILD_MIB = 1500
#: Two VMs of 256 MiB with what QEMU takes besides.
PAIR_MIB = 1000


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what it is.
        state: "fail" where nothing works without it, "warn" where something is slower or missing.
        found: in one line.
        remedy: what to do; empty if nothing need be done.
    """

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(*, probe: bool = False) -> list[Check]:
    """Everything. `probe` boots the guest that proves KVM (five seconds at most) where no verdict is known."""
    checks = [_python(), *_commands(), _image(), _kvm(probe=probe), _tap(), _user_namespaces()]
    if os.getuid() != 0:
        checks.append(_subordinate_ids())
    return [*checks, _memory(), *_disk(), _hugepages(), _runs()]


def _python() -> Check:
    return Check("python", "ok", f"{sys.version.split()[0]} at {sys.executable}")


def _commands() -> Iterator[Check]:
    lacking = bootstrap.missing_packages(dev=False)
    for command, package in bootstrap.RUN_COMMANDS.items():
        where = shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
        if where is not None:
            lacking = [name for name in lacking if name != package]
            yield Check(command, "ok", _version(where) if command.startswith("qemu") else where)
        else:
            lacking = [name for name in lacking if name != package]
            yield Check(command, "fail", "not found", f"apt install {package}")
    for package in lacking:
        yield Check(package, "fail", "not installed", f"apt install {package}")
    ssh = shutil.which("ssh")
    yield Check("ssh", "ok" if ssh else "warn", ssh or "not found: no `testbed ssh`",
                "" if ssh else "apt install openssh-client")


def _version(program: str) -> str:
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"{program}, which does not say its version: {error}"
    return f"{program}, {said.splitlines()[0]}"


def _image() -> Check:
    try:
        found = images.list_images()
    except images.ImageError as error:
        return Check("image", "fail", "the cache is damaged", str(error))
    if not found:
        return Check("image", "warn", "none yet; the first start builds it", "testbed image build")
    return Check("image", "ok", f"{found[0].label}, kernel {found[0].manifest['kernel_release']} ({len(found)} in all)")


def _kvm(*, probe: bool) -> Check:
    try:
        found = images.list_images()
        verdict = accel.known(found[0].kernel) if found else None
        if verdict is None and probe:
            verdict = accel.choose("auto", images.ensure().kernel)
    except (TestbedError, images.ImageError) as error:
        return Check("kvm", "warn", error.args[0], "see the lines above")
    if verdict is None:
        return Check("kvm", "warn", "not proved yet", "testbed doctor --probe")
    if verdict.accel == "kvm":
        return Check("kvm", "ok", verdict.reason)
    return Check("kvm", "warn", verdict.reason, "VMs run under TCG, slower: only ratios within one run mean anything")


def _tap() -> Check:
    device = Path("/dev/net/tun")
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Check("/dev/net/tun", "warn", f"{error.strerror}: networks are socket pairs, of two VMs at most",
                     "modprobe tun, and give this user the right to open it")
    return Check("/dev/net/tun", "ok", "opens")


def _user_namespaces() -> Check:
    """Whether this user may make one: asked by doing it, because kernels, AppArmor and containers all have a say."""
    if shutil.which("unshare") is None:
        return Check("user namespaces", "warn", "there is no unshare to try it with", "apt install util-linux")
    child = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True, text=True,
                           check=False)
    if child.returncode == 0:
        return Check("user namespaces", "ok", "can be made")
    needed = os.getuid() != 0
    return Check("user namespaces", "fail" if needed else "warn", child.stderr.strip() or "cannot be made",
                 "sysctl kernel.unprivileged_userns_clone=1 kernel.apparmor_restrict_unprivileged_userns=0"
                 if needed else "root needs none")


def _subordinate_ids() -> Check:
    user = pwd.getpwuid(os.getuid()).pw_name
    for file in (Path("/etc/subuid"), Path("/etc/subgid")):
        entries = file.read_text().splitlines() if file.exists() else []
        if not any(line.split(":")[0] in (user, str(os.getuid())) for line in entries):
            return Check("subordinate ids", "warn", f"none for {user} in {file}: an image cannot be built",
                         f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}")
    return Check("subordinate ids", "ok", f"{user} has some")


def _meminfo() -> dict[str, int]:
    """/proc/meminfo: kB, or a count for huge pages."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows}


def _memory() -> Check:
    free = _meminfo()["MemAvailable"] >> 10
    if free < PAIR_MIB:
        return Check("memory", "warn", f"{free} MiB available; two VMs of 256 MiB need {PAIR_MIB}", "stop something")
    return Check("memory", "ok", f"{free} MiB available")


def _disk() -> Iterator[Check]:
    for what, directory in (("cache", images.default_directory()), ("temporary files", Path(tempfile.gettempdir()))):
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        free = shutil.disk_usage(existing).free // MIB
        low = free < BUILD_MIB
        yield Check(f"disk for {what}", "warn" if low else "ok", f"{free} MiB free in {existing}",
                    f"an image build needs {BUILD_MIB} MiB" if low else "")


def _hugepages() -> Check:
    info = _meminfo()
    total, free = info.get("HugePages_Total", 0), info.get("HugePages_Free", 0)
    return Check("huge pages", "ok", f"{free} of {total} free (needed only where a VM says hugepages = true)")


def _runs() -> Check:
    """Directories of runs whose keeper is gone; the next run clears them away, and this says that they are there."""
    base = default_base()
    if not base.exists():
        return Check("leftover runs", "ok", "none")
    directories = [path for path in base.iterdir() if stat.S_ISDIR(path.lstat().st_mode) and path.name[0] != "."]
    kept = [path for path in directories if (path / keeper.KEPT_NAME).exists()]
    dead = [path for path in directories if path not in kept and not keeper_lives(path)]
    beds = registry.running()
    text = f"{len(beds)} running; {len(kept)} kept logs in {base}"
    if dead:
        return Check("leftover runs", "warn", f"{text}; without a keeper: {', '.join(path.name for path in dead)}",
                     "the next testbed clears them away")
    return Check("leftover runs", "ok", text)
