"""Prepares a machine: Debian packages, virtual environment, C core. Run by make on a bare machine.

Standard library only, Python 3.11 or newer. Every step looks first and does only what is missing, so an
interrupted run is resumed by running it again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".idc-testbed"

#: What `testbed` needs at run time: the command looked for, and the Debian package that brings it.
RUN_COMMANDS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "mmdebstrap": "mmdebstrap",
    "mkfs.erofs": "erofs-utils",
    "gcc": "gcc",
    "mount": "mount",  # not in the smallest of Debian's systems; the image builder mounts in a namespace of its own
}
#: Lines of a failed apt that are shown.
APT_TAIL = 25
#: What the tests need on top.
DEV_COMMANDS = {"spin": "spin", "ssh": "openssh-client", "clang": "clang", "ip": "iproute2",
                "systemd-analyze": "systemd"}
#: Browsers that tests of the report can use; the first is what is installed where there is none.
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")


def say(text: str) -> None:
    """Write one line of progress to standard error."""
    sys.stderr.write(f"setup: {text}\n")
    sys.stderr.flush()


def die(text: str) -> NoReturn:
    """End with one clear line."""
    say(text)
    raise SystemExit(1)


def have_command(name: str) -> bool:
    """Whether a command can be found, also in sbin, which an ordinary user's PATH leaves out."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is not None


def missing_packages(dev: bool) -> list[str]:
    """Debian packages that have to be installed, in a stable order."""
    wanted = RUN_COMMANDS | (DEV_COMMANDS if dev else {})
    missing = [package for command, package in wanted.items() if not have_command(command)]
    if not Path("/usr/include/stdlib.h").exists():
        missing.append("libc6-dev")
    if importlib.util.find_spec("ensurepip") is None:
        missing.append(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append(f"libpython{sys.version_info.major}.{sys.version_info.minor}-dev")
    if not Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists():
        missing.append("debian-archive-keyring")
    if os.getuid() != 0 and not have_command("newuidmap"):
        missing.append("uidmap")
    if dev and not have_command("clang"):
        missing.append("llvm")
    if dev and not any(map(have_command, BROWSERS)):
        missing.append(BROWSERS[0])
    if dev and not units_have_cffi():
        missing.append("python3-cffi-backend")
    if dev and not list(Path("/usr/lib").glob("llvm-*/lib/clang/*/lib/linux/libclang_rt.fuzzer-x86_64.a")):
        missing.append(clang_runtime())
    return sorted(set(missing))


def units_have_cffi() -> bool:
    """Whether the system's Python, which systemd's units start, can load the core."""
    python = Path("/usr/bin/python3")
    return python.exists() and subprocess.run([python, "-c", "import _cffi_backend"], capture_output=True,
                                              check=False).returncode == 0  # fmt: skip


def clang_runtime() -> str:
    """The package with libFuzzer for the clang that this Debian release installs by default."""
    probe = subprocess.run(["apt-cache", "depends", "clang"], capture_output=True, text=True, check=False)
    for word in probe.stdout.split():
        if word.startswith("clang-") and word.removeprefix("clang-").isdigit():
            return f"libclang-rt-{word.removeprefix('clang-')}-dev"
    return "libclang-rt-14-dev"


def install_packages(dev: bool) -> None:
    """Install what is missing with apt, or say which one command does it."""
    if not missing_packages(dev):
        return
    if shutil.which("apt-get") is None:
        die("this is not a Debian or Ubuntu machine; install what these packages bring: "
            + " ".join(missing_packages(dev)))
    become: list[str] = []
    if os.getuid() != 0:
        sudo = shutil.which("sudo")
        asked = [sudo, "-n", "true"] if sudo else ["false"]
        if sudo is None or subprocess.run(asked, capture_output=True, check=False).returncode != 0:
            packages = " ".join(missing_packages(dev))
            die(f"packages are missing; run this once as root, then try again:\n"
                f"  apt-get update && apt-get install --no-install-recommends -y {packages}")
        become = [sudo, "-n"]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}

    def apt(*words: str) -> None:
        command = [*become, *words]
        say(shlex.join(command))
        # hundreds of lines, of which nobody reads one unless it failed
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
        if done.returncode != 0:
            sys.stderr.write("\n".join(done.stdout.splitlines()[-APT_TAIL:]) + "\n")
            die(f"failed: {shlex.join(command)} (its last lines are above)")

    audit = subprocess.run(["dpkg", "--audit"], capture_output=True, text=True, check=False)
    if audit.stdout.strip():  # an earlier run was interrupted between unpacking and configuring
        apt("dpkg", "--configure", "-a")
    apt("apt-get", "-qq", "update")
    # clang's runtime can be named only once the package lists are there, so the list is made after the update
    apt("apt-get", "-qq", "install", "-y", "--no-install-recommends", *missing_packages(dev))
    if left := missing_packages(dev):
        die("still missing after the installation: " + " ".join(left))


def fingerprint(dev: bool) -> str:
    """What the virtual environment was made from; a change of any of it calls for another `pip install`."""
    digest = hashlib.sha256(f"{sys.version} {ROOT} {dev}".encode())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "idc" / "core").glob("*.[chp]*")),
                 *sorted((ROOT / "idc" / "block").glob("*.[ch]")), *sorted((ROOT / "idc" / "endpoint").glob("*.[ch]")),
                 *sorted((ROOT / "idc" / "measure").glob("*.[ch]")), *sorted((ROOT / "idc" / "pump").glob("*.[ch]")),
                 *sorted((ROOT / "idc" / "transport").glob("*.[ch]"))]:
        if path.suffix in {".c", ".h", ".py", ".toml"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def make_environment(dev: bool) -> None:
    """Create `.venv` and install this project into it, unless it is there and up to date."""
    prints = [fingerprint(True)] if dev else [fingerprint(True), fingerprint(False)]
    if STAMP.exists() and STAMP.read_text() in prints:
        return
    dev = dev or (STAMP.exists() and (VENV / "bin" / "pytest").exists())
    python = VENV / "bin" / "python"
    works = python.exists() and subprocess.run(
        [python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    if not works:
        say(f"python {sys.version.split()[0]} -m venv .venv")
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    target = f"{ROOT}[dev]" if dev else str(ROOT)
    say("pip install -e " + (".[dev]" if dev else "."))
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-e", target]
    if subprocess.run(command, check=False).returncode != 0:
        die("pip could not install the project (see the lines above); try again when the network is back")
    STAMP.write_text(fingerprint(dev))


def main() -> None:
    """Prepare for `run` (demo) or `dev` (tests)."""
    parser = argparse.ArgumentParser(prog="bootstrap", description=__doc__)
    parser.add_argument("what", choices=["run", "dev"])
    dev = parser.parse_args().what == "dev"
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever python3 the machine has
        die(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.11")
    with (ROOT / ".setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits, then finds everything there
        install_packages(dev)
        make_environment(dev)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        die("interrupted; run make again to go on from here")
