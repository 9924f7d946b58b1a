"""Who has the only processor: policies of a thread, as the kernel tells them."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from typing import TYPE_CHECKING, Any

from idc._core import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable

CAP_SYS_NICE = 23
CAPABILITY_VERSION = 0x20080522


def in_thread(body: Callable[[Any], None], processors: int = 1) -> Any:
    """Run it in a thread of its own, which has a pump; its policy ends with it."""
    pump, failed = ffi.new("struct idc_pump *", {"stop_fd": -1, "processors": processors}), []

    def run() -> None:
        try:
            body(pump)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return pump


def policy() -> int:
    return os.sched_getscheduler(0)


def drop_nice() -> None:
    """This thread may not take a real-time policy any more."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("=Ii", CAPABILITY_VERSION, 0), ctypes.create_string_buffer(24)
    assert libc.capget(header, data) == 0
    words = list(struct.unpack("=6I", data.raw))
    words[0] &= ~(1 << CAP_SYS_NICE)
    assert libc.capset(header, struct.pack("=6I", *words)) == 0


def may_be_fifo() -> bool:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True


def test_a_thread_that_gathers_interrupts_nobody_until_it_is_told_to() -> None:
    def body(pump: Any) -> None:
        lib.idc_pump_gather(pump, 1)
        assert policy() == os.SCHED_BATCH
        lib.idc_pump_gather(pump, 1)
        assert policy() == os.SCHED_BATCH
        lib.idc_pump_gather(pump, 0)
        assert policy() == os.SCHED_OTHER

    in_thread(body)


def test_the_processor_is_held_and_let_go_where_that_is_allowed() -> None:
    def body(pump: Any) -> None:
        allowed = may_be_fifo()
        for gathers, after in ((0, os.SCHED_OTHER), (1, os.SCHED_BATCH)):
            lib.idc_pump_gather(pump, gathers)
            lib.idc_pump_hold(pump)
            assert policy() == (os.SCHED_FIFO if allowed else after)
            lib.idc_pump_let_go(pump)
            assert policy() == after
        assert (pump.count_of.holds, pump.count_of.unheld) == ((2, 0) if allowed else (0, 2))

    in_thread(body)


def test_without_the_right_to_it_goes_on_and_counts() -> None:
    def body(pump: Any) -> None:
        drop_nice()
        for _ in range(3):
            lib.idc_pump_hold(pump)
            assert policy() == os.SCHED_OTHER
            lib.idc_pump_let_go(pump)
        lib.idc_pump_gather(pump, 1)
        assert policy() == os.SCHED_BATCH
        lib.idc_pump_hold(pump)
        lib.idc_pump_let_go(pump)
        assert policy() == os.SCHED_BATCH
        lib.idc_pump_gather(pump, 0)
        assert policy() == os.SCHED_OTHER

    pump = in_thread(body)
    assert (pump.count_of.holds, pump.count_of.unheld) == (0, 4)


def test_with_more_than_one_processor_nothing_is_done() -> None:
    def body(pump: Any) -> None:
        lib.idc_pump_gather(pump, 1)
        lib.idc_pump_hold(pump)
        assert policy() == os.SCHED_OTHER
        lib.idc_pump_let_go(pump)

    pump = in_thread(body, processors=2)
    assert (pump.count_of.holds, pump.count_of.unheld) == (0, 0)


def test_a_thread_with_a_policy_of_somebody_elses_keeps_it() -> None:
    def body(pump: Any) -> None:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        lib.idc_pump_gather(pump, 1)
        lib.idc_pump_gather(pump, 0)
        lib.idc_pump_hold(pump)
        lib.idc_pump_let_go(pump)
        assert policy() == os.SCHED_BATCH

    assert in_thread(body, processors=0).processors == -1
