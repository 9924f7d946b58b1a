"""Rings of messages: whole, in order, at most once.

Depends on idc._core and idc.ringbase. Users import idc.ring.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from idc._core import ffi, lib
from idc.errors import MisuseError
from idc.ringbase import DEFAULT_SPIN, Deadline, Ring, gather

# Looked up once: these are on the path of each frame, and Python in an emulated guest is slow.
_post_one, _notify, _recv_batch, _unpack = lib.idc_msg_post_one, lib.idc_notify, lib.idc_msg_recv_batch, ffi.unpack
_send, _recv = lib.idc_msg_send, lib.idc_msg_recv
_AGAIN, _TIMEOUT, _INTR = lib.IDC_AGAIN, lib.IDC_TIMEOUT, lib.IDC_INTR

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from idc.bell import Bell
    from idc.words import Memory, Readable


class MessageSender(Ring):
    """The producer's end of a message ring.

    Args:
        memory: the mapping; writable.
        control: offset of the ring's 256-byte control block, multiple of 64.
        data: offset of the slots, multiple of 64.
        slots: how many, a power of two.
        slot_size: bytes, multiple of 64; a message holds 8 fewer.
        bell: wakes the consumer; None for one that only polls.
        wake_fd: eventfd that the consumer rings when there is room; None to poll only.
        spin: see `Ring.spin`.

    Raises:
        MisuseError: sizes or offsets that do not fit each other or the memory.
    """

    _kind = lib.IDC_MESSAGES
    _role = lib.IDC_PRODUCER

    def __init__(
        self,
        memory: Memory,
        control: int,
        data: int,
        slots: int,
        slot_size: int,
        *,
        bell: Bell | None = None,
        wake_fd: int | None = None,
        spin: float = DEFAULT_SPIN,
    ) -> None:
        super().__init__(memory, control, data, slots, slot_size, bell, wake_fd, spin)
        self.max_message = slot_size - 8

    def send(self, message: Readable, *, timeout: float | None = None) -> None:
        """Send one message.

        Raises:
            TooBigError: longer than `max_message`.
            TimedOutError: no room in time; BackPressuredError instead with timeout=0.
        """
        if self._closed:
            self._check_open()
        buffer = message if type(message) is bytes else ffi.from_buffer(message)
        if timeout is None:
            while (rc := _send(self._ring, buffer, len(buffer), self._spin_ns, -1)) == _INTR:
                pass
            if rc < 0:
                raise self._fail(rc)
            return
        waiting = Deadline(timeout)
        while (rc := _send(self._ring, buffer, len(buffer), self._spin_ns, waiting.ns)) < 0:
            if rc != _INTR:
                raise self._fail(rc)
            waiting.update()

    def send_parts(self, parts: Sequence[Readable], *, timeout: float | None = None) -> None:
        """Send one message gathered from several buffers. Raises as `send`."""
        self._check_open()
        vector, keep = gather(parts)
        waiting = Deadline(timeout)
        while True:
            rc = lib.idc_msg_sendv(self._ring, vector, len(keep), self._spin_ns, waiting.ns)
            if rc >= 0:
                return
            if rc != lib.IDC_INTR:
                raise self._fail(rc)
            waiting.update()

    def try_send(self, message: Readable) -> bool:
        """Send one message if there is room now; whether it went."""
        self._check_open()
        buffer = ffi.from_buffer(message)
        rc = lib.idc_msg_send(self._ring, buffer, len(buffer), 0, 0)
        if rc < 0 and rc != lib.IDC_AGAIN:
            raise self._fail(rc)
        return bool(rc >= 0)

    def post(self, message: Readable) -> bool:
        """Like `try_send`, but a sleeping peer is not woken before `flush` or the next send."""
        if self._closed:
            self._check_open()
        buffer = message if type(message) is bytes else ffi.from_buffer(message)
        rc = _post_one(self._ring, buffer, len(message))
        if rc >= 0:
            return True
        if rc != _AGAIN:
            raise self._fail(rc)
        return False

    def flush(self) -> None:
        """Announce what was posted: rings the peer if it sleeps."""
        if self._closed:
            self._check_open()
        if (rc := _notify(self._ring)):
            raise self._fail(rc)

    def send_batch(self, messages: Iterable[Readable], *, timeout: float | None = None) -> int:
        """Send as many of the messages, in order, as there is room for, with one doorbell at most.

        Waits for room for the first. Returns how many went. Raises as `send`.
        """
        self._check_open()
        listed = list(messages)
        if not listed:
            return 0
        joined = ffi.from_buffer(b"".join(listed))
        lens = ffi.new("uint32_t[]", [len(message) for message in listed])
        waiting = Deadline(timeout)
        while True:
            rc = lib.idc_msg_send_batch(self._ring, joined, lens, len(listed), self._spin_ns, waiting.ns)
            if rc > 0:
                return int(rc)
            if rc != lib.IDC_INTR:
                raise self._fail(rc)
            waiting.update()


class MessageReceiver(Ring):
    """The consumer's end of a message ring. Arguments and errors as `MessageSender`."""

    _kind = lib.IDC_MESSAGES
    _role = lib.IDC_CONSUMER

    def __init__(
        self,
        memory: Memory,
        control: int,
        data: int,
        slots: int,
        slot_size: int,
        *,
        bell: Bell | None = None,
        wake_fd: int | None = None,
        spin: float = DEFAULT_SPIN,
    ) -> None:
        super().__init__(memory, control, data, slots, slot_size, bell, wake_fd, spin)
        self.max_message = slot_size - 8
        self._one = ffi.new("char[]", slot_size)
        self._many = ffi.NULL
        self._lens = ffi.NULL
        self._batch = self._room = 0

    def recv(self, *, timeout: float | None = None) -> bytes:
        """Take the next message.

        Raises:
            TimedOutError: none came in time; BackPressuredError instead with timeout=0.
        """
        if self._closed:
            self._check_open()
        if timeout is None:
            while (rc := _recv(self._ring, self._one, self.max_message, self._spin_ns, -1)) == _INTR:
                pass
            if rc < 0:
                raise self._fail(rc)
            return _unpack(self._one, rc)  # type: ignore[no-any-return]
        waiting = Deadline(timeout)
        while (rc := _recv(self._ring, self._one, self.max_message, self._spin_ns, waiting.ns)) < 0:
            if rc != _INTR:
                raise self._fail(rc)
            waiting.update()
        return _unpack(self._one, rc)  # type: ignore[no-any-return]

    def try_recv(self) -> bytes | None:
        """Take the next message if one is there now."""
        if self._closed:
            self._check_open()
        rc = _recv(self._ring, self._one, self.max_message, 0, 0)
        if rc == _AGAIN:
            return None
        if rc < 0:
            raise self._fail(rc)
        return _unpack(self._one, rc)  # type: ignore[no-any-return]

    def arm(self) -> bool:
        """Ask to be rung at the next message, for who sleeps on the wake-up descriptor elsewhere (a selector).

        False if there is one already, or the connection is over: then do not sleep. May be repeated.
        """
        self._check_open()
        lib.idc_notify(self._ring)
        lib.idc_store64(self._ring.my_event, self._ring.pos + 1)
        lib.idc_fence()  # pairs with the sender's between its message and its look at the word: docs/protocol.md
        return bool(lib.idc_available(self._ring) == 0)

    def recv_into(self, buffer: Memory, *, timeout: float | None = None) -> int:
        """Take the next message into `buffer`; returns its length.

        Raises:
            TooBigError: it is longer than the buffer, and stays in the ring.
            TimedOutError: as `recv`.
        """
        self._check_open()
        into = ffi.from_buffer(buffer, require_writable=True)
        waiting = Deadline(timeout)
        while True:
            rc = lib.idc_msg_recv(self._ring, into, len(into), self._spin_ns, waiting.ns)
            if rc >= 0:
                return int(rc)
            if rc != lib.IDC_INTR:
                raise self._fail(rc)
            waiting.update()

    def _make_batch(self, most: int) -> None:
        if most < 1:
            raise MisuseError(f"recv_batch of {most} messages")
        self._room = most * self.max_message
        self._many = ffi.new("char[]", self._room)
        self._lens = ffi.new("uint32_t[]", most)
        self._batch = most

    def recv_batch(self, most: int, *, timeout: float | None = None) -> list[bytes]:
        """Wait for a message, then take it and all that are there, `most` at most. Raises as `recv`."""
        messages = self.take_batch(most, timeout)
        if not messages:
            raise self._fail(lib.IDC_AGAIN if timeout is not None and timeout <= 0 else lib.IDC_TIMEOUT)
        return messages

    def take_batch(self, most: int, timeout: float | None) -> list[bytes]:
        """As `recv_batch`, but returns nothing where nothing came in time."""
        if self._closed:
            self._check_open()
        if most > self._batch or most < 1:
            self._make_batch(most)
        ns = -1 if timeout is None else int(timeout * 1e9) if timeout > 0 else 0
        end = time.monotonic_ns() + ns if ns > 0 else 0
        while (rc := _recv_batch(self._ring, self._many, self._room, self._lens, most, self._spin_ns, ns)) <= 0:
            if rc in (_AGAIN, _TIMEOUT):
                return []
            if rc != _INTR:
                raise self._fail(rc)
            if ns > 0:
                ns = max(end - time.monotonic_ns(), 1)
        if rc == 1:
            return [_unpack(self._many, self._lens[0])]
        return self._taken(rc)

    def _taken(self, rc: int) -> list[bytes]:
        lens = _unpack(self._lens, rc)
        whole = _unpack(self._many, sum(lens))
        at, messages = 0, []
        for length in lens:
            messages.append(whole[at : at + length])
            at += length
        return messages
