"""The units of the docs under a systemd that runs for this test alone, in namespaces of its own: they start, come back
after kill -9, and neither the holder's descriptors nor an established connection notices."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from host import wire
from host.holder import Holder
from host.ivshmem.client import join
from host.region import RegionSpec, _make_memory
from idc.channel import MessageChannel
from idc.layout import ChannelSpec, Kind, Rights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = Path("/usr/lib/systemd/systemd")
LIMIT = 60.0
DAEMONS = ("idc-holder", "idc-region-server", "idc-registry", "idc-broker")
#: In namespaces of its own: nothing of the machine's systemd, its units or its /run is touched.
BEGIN = f"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /etc/systemd
mount -t tmpfs tmpfs /usr/lib/systemd/system
mkdir /etc/systemd/system
cp "$1"/*.service "$1"/*.target /etc/systemd/system/
cp "$1"/system.conf /etc/systemd/
umount -l /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
exec env -i container=oci PATH="$PATH" {SYSTEMD} --system --unit=idc.target --show-status=no
"""


def units() -> dict[str, str]:
    found = {}
    for page in ("daemons.md", "registry.md"):
        for text in re.findall(r"```ini\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL):
            found[text.partition("\n")[0].removeprefix("# ")] = text
    return found


def hierarchy() -> Path | None:
    """Where the second version of control groups is mounted."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    return next((Path(where) for _, where, kind, *_ in mounts if kind == "cgroup2"), None)


def absent() -> str:
    """What this test needs and this machine lacks; empty if nothing."""
    if not SYSTEMD.exists() or not shutil.which("nsenter"):
        return f"no {SYSTEMD}, or no nsenter, here"
    if os.geteuid() != 0:
        return "namespaces for a systemd need root"
    if subprocess.run(["/usr/bin/python3", "-c", "import _cffi_backend"], check=False, capture_output=True).returncode:
        return "/usr/bin/python3, which the units start, has no cffi"
    where = hierarchy()
    return "" if where is not None and os.access(where, os.W_OK) else "no writable cgroup2 hierarchy"


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {LIMIT:g} s"
        time.sleep(0.05)


class Systemd:
    """One that runs."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.root = Path(f"/proc/{pid}/root")

    def show(self, unit: str, name: str) -> str:
        done = subprocess.run(["nsenter", "-t", str(self.pid), "-m", "-p", "systemctl", "show", "--value", "-p", name,
                               f"{unit}.service"], capture_output=True, text=True, check=False, timeout=LIMIT)
        return done.stdout.strip()

    def kill(self, unit: str) -> None:
        """-9, and wait until another one runs."""
        before = self.show(unit, "MainPID")
        # The shell's own kill: the program is procps', which a small machine has not.
        subprocess.run(["nsenter", "-t", str(self.pid), "-m", "-p", "sh", "-c", f"kill -9 {before}"], check=True,
                       timeout=LIMIT)  # fmt: skip
        until(f"{unit} comes back", lambda: self.show(unit, "MainPID") not in ("0", "", before)
              and self.show(unit, "ActiveState") == "active")


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    if lacking := absent():
        pytest.skip(lacking)
    found = units()
    for name, text in found.items():
        (tmp_path / name).write_text(text)
    for name in ("sysinit", "basic", "shutdown"):
        (tmp_path / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
    (tmp_path / "idc.target").write_text(
        "[Unit]\n" + "".join(f"Wants={name}.service\n" for name in DAEMONS))
    (tmp_path / "system.conf").write_text(
        f"[Manager]\nDefaultEnvironment=PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1\n")
    where = hierarchy()
    assert where is not None
    group = where / f"idc-test-{os.getpid()}"
    group.mkdir()
    process = subprocess.Popen(
        ["sh", "-c", 'echo $$ >"$1/cgroup.procs"; shift; exec unshare -pmC --fork --mount-proc --kill-child=KILL "$@"',
         "sh", str(group), "sh", "-c", BEGIN, "sh", str(tmp_path)], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until("systemd starts", lambda: children.read_text().split())
        made = Systemd(int(children.read_text().split()[0]))
        until("units start", lambda: all(made.show(name, "ActiveState") == "active" for name in DAEMONS))
        yield made
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        until("its processes end", lambda: _removed(group))


def _removed(group: Path) -> bool:
    for each in sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            each.rmdir()
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def answers(path: Path) -> bool:
    try:
        wire.connect(path, LIMIT).close()
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    return True


def ask(path: Path, op: str, *fds: int) -> dict[str, Any]:
    """Of a daemon; waits for one that has just come back, whose socket is there before it listens."""
    until(path.name, lambda: answers(path))
    with wire.connect(path, LIMIT) as control:
        wire.send_message(control, {"op": op}, fds)
        answer = wire.receive_message(control)
    assert answer is not None
    assert answer[0]["ok"], answer
    return answer[0]


@pytest.mark.timeout(400)
def test_units_start_and_come_back_and_nobody_connected_notices(systemd: Systemd) -> None:
    run = systemd.root / "run/idc"
    until("sockets", lambda: all((run / f"{name}.sock").exists() for name in (
        "holder", "control", "registry", "broker")))
    header = RegionSpec("link", 1 << 20, {"front": Rights.RW, "back": Rights.RW},
                        [ChannelSpec("calls", Kind.MESSAGE, "front", "back", 64 * 256, 256)]).plan(1)
    memory = _make_memory(header)
    created = ask(run / "control.sock", "create", memory)
    os.close(memory)
    holder = Holder(run / "holder.sock")
    sockets = {name: systemd.root / path.lstrip("/") for name, path in created["sockets"].items()}
    with contextlib.ExitStack() as stack:
        front, back = (stack.enter_context(join(sockets[name])) for name in ("front", "back"))
        with ThreadPoolExecutor(2) as threads:
            ends = list(threads.map(lambda one: MessageChannel.attach(one, "calls", timeout=LIMIT), (front, back)))
        for end in ends:
            stack.callback(end.close)
        held = holder.names()
        assert "region/link" in held
        # One that began before another's socket was there has been started again already.
        before = {unit: int(systemd.show(unit, "NRestarts")) for unit in DAEMONS}
        for unit in DAEMONS[1:]:
            systemd.kill(unit)
            assert int(systemd.show(unit, "NRestarts")) == before[unit] + 1
            ends[0].sender.send(unit.encode(), timeout=LIMIT)
            assert bytes(ends[1].receiver.recv(timeout=LIMIT)) == unit.encode()
        assert holder.names() == held
    holder.close()
    assert "link" in ask(run / "control.sock", "list")["regions"]
    assert ask(run / "broker.sock", "status")
    with join(sockets["front"]) as again:
        assert again.header.uuid == header.uuid
