"""One end of a measurement: reads commands, runs loops over its region, answers. The same in a VM and on the host.

A command is one JSON line on standard input, {"do": NAME, ...}; its answer one on standard output, {"ok": {...}} or
{"error": "one line"}. The other end gets the matching command at the same time. A worker lives as long as a whole run:
to start Python in an emulated guest takes seconds. What it measured in samples stays here until "samples" fetches it,
so that the processor time around a loop is the loop's. Depends on `idc`; whoever starts it opens the region.
"""

from __future__ import annotations

import base64
import json
import os
import platform
import struct
import zlib
from array import array
from typing import IO, TYPE_CHECKING, Any

from idc._core import ffi, lib
from idc.channel import ByteChannel, MessageChannel
from idc.errors import IdcError
from idc.layout import Kind
from idc.measure import plain
from idc.measure.calls import CallCommands
from idc.measure.sockets import Connection
from idc.measure.timing import SPIN, processor_seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from idc.measure.timing import Answer
    from idc.region import Region

#: The channel whose memory and vectors the bare loops use; it is never attached.
BARE = "bare"
#: Bytes between the two words of bare loops, as in the rings: processors fetch cache lines in pairs.
APART = 128
#: A pipeline's words: a pair that starts both ends at once, then the two indexes. They lie where the bare channel would
#: have its other ring, one set for each pipeline of a command, so that one clearing serves all.
INDEXES, SET = 2 * APART, 4 * APART
SETS = 64
#: Readings of the clock that its cost is the mean of.
CLOCK_READINGS = 10_000


class Worker(CallCommands):
    """Runs commands over `region`; `limit` seconds bound each loop.

    A command's keys are the arguments of the method `do_NAME`. Loops take `role`: "near" pings, sends and keeps the
    time, "far" answers.
    """

    def __init__(self, region: Region, *, limit: float = 30.0) -> None:
        super().__init__(region, limit)
        self._messages: dict[str, MessageChannel] = {}
        self._bytes: dict[str, ByteChannel] = {}
        self._sockets: dict[str, Connection] = {}
        self._bare = region.header.channel(BARE)
        self._memory = ffi.from_buffer("uint8_t[]", region.memory, require_writable=True)
        self._words_at = self._memory + self._bare.data_ba
        peer = self._bare.member_b if region.member == self._bare.member_a else self._bare.member_a
        self._bell = region.bell(peer, self._bare.data_vector)
        self._wake = region.events[self._bare.data_vector]

    def close(self) -> None:
        """Let go of endpoints, channels, sockets and the region's memory."""
        self.close_calls()
        for messages in self._messages.values():
            messages.close()
        for stream in self._bytes.values():
            stream.close()
        for connection in self._sockets.values():
            connection.close()
        self._bell.close()
        ffi.release(self._memory)

    def answer(self, command: dict[str, Any]) -> Answer:
        """Run one command."""
        do: Callable[..., Answer] | None = getattr(self, f"do_{command.pop('do', '')}", None)
        if do is None:
            return {"error": "no such command"}
        try:
            return {"ok": do(**command)}
        except (IdcError, OSError, TypeError, KeyError) as error:
            return {"error": f"{type(error).__name__}: {error}"}

    # -- what is here

    def do_hello(self) -> Answer:
        """What a result must name: kernel, clock and its cost, copy routines."""
        lib.idc_loop_clock(CLOCK_READINGS)
        clock = lib.idc_loop_clock(CLOCK_READINGS) / CLOCK_READINGS
        source = _first_line("/sys/devices/system/clocksource/clocksource0/current_clocksource")
        routines = [ffi.string(lib.idc_copy_name(index)).decode() for index in range(lib.idc_copy_count())]
        chosen = [routines[lib.idc_copy_chosen(size_class)] for size_class in range(3)]
        return {"pid": os.getpid(), "kernel": platform.release(), "python": platform.python_version(),
                "clock": f"CLOCK_MONOTONIC by {source}", "clock_ns": round(clock, 1), "routines": routines,
                "chosen": chosen, "cpu": _cpu_model(), "mapping": mapping()}

    def do_samples(self) -> Answer:
        """The samples of the last loop, in ns: base64 of zlib of unsigned 64-bit little-endian words."""
        packed = zlib.compress(self._samples.tobytes(), 1)
        return {"count": len(self._samples), "data": base64.b64encode(packed).decode()}

    def do_attach(self, channel: str) -> Answer:
        """Open this worker's end of a channel; both ends must do so."""
        if self._region.header.channel(channel).kind is Kind.MESSAGE:
            self._messages[channel] = MessageChannel.attach(self._region, channel, timeout=self._limit)
        else:
            self._bytes[channel] = ByteChannel.attach(self._region, channel, timeout=self._limit)
        return {}

    # -- floors

    def do_clear(self) -> Answer:
        """Bare words to zero, own doorbell emptied. Near alone, before each bare loop."""
        ffi.memmove(self._words_at, bytes(SETS * SET), SETS * SET)
        return self.do_drain()

    def do_drain(self) -> Answer:
        """Empty the own doorbell."""
        lib.idc_bell_wait(self._wake, 0)
        return {}

    def do_line(self, role: str, count: int, per: int, warm: int, gap: bool = False) -> Answer:
        """Bare cache line, there and back; `gap`: with as much between two polls as a ring's receiver has."""
        mine, theirs = self._words(role, 0)
        if role == "far":
            return self._timed(lambda: lib.idc_loop_line_pong(mine, theirs, warm + count * per, gap, self._deadline()))
        # the count of turns goes on where the warm-up left it, so the warm-up is samples of the same call
        return self._ping(lambda view, n: lib.idc_loop_line_ping(mine, theirs, view, n, per, gap, self._deadline()),
                          count, -(-warm // per), in_one=True)

    def do_bell(self, role: str, count: int, per: int, warm: int) -> Answer:
        """Bare doorbell, there and back: ring, and sleep until rung."""
        bell, wake = self._bell._struct, self._wake
        if role == "far":
            return self._timed(lambda: lib.idc_loop_bell_pong(bell, wake, warm + count * per, self._deadline()))
        return self._ping(lambda view, n: lib.idc_loop_bell_ping(bell, wake, view, n, per, self._deadline()),
                          count, -(-warm // per))

    def do_pipe(self, role: str, tries: list[dict[str, int]]) -> Answer:
        """Bare copy pipelines, one after the other: slots copied in here and out there, two indexes, nothing else.

        Each of `tries` has chunk, slots, total (all bytes but slots) and routine; "each" has their times.
        """
        answers = [self._pipe(role, number * SET, one) for number, one in enumerate(tries)]
        each = [answer["ns"] for answer in answers]
        return {"ns": sum(each), "each": each, "cpu": sum(answer["cpu"] for answer in answers)}

    def _pipe(self, role: str, at: int, one: dict[str, int]) -> Answer:
        mine, theirs = self._words(role, at)
        words, data, deadline = self._words_at + at + INDEXES, self._memory + self._bare.data_ab, self._deadline()
        if role == "far":
            self._check(lib.idc_loop_line_pong(mine, theirs, 1, False, deadline))
            loop = lib.idc_loop_pipe_in
        else:
            met = ffi.new("uint64_t[1]")  # so both are there
            self._check(lib.idc_loop_line_ping(mine, theirs, met, 1, 1, False, deadline))
            loop = lib.idc_loop_pipe_out
        shape = (one["slots"], one["chunk"], one["total"], one["routine"])
        return self._timed(lambda: loop(words, data, *shape, deadline))

    def do_copy(self, tries: list[dict[str, int]]) -> Answer:
        """Local copies by this end alone, over `slots` chunks: a memory, not a channel. `tries` as in "pipe"."""
        began, each = processor_seconds(), []
        for one in tries:
            chunk, span, routine = one["chunk"], one["chunk"] * one["slots"], one["routine"]
            area = ffi.new("uint8_t[]", 2 * span)
            ffi.memmove(area, b"\1" * (2 * span), 2 * span)  # real pages
            each.append(self._check(lib.idc_loop_copy(routine, area, area + span, span, chunk, one["total"] // chunk)))
        return {"ns": sum(each), "each": each, "cpu": processor_seconds() - began}

    # -- rings

    def do_rtt(self, role: str, channel: str, api: str, mode: str, size: int, count: int, per: int,
               warm: int) -> Answer:  # fmt: skip
        """Messages of `size` bytes, there and back."""
        ends, spin = self._message_channel(channel, mode), _spin_ns(mode)
        tx, rx, rounds = ends.sender._ring, ends.receiver._ring, warm + count * per
        if role == "far":
            if api == "python":
                return self._timed(lambda: plain.echo(ends, rounds))
            return self._timed(lambda: lib.idc_loop_echo(rx, tx, rounds, spin, self._deadline()))
        before = ends.receiver.counters
        if api == "python":
            plain.ping(ends, size, warm, 1)
            answer = self._timed(lambda: self._keep(plain.ping(ends, size, count, per)))
        else:
            answer = self._ping(lambda view, n: lib.idc_loop_ping(tx, rx, size, view, n, per, spin, self._deadline()),
                                count, -(-warm // per))
        after = ends.receiver.counters
        return answer | {name: getattr(after, name) - getattr(before, name) for name in ("late", "sleeps")}

    def do_paced(self, channel: str, mode: str, size: int, count: int, interval: int, warm: int) -> Answer:
        """Near: messages due every `interval` ns, each timed from when it was due. Far: "rtt"."""
        ends, spin = self._message_channel(channel, mode), _spin_ns(mode)
        tx, rx = ends.sender._ring, ends.receiver._ring
        return self._ping(lambda view, n: lib.idc_loop_paced(tx, rx, size, view, n, interval, spin, self._deadline()),
                          count, warm)

    def do_rate(self, role: str, channel: str, api: str, mode: str, size: int, count: int, warm: int,
                batch: bool = False) -> Answer:  # fmt: skip
        """Messages one way, then one back when all are there; "ns" is near's time until that."""
        ends, spin = self._message_channel(channel, mode), _spin_ns(mode)

        def run(number: int) -> int:
            if api == "python" and role == "near":
                return (plain.send_batches if batch else plain.send_messages)(ends, size, number)
            if api == "python":
                (plain.receive_batches if batch else plain.receive_messages)(ends, number)
            elif role == "near":
                self._check(lib.idc_loop_send(ends.sender._ring, size, number, spin, self._deadline()))
                ends.receiver.recv(timeout=self._limit)
            else:
                self._check(lib.idc_loop_receive(ends.receiver._ring, number, spin, self._deadline()))
                ends.sender.send(b"!", timeout=self._limit)
            return 0

        run(warm)
        return self._timed(lambda: run(count))

    def do_stream(self, role: str, channel: str, api: str, mode: str, chunk: int, total: int, warm: int) -> Answer:
        """Bytes one way: copied in here, copied out there, every byte of them; "ns" until the last was read."""
        ends, spin = self._bytes[channel], _spin_ns(mode)
        ends.sender.spin = ends.receiver.spin = SPIN[mode]

        def run(number: int) -> None:
            if api == "python":
                (plain.stream_out if role == "near" else plain.stream_in)(ends, number, chunk)
            elif role == "near":
                self._check(lib.idc_loop_stream_out(ends.sender._ring, number, chunk, spin, self._deadline()))
                ends.receiver.read_exactly(1, timeout=self._limit)
            else:
                self._check(lib.idc_loop_stream_in(ends.receiver._ring, number, chunk, spin, self._deadline()))
                ends.sender.write(b"!", timeout=self._limit)

        run(warm)
        return self._timed(lambda: run(total))

    # -- sockets

    def do_listen(self, name: str, family: str, address: str) -> Answer:
        """Be there for the other end's "connect"."""
        self._sockets[name] = connection = Connection(family, address)
        connection.listen()
        return {}

    def do_accept(self, name: str) -> Answer:
        """Take the connection."""
        self._sockets[name].accept()
        return {}

    def do_connect(self, name: str, family: str, address: str) -> Answer:
        """Connect to the end that listens."""
        self._sockets[name] = connection = Connection(family, address)
        connection.connect()
        return {}

    def do_socket_rtt(self, role: str, name: str, api: str, size: int, count: int, per: int, warm: int,
                      polls: bool = False) -> Answer:  # fmt: skip
        """`size` bytes there and back over a socket."""
        ends, rounds = self._sockets[name], warm + count * per
        fd = ends.sock.fileno() if ends.sock else -1
        if role == "far":
            if api == "python":
                return self._timed(lambda: ends.echo(size, rounds, polls=polls))
            return self._timed(lambda: lib.idc_loop_fd_echo(fd, size, rounds, polls, self._deadline()))
        if api == "python":
            ends.ping(size, warm, 1, polls=polls)
            return self._timed(lambda: self._keep(ends.ping(size, count, per, polls=polls)))
        return self._ping(lambda view, n: lib.idc_loop_fd_ping(fd, size, view, n, per, polls, self._deadline()),
                          count, -(-warm // per))

    def do_socket_paced(self, name: str, size: int, count: int, interval: int, warm: int) -> Answer:
        """Near: `size` bytes due every `interval` ns over a socket, each timed from when it was due. Far:
        "socket_rtt"."""
        ends = self._sockets[name]
        fd = ends.sock.fileno() if ends.sock else -1
        return self._ping(lambda view, n: lib.idc_loop_fd_paced(fd, size, view, n, interval, self._deadline()),
                          count, warm)

    def do_framed_rtt(self, role: str, name: str, size: int, count: int, per: int, warm: int) -> Answer:
        """Messages with their length before them, of `size` bytes, there and back over a socket, in Python."""
        ends = self._sockets[name]
        if role == "far":
            return self._timed(lambda: ends.framed_echo(warm + count * per))
        ends.framed_ping(size, warm, 1)
        return self._timed(lambda: self._keep(ends.framed_ping(size, count, per)))

    def do_socket_stream(self, role: str, name: str, api: str, chunk: int, total: int, warm: int) -> Answer:
        """Bytes one way over a socket; "ns" until the last was received."""
        ends = self._sockets[name]
        fd = ends.sock.fileno() if ends.sock else -1

        def run(number: int) -> None:
            if api == "python":
                (ends.stream_out if role == "near" else ends.stream_in)(number, chunk)
            elif role == "near":
                self._check(lib.idc_loop_fd_out(fd, number, chunk, self._deadline()))
                ends.take_word()
            else:
                self._check(lib.idc_loop_fd_in(fd, number, chunk, self._deadline()))
                ends.give_word()

        run(warm)
        return self._timed(lambda: run(total))

    # -- common

    def _words(self, role: str, offset: int) -> tuple[Any, Any]:
        """Own and the other's bare word."""
        first = self._words_at + offset
        return (first, first + APART) if role == "near" else (first + APART, first)

    def _message_channel(self, name: str, mode: str) -> MessageChannel:
        channel = self._messages[name]
        channel.sender.spin = channel.receiver.spin = SPIN[mode]
        return channel


def serve(region: Region, commands: IO[str], answers: IO[str]) -> None:
    """Answer commands until their end."""
    worker = Worker(region)
    try:
        for line in commands:
            answers.write(json.dumps(worker.answer(json.loads(line))) + "\n")
            answers.flush()
    finally:
        worker.close()


def mapping() -> str:
    """How this process maps the region, by the kernel's own word: "vfio" in a VM, "memfd" on the host."""
    with open("/proc/self/maps") as maps:
        names = {fields[5].strip() for fields in (line.split(None, 5) for line in maps) if len(fields) > 5}
    if any("vfio" in name for name in names):
        return "VFIO, BAR 2"
    return "memfd" if any(name.startswith("/memfd:") for name in names) else "unknown"


def unpack_samples(answer: Answer) -> array[int]:
    """What "samples" answered, as numbers."""
    data = zlib.decompress(base64.b64decode(answer["data"]))
    return array("Q", struct.unpack(f"<{len(data) // 8}Q", data))


def _spin_ns(mode: str) -> int:
    return int(SPIN[mode] * 1e9)


def _first_line(path: str) -> str:
    with open(path) as file:
        return file.readline().strip()


def _cpu_model() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
