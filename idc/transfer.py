"""Sends a file over a conduit, whole and verified, or not at all.

    sender                         receiver
    Offer(name, size, sha256)  ->
                               <-  Accept | Failed(reason)
    size bytes of bulk         =>
                               <-  Landed            all bytes are in the file; the clock of the transfer stops
                               <-  Working ...       still computing the checksum of what it has on disk
                               <-  Done(sha256) | Failed(reason)

The receiver writes into a nameless file and gives it its name only when the checksum of what it reads back agrees: a
killed receiver leaves nothing, a full disk leaves nothing, and the final name never holds half a file. (Where the file
system cannot make nameless files, as overlayfs before Linux 6.3, the file is called `.idc-transfer-*` until then, and
stays if the receiver is killed with -9.)
The conduit decides how bytes move (`idc.conduit`); this module knows no transport.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from idc.errors import IdcError, TimedOutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    #: phase ("checksum", "transfer", "verify"), bytes done, bytes in all
    Progress = Callable[[str, int, int], None]
    Note = dict[str, Any]

#: Longest name of a file, bytes.
NAME_MAX = 255
#: Bytes hashed between two progress reports.
HASH_STEP = 4 << 20
#: Seconds without any sign of the other side after which a transfer ends with an error.
STALL = 30.0


class TransferError(IdcError):
    """The transfer did not take place; no file stands under the final name. The text says why."""


class Conduit(Protocol):
    """Moves notes (small JSON objects) both ways and one file's bytes one way.

    Every call raises `IdcError` when the other side is gone and `idc.errors.TimedOutError` after `timeout` seconds
    (for bulk: seconds without progress).
    """

    def send_note(self, note: Note, timeout: float) -> None:
        """Send one note."""

    def receive_note(self, timeout: float) -> Note:
        """Wait for the next note."""

    def send_bulk(self, fd: int, size: int, progress: Callable[[int], None], timeout: float) -> None:
        """Send `size` bytes from the start of an open file; `progress` gets the bytes sent so far."""

    def receive_bulk(self, fd: int, size: int, progress: Callable[[int], None], timeout: float) -> None:
        """Write the next `size` bytes of the stream to an open file; `progress` gets the bytes written so far."""

    def refuse_bulk(self) -> None:
        """Stop a sender that is in the middle of its bulk: a note that says why is on its way."""


@dataclass(frozen=True)
class Outcome:
    """A finished transfer.

    Attributes:
        name: file name, without directories.
        size: bytes.
        sha256: of the file at both ends, in hex.
        seconds: from the receiver's acceptance to the last byte in its file; on the sender's clock. Checksums are
            computed before and after. None at the receiver, which does not know when the sender started.
    """

    name: str
    size: int
    sha256: str
    seconds: float | None


def _quiet(phase: str, done: int, size: int) -> None:
    """Report to nobody."""


def send(conduit: Conduit, source: Path, progress: Progress = _quiet, *, stall: float = STALL,
         size: int | None = None) -> Outcome:
    """Send one regular file, or the beginning of a block device. Of a file that grows: what it had at the start.

    Args:
        conduit: connected to the receiver.
        source: what to send.
        progress: told of each phase.
        stall: seconds without progress after which the transfer fails.
        size: bytes to send; by default all of a regular file. A block device needs it: it is whole sectors.

    Raises:
        TransferError: the file cannot be read or changed underway, or the receiver refused or failed.
        IdcError: the other side is gone.
    """
    try:
        return _send(conduit, source, progress, stall, size)
    except IdcError:  # some of these are OSErrors too
        raise
    except OSError as error:
        raise TransferError(f"cannot read {source}: {error.strerror or error}") from error


def _send(conduit: Conduit, source: Path, progress: Progress, stall: float, size: int | None) -> Outcome:
    with _opened(source, sized=size is not None) as (fd, length):
        size = length if size is None else size
        digest = _digest(fd, size, "checksum", progress)
        conduit.send_note({"note": "offer", "name": source.name, "size": size, "sha256": digest}, stall)
        _expect(conduit.receive_note(stall), "accept")
        started = time.monotonic()
        try:
            conduit.send_bulk(fd, size, lambda done: progress("transfer", done, size), stall)
        except TransferError:
            raise  # our own file's fault
        except IdcError as error:
            raise _reason_for(conduit, error) from error
        _expect(conduit.receive_note(stall), "landed")
        seconds = time.monotonic() - started
        verified, done = 0, conduit.receive_note(stall)
        while done.get("note") == "working":
            # it must get somewhere, or a receiver could keep us for ever
            verified = _advanced(done.get("done"), verified, size)
            progress("verify", verified, size)
            done = conduit.receive_note(stall)
        _expect(done, "done")
        if done.get("sha256") != digest:
            raise TransferError(f"the receiver stored {done.get('sha256')!r} for {source}, which has {digest}")
        return Outcome(source.name, size, digest, seconds)


def receive(conduit: Conduit, target: Path, progress: Progress = _quiet, *, stall: float = STALL,
            wait: float = STALL) -> Outcome:
    """Receive one file as `target`, or under its own name if `target` is a directory.

    Args:
        conduit: connected to the sender.
        target: replaced if it is a file already (or a symbolic link, which is not followed); anything else that stands
            under the name is left alone.
        progress: told of each phase.
        stall: seconds without progress after which the transfer fails.
        wait: seconds to wait for the offer (the sender computes a checksum first).

    Raises:
        TransferError: no room, a write failed, the checksum differs, or the sender failed.
        IdcError: the other side is gone, or silent.
    """
    offer = conduit.receive_note(wait)
    _expect(offer, "offer")
    final, streaming = target, False

    def refuse(reason: str) -> None:
        with suppress(IdcError):  # the sender may be gone too: the first error is the one to report
            conduit.send_note({"note": "failed", "reason": reason}, stall)
            if streaming:
                conduit.refuse_bulk()

    try:
        name, size, digest = _checked_offer(offer)
        final = target / name if target.is_dir() else target
        _check_room(final.parent, size)
        _check_target(final)
        with _nameless(final) as (fd, publish):
            conduit.send_note({"note": "accept"}, stall)
            streaming = True
            conduit.receive_bulk(fd, size, lambda done: progress("transfer", done, size), stall)
            streaming = False
            conduit.send_note({"note": "landed"}, stall)

            def still_working(phase: str, done: int, total: int) -> None:
                progress(phase, done, total)
                if done < total:
                    conduit.send_note({"note": "working", "done": done}, stall)

            found = _digest(fd, size, "verify", still_working)
            if found != digest:
                raise TransferError(f"{final}: what arrived has checksum {found}, the sender's file {digest} (did it "
                                    "change while it was sent?)")
            publish()
    except (TransferError, TimedOutError) as error:  # the latter before OSError, which it is as well
        refuse(str(error))
        raise
    except OSError as error:
        reason = _explain(final, error)
        refuse(reason)
        raise TransferError(reason) from error
    conduit.send_note({"note": "done", "sha256": found}, stall)
    return Outcome(name, size, found, None)


def _expect(note: Note, kind: str) -> None:
    if note.get("note") == "failed":
        reason = str(note.get("reason", "no reason given"))
        # for a terminal, and of a peer that may mean ill
        raise TransferError("the other side gave up: " + "".join(c if c.isprintable() else "?" for c in reason))
    if note.get("note") != kind:
        raise TransferError(f"the other side sent {note.get('note')!r} where {kind!r} was due")


def _checked_offer(offer: Note) -> tuple[str, int, str]:
    """Take nothing of an offer on trust: a name with a slash would leave the directory."""
    name, size, digest = offer.get("name"), offer.get("size"), offer.get("sha256")
    if not isinstance(name, str) or not 0 < _bytes_of(name) <= NAME_MAX or name in {".", ".."} or {"/", "\0"} & {*name}:
        raise TransferError(f"the sender offers a file with the unusable name {name!r}")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise TransferError(f"the sender offers a file of the unusable size {size!r}")
    if not isinstance(digest, str) or len(digest) != 64:
        raise TransferError("the sender's offer carries no SHA-256")
    return name, size, digest


def _bytes_of(name: str) -> int:
    """Length as a file name, 0 for what cannot be one (a lone surrogate that stands for no byte)."""
    try:
        return len(os.fsencode(name))
    except UnicodeEncodeError:
        return 0


def _advanced(done: object, before: int, size: int) -> int:
    if not isinstance(done, int) or not before < done <= size:
        raise TransferError(f"the receiver claims to have verified {done!r} of {size} bytes after {before}")
    return done


def _reason_for(conduit: Conduit, error: IdcError) -> IdcError:
    """Why the bulk was cut off: the receiver's own words if it left any, else the transport's."""
    try:
        note = conduit.receive_note(1.0)
        _expect(note, "landed")
    except TransferError as told:
        return told
    except IdcError:
        pass
    return error


def _digest(fd: int, size: int, phase: str, progress: Progress) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(min(HASH_STEP, max(size, 1))))
    done = 0
    told = time.monotonic()
    while done < size:
        count = os.preadv(fd, [buffer[:min(len(buffer), size - done)]], done)
        if count == 0:
            raise TransferError(f"the file shrank to {done} bytes while it was read, {size} were expected")
        digest.update(buffer[:count])
        done += count
        if time.monotonic() - told > 0.5:
            told = time.monotonic()
            progress(phase, done, size)
    progress(phase, size, size)
    return digest.hexdigest()


def _check_target(final: Path) -> None:
    """Refuse what a rename would put an end to (a device, a pipe) or fail at (a directory), before the first byte."""
    with suppress(FileNotFoundError):
        mode = os.lstat(final).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise TransferError(f"{final} exists and is no regular file; it was left alone")


def _check_room(directory: Path, size: int) -> None:
    """Refuse at once what can never fit, instead of after the last free block."""
    if not directory.is_dir():
        raise TransferError(f"{directory} is no directory of the receiver")
    room = os.statvfs(directory)
    if room.f_flag & os.ST_RDONLY:
        raise TransferError(f"{directory} is on a read-only file system")
    free = room.f_bavail * room.f_frsize
    if size > free:
        raise TransferError(f"no space left in {directory}: {size} bytes needed, {free} free")


def _explain(final: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"no space left in {final.parent} for {final.name}"
    return f"cannot write {final}: {error.strerror or error}"


@contextmanager
def _opened(source: Path, *, sized: bool) -> Iterator[tuple[int, int]]:
    """Descriptor and length in bytes."""
    try:
        # non-blocking: opening a pipe would wait for a writer
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TransferError(f"cannot read {source}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not (stat.S_ISREG(status.st_mode) or (sized and stat.S_ISBLK(status.st_mode))):
            raise TransferError(f"{source} is not a regular file")
        if not sized and status.st_size == 0 and os.pread(fd, 1, 0):
            raise TransferError(f"{source} has content but no size, as files in /proc: copy it to a real file first")
        yield fd, status.st_size
    finally:
        os.close(fd)


@contextmanager
def _nameless(final: Path) -> Iterator[tuple[int, Callable[[], None]]]:
    """An open file without a name beside `final`, and the call that gives it that name in one step."""
    directory = os.open(final.parent, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    temporary = f".idc-transfer-{secrets.token_hex(8)}"
    nameless, fd = True, -1

    def publish() -> None:
        # linkat cannot replace an existing file, rename can: so link beside it, then rename over it. A directory's
        # descriptor makes Python use linkat, which alone follows the link in /proc.
        if nameless:
            os.link(f"/proc/self/fd/{fd}", temporary, dst_dir_fd=directory, follow_symlinks=True)
        os.replace(temporary, final.name, src_dir_fd=directory, dst_dir_fd=directory)

    try:
        try:
            fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o644, dir_fd=directory)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            nameless = False
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644, dir_fd=directory)
        yield fd, publish
    finally:
        if fd >= 0:
            os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        os.close(directory)
