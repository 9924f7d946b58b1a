"""Errors say what failed, show the console, name the log, and give a hint."""

from pathlib import Path

from testbed.errors import BootFailed, TestbedError, VmError
from testbed.hints import hint_for


def test_a_vm_error_quotes_the_console_and_names_the_log() -> None:
    error = BootFailed("no READY", vm="front", console=["one", "two"], log=Path("/run/x.log"), hint="look")
    assert str(error).splitlines() == [
        "VM front: no READY",
        "last 2 lines of the console:",
        "  | one",
        "  | two",
        "log: /run/x.log",
        "hint: look",
    ]


def test_an_empty_console_is_said_to_be_empty() -> None:
    assert "the console is empty" in str(VmError("x", vm="a"))


def test_every_vm_error_is_a_testbed_error() -> None:
    assert issubclass(BootFailed, VmError)
    assert issubclass(VmError, TestbedError)


def test_hints_come_from_what_was_said() -> None:
    assert "tcg" in hint_for("KVM internal error. Suberror: 1")
    assert "rebuild" in hint_for("x", "erofs: (device vda): bad superblock")
    assert hint_for("all is well") == ""
