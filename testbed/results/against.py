"""This tree against another commit of it: both versions measured in turn, take by take.

The other version is checked out into a clone of its own, which shares the objects of this one and is gone afterwards
(a worktree would leave its entry in the repository of whoever kills this); its C core is built there, and it has a
virtual environment of its own, whose other packages are those of this one: only our code differs. Each turn of a
version is one whole run of its own `testbed bench`, so that each has its own processes, memory and luck, and a commit
is measured by the benchmark it brings. Both runs of a turn are there at the same time and take turns within it
(`testbed.bench.baton`), so that what the machine does meanwhile hits both alike. A base from before they could do that
runs whole, before or after this.

Depends on git, `testbed.run` and `testbed.bench`.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import select
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from testbed import keeper
from testbed.bench.baton import FIRST, SECOND
from testbed.bench.errors import BenchFailed
from testbed.bench.facts import ROOT
from testbed.bench.groups import Found
from testbed.bench.histogram import Histogram
from testbed.bench.store import Store
from testbed.errors import SpecError
from testbed.results.compare import conditions, key
from testbed.run import Run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from testbed.bench.rows import Result, Row
    from testbed.bench.setting import Setting
    from testbed.progress import Steps

TURNS: Final = 12
QUICK_TURNS: Final = 8
#: What makes figures of two commits be of two methods.
_METHOD = ("testbed/bench", "idc/measure", "guest/measure.py")
_STORE = "bench.sqlite"
#: Who has this can take turns within a run.
_BATON = "testbed/bench/baton.py"
#: Seconds that a turn has to end its VMs when the whole is interrupted.
END_SECONDS: Final = 20.0
#: How often what a turn says of its progress is passed on, in ms.
LOOK_MS: Final = 500

Name = Literal["base", "this"]


@dataclass(frozen=True)
class Version:
    """One of the two.

    Attributes:
        name: "base": the other commit; "this": the tree as it is, changes and all.
        python: interpreter that imports this version.
        root: its tree.
        data: where its runs are kept.
    """

    name: Name
    python: Path
    root: Path
    data: Path


@dataclass(frozen=True)
class Measured:
    """A version's turns as one run: a round of a row is one turn."""

    result: Result
    found: tuple[Found, ...]


def resolve(commit: str) -> str:
    """Full name of a commit of this tree. Raises SpecError: this is no clone, or has no such commit."""
    inside = _git("rev-parse", "--show-toplevel")
    if inside.returncode != 0 or Path(inside.stdout.strip()) != ROOT:
        raise SpecError(f"--against needs a clone with its history, {ROOT} is none",
                        hint="git clone the project, run make there, and use its .venv/bin/testbed")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{commit}^{{commit}}")
    if found.returncode != 0:
        raise SpecError(f"--against {commit}: no commit of {ROOT}", hint="`git log --oneline` shows them")
    return found.stdout.strip()


def check_core() -> None:
    """Raises SpecError if the C core of this tree was not built from its sources as they are."""
    built = ROOT / "idc" / "_core.abi3.so"
    sources = (ROOT / "idc").glob("*/*.[ch]")
    if not built.exists() or built.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        raise SpecError("the C core of this tree is older than its sources", hint=f"{sys.executable} idc/core/build.py")


def measure(setting: Setting, commit: str, turns: int) -> tuple[Measured, Measured]:
    """Base and this, `turns` of each. `commit` is a full name.

    Raises:
        SpecError: conditions changed between turns.
        BenchFailed: the base could not be built, or a run of either failed; says which, and what it said last.
    """
    session = secrets.token_hex(4)
    with Run(keep="never") as run:
        with setting.steps.wait(f"base: check out and build {commit[:10]}"):
            base = _base(run, commit)
        this = Version("this", Path(sys.executable), ROOT, _made(run.directory / "this"))
        together = (base.root / _BATON).exists()
        began = time.monotonic()
        for number in range(turns):
            order = (base, this) if number % 2 == 0 else (this, base)
            with setting.steps.wait(f"turn {number + 1} of {turns}: {order[0].name} and {order[1].name}"
                                    f"{_left(time.monotonic() - began, number, turns)}"):
                if together:
                    _together(run, order, setting)
                else:
                    for version in order:
                        _ended([_started(run, version, _bench(version, setting))], setting.steps)
        first, second = (_joined(version, session, together=together) for version in (base, this))
    notes = _notes(commit)
    if not together:
        notes += ("the base cannot take turns within a run yet: whole runs were alternated, which leaves more noise",)
    return _noted(first, notes), _noted(second, notes)


def _left(seconds: float, done: int, turns: int) -> str:
    """How long it will go on, for who waits; nothing before the first turn has told."""
    if not done:
        return ""
    left = seconds / done * (turns - done)
    return f", {left / 60:.0f} minutes to go" if left > 90 else f", {left:.0f} seconds to go"


def _noted(measured: Measured, notes: tuple[str, ...]) -> Measured:
    return dataclasses.replace(measured, result=dataclasses.replace(measured.result, notes=notes))


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _base(run: Run, commit: str) -> Version:
    """Check out, make the environment, build the core."""
    root = run.directory / "base-tree"
    _must(run, ["git", "clone", "--quiet", "--shared", "--no-checkout", str(ROOT), str(root)])
    _must(run, ["git", "-C", str(root), "checkout", "--quiet", "--detach", commit])
    home = run.directory / "base-venv"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(home)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)})
    others = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    # Lines of a .pth file are directories, in this order: this version's own packages come before any other.
    Path(paths["purelib"], "base.pth").write_text("".join(f"{line}\n" for line in dict.fromkeys([str(root), *others])))
    python = home / "bin" / "python"
    _must(run, [str(python), "idc/core/build.py"], cwd=root)
    return Version("base", python, root, _made(run.directory / "base"))


@dataclass(frozen=True)
class _Started:
    """A command under way.

    Attributes:
        what: for whom.
        process: it.
        words: of its command line, for a message.
        log: what it says goes there.
    """

    what: str
    process: subprocess.Popen[bytes]
    words: str
    log: Path


def _bench(version: Version, setting: Setting, *more: str) -> list[str]:
    """One whole run, kept in the version's own database."""
    argv = [str(version.python), "-m", "testbed.cli", "bench", "--quick", *more,
            "--domains", ",".join(sorted(setting.domains)), "--accel", setting.accel, "--qemu", setting.qemu,
            *setting.names]  # fmt: skip
    # Not marked as this run's: it has a run and a keeper of its own, which by that mark would be ended before they
    # could end their VMs. Instead the kernel asks it to end when this process dies.
    alone = ["setpriv", "--pdeathsig", "TERM", "env", "-u", "PYTHONPATH", "-u", keeper.ENV_NAME]
    return [*alone, f"IDC_TESTBED_DATA={version.data}", *argv]


def _together(run: Run, order: Sequence[Version], setting: Setting) -> None:
    """One turn of both, which share a baton; the first of `order` has it first."""
    links = socket.socketpair()
    started: list[_Started] = []
    try:
        for version, link, place in zip(order, links, (FIRST, SECOND), strict=True):
            argv = _bench(version, setting, "--in-turn", f"{link.fileno()},{place}")
            started.append(_started(run, version, argv, link.fileno()))
    except BaseException:
        _end(started)
        raise
    finally:
        for link in links:
            link.close()  # so that the end of one is seen by the other
    _ended(started, setting.steps)


def _started(run: Run, version: Version, argv: Sequence[str], *fds: int) -> _Started:
    what = f"{version.name} ({version.root.name if version.name == 'base' else 'this tree'})"
    return _start(run, argv, what, f"turn-{version.name}.err", cwd=version.root, fds=fds)


def _start(run: Run, argv: Sequence[str], what: str, log: str, *, cwd: Path | None = None,
           fds: Sequence[int] = ()) -> _Started:
    path = run.directory / log
    with path.open("w") as file:
        process = run.popen(argv, stdout=subprocess.DEVNULL, stderr=file.fileno(), cwd=cwd, pass_fds=fds)
    return _Started(what, process, " ".join(argv[-4:]), path)


def _must(run: Run, argv: Sequence[str], *, cwd: Path | None = None) -> None:
    """Run what makes the base to its end. Raises BenchFailed with the last line that it said."""
    _ended([_start(run, argv, "base", "base.err", cwd=cwd)])


def _ended(started: Sequence[_Started], steps: Steps | None = None) -> None:
    """Wait until all have ended well, and pass on to `steps` what the first of them says of its progress. Raises
    BenchFailed for the first that has not, with the last line that it said, and ends the others.
    """
    left = {os.pidfd_open(each.process.pid): each for each in started}
    told = 0
    try:
        poller = select.poll()
        for fd in left:
            poller.register(fd, select.POLLIN)
        while left:
            for fd, _ in poller.poll(LOOK_MS):
                poller.unregister(fd)
                os.close(fd)
                each = left.pop(fd)
                if code := each.process.wait():
                    lines = each.log.read_text(errors="replace").strip().splitlines()
                    raise BenchFailed(f"{each.what}: `{each.words}` ended with {code}: "
                                      f"{lines[-1] if lines else 'no word'}")
            if steps is not None:
                *whole, _ = started[0].log.read_text(errors="replace").split("\n")
                for line in whole[told:]:
                    steps.say(f"  {line}")
                told = len(whole)
    except BaseException:
        _end(list(left.values()))
        raise
    finally:
        for fd in left:
            os.close(fd)


def _end(started: Sequence[_Started]) -> None:
    """Ask them before the run's end does it by force: they have VMs of their own to end."""
    for each in started:
        each.process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for each in started:
        try:
            each.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.process.kill()  # its keeper ends the rest
            each.process.wait()


def _joined(version: Version, session: str, *, together: bool) -> Measured:
    """All turns of a version as one run. Raises SpecError if they were not measured under the same conditions."""
    with Store(version.data / _STORE, make=False) as store:
        numbers = store.runs()
        results = [store.result(number) for number in numbers]
        first = results[0]
        for number, result in enumerate(results[1:], start=2):
            if differ := conditions(first, result):
                raise SpecError(f"{version.name}: turns 1 and {number} differ in {'; '.join(differ)}")
        found, absent = [], list(dict.fromkeys(what for result in results for what in result.absent))
        wheres = [{key(row): at for at, row in enumerate(result.results)} for result in results]
        for row in first.results:
            places = [where.get(key(row)) for where in wheres]
            if None in places:
                absent.append(f"{row.name} {row.path} {row.domains}: not in every turn")
                continue
            rows = [result.results[at] for result, at in zip(results, places, strict=True) if at is not None]
            histogram = Histogram()
            for number, at in zip(numbers, places, strict=True):
                if at is not None and (own := store.histogram(number, at)) is not None:
                    histogram.add(own)
            found.append(_row(rows, histogram, together=together))
    result = dataclasses.replace(first, results=tuple(each.row for each in found), absent=tuple(absent), quick=True,
                                 seconds=round(sum(each.seconds for each in results), 1), session=session,
                                 version=version.name)  # fmt: skip
    return Measured(result, tuple(found))


def _row(rows: list[Row], histogram: Histogram, *, together: bool) -> Found:
    """One row of many turns: its rounds are the turns, its takes the rounds of each."""
    last = rows[-1]
    costs = [row.cpu_s for row in rows if row.cpu_s is not None]
    row = dataclasses.replace(last, rounds=tuple(row.figure for row in rows),
                              takes=tuple(row.rounds for row in rows) if together else (),
                              warmup=sum(row.warmup for row in rows), late=sum(row.late for row in rows),
                              variants={}, cpu={}, cpu_s=statistics.fmean(costs) if costs else None)  # fmt: skip
    if last.p50 is None or not histogram.count:
        middle = statistics.median(row.rounds)
        if last.p50 is not None:  # samples by the hundred at most, kept as rounds and no histogram
            return Found(dataclasses.replace(row, p50=middle), None)
        return Found(dataclasses.replace(row, value=middle, samples=len(rows)), None)
    at = histogram.percentiles()
    return Found(dataclasses.replace(row, samples=histogram.count, p50=at.p50, p90=at.p90, p99=at.p99, p999=at.p999,
                                     max=max(row.max or 0.0 for row in rows)), histogram)  # fmt: skip


def _notes(commit: str) -> tuple[str, ...]:
    """What of the method of measuring differs between the two."""
    changed = _git("diff", "--name-only", commit, "--", *_METHOD).stdout.split()
    if not changed:
        return ()
    return (f"the two measure by different code: {len(changed)} files of {', '.join(_METHOD)} differ",)


def _git(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SpecError("--against needs git, which is not installed", hint="apt-get install git") from None
