"""The console watcher, fed through a socket pair."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.console import Console, Finding


class Bench:
    def __init__(self, directory: Path) -> None:
        self.qemu, ours = socket.socketpair()
        self.found: list[Finding] = []
        self.event = threading.Event()
        self.console = Console(ours, directory / "vm.console.log", self.on_finding)

    def on_finding(self, finding: Finding) -> None:
        self.found.append(finding)
        self.event.set()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    it = Bench(tmp_path)
    yield it
    it.qemu.close()
    it.console.close()


def test_every_byte_is_logged_and_the_tail_is_forty_lines(bench: Bench) -> None:
    data = b"".join(b"line %d\r\n" % n for n in range(100)) + b"\x1b[1mprompt> "
    bench.qemu.sendall(data)
    bench.qemu.close()
    assert bench.console.wait_end(5)
    assert bench.console.log.read_bytes() == data
    tail = bench.console.tail()
    assert len(tail) == 40
    assert tail[-2:] == ("line 99", "prompt>")


def test_a_panic_is_told_at_once(bench: Bench) -> None:
    bench.qemu.sendall(b"[    1.2] Kernel panic - not syncing: sysrq triggered crash\r\n")
    assert bench.event.wait(5)
    assert bench.found[0].severity == "panic"
    assert bench.found[0].text == "Kernel panic - not syncing: sysrq triggered crash"


def test_an_oops_is_told_with_its_trace(bench: Bench) -> None:
    bench.qemu.sendall(b"BUG: kernel NULL pointer dereference, address: 0\r\nOops: 0002 [#1]\r\nCall Trace:\r\n")
    assert not bench.event.wait(0.1)
    bench.qemu.sendall(b" a+0x1\r\n---[ end trace 0 ]---\r\n")
    assert bench.event.wait(5)
    assert [finding.severity for finding in bench.found] == ["oops"]
    assert "Call Trace:" in bench.console.tail()


def test_lockups_are_warnings_only(bench: Bench) -> None:
    bench.qemu.sendall(b"watchdog: BUG: soft lockup - CPU#0 stuck for 26s!\r\n")
    bench.qemu.sendall(b"rcu: INFO: rcu_sched self-detected stall on CPU\r\n")
    bench.qemu.close()
    assert bench.console.wait_end(5)
    assert len(bench.console.warnings()) == 2
    assert bench.found == []


def test_text_is_found_across_writes_and_before_the_end_of_a_line(bench: Bench) -> None:
    bench.qemu.sendall(b"log")
    bench.qemu.sendall(b"in: ")
    bench.qemu.shutdown(socket.SHUT_WR)
    assert bench.console.wait_end(5)
    assert bench.console.search("^login: $")
    assert bench.console.search("login", start=3) is None
