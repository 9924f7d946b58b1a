"""Builds and runs the fuzz target of the C core's reader and writer: python tests/fuzz/run.py --seconds 600

Prints inputs, edges and the lines of each core file that ran; exits 1 on a crash, whose input is kept beside
the corpus. Needs clang, libclang-rt-*-dev and llvm. Depends on the standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CORE = ROOT / "idc" / "core"
#: What the target exercises; loops.c only measures and is no boundary.
JUDGED = ("inner.h", "ring.c", "wait.c")


class FuzzError(Exception):
    """The target could not be built or run, or it found something."""


@dataclass(frozen=True)
class Found:
    """What a run did.

    Attributes:
        runs: inputs executed.
        edges: code edges covered, of the target and the core together.
        lines: for each judged file, its percentage of lines covered.
        uncovered: for each judged file, the lines that no input reached.
    """

    runs: int
    edges: int
    lines: dict[str, float]
    uncovered: dict[str, list[int]]


def tool(name: str) -> str:
    """The newest of an LLVM tool, versioned (clang-14) or not.

    Raises:
        FuzzError: there is none; says which packages to install.
    """
    if found := shutil.which(name):
        return found
    for version in range(30, 12, -1):
        if found := shutil.which(f"{name}-{version}"):
            return found
    raise FuzzError(f"{name} not found: apt-get install clang libclang-rt-14-dev llvm (or another version)")


def call(command: list[str], env: dict[str, str] | None = None) -> str:
    """Run a command and return both of its streams.

    Raises:
        FuzzError: it failed; with the command and the end of what it said.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise FuzzError(f"exit {done.returncode} of {' '.join(command)}\n{output[-4000:]}")
    return output


def build(target: Path) -> Path:
    """Compile the target with the core, AddressSanitizer, UBSan and coverage."""
    call([
        tool("clang"), "-std=c11", "-g", "-O1", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror",
        "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all",
        "-fprofile-instr-generate", "-fcoverage-mapping", "-pthread", f"-I{CORE}",
        *map(str, sorted(CORE.glob("*.c"))), str(HERE / "fuzz_reader.c"), "-o", str(target),
    ])  # fmt: skip
    return target


def coverage(program: Path, profile: Path) -> tuple[dict[str, float], dict[str, list[int]]]:
    """Percentage of lines of each judged file that ran, and the lines that did not."""
    merged = profile.with_suffix(".profdata")
    call([tool("llvm-profdata"), "merge", "-sparse", str(profile), "-o", str(merged)])
    sources = [str(CORE / name) for name in JUDGED]
    exported = call([tool("llvm-cov"), "export", str(program), f"-instr-profile={merged}", *sources])
    lines = {
        Path(entry["filename"]).name: float(entry["summary"]["lines"]["percent"])
        for entry in json.loads(exported)["data"][0]["files"]
    }
    shown = call([tool("llvm-cov"), "show", str(program), f"-instr-profile={merged}", *sources])
    uncovered: dict[str, list[int]] = {name: [] for name in lines}
    name = next(iter(lines), "")
    for text in shown.splitlines():
        if heading := re.match(r"(/.*):$", text):
            name = Path(heading[1]).name
        elif missed := re.match(r"\s*(\d+)\|\s*0\|", text):
            uncovered.setdefault(name, []).append(int(missed[1]))
    return lines, uncovered


def fuzz(seconds: int, corpus: Path) -> Found:
    """Build and run for so many seconds; `corpus` keeps what was learnt.

    Raises:
        FuzzError: a crash, with the end of its report and where the input is.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="idc-fuzz-") as scratch:
        program, profile = build(Path(scratch) / "fuzz_reader"), Path(scratch) / "run.profraw"
        said = call(
            [str(program), f"-max_total_time={seconds}", "-max_len=256", "-print_final_stats=1",
             "-timeout=20", f"-artifact_prefix={corpus.parent}/", str(corpus)],
            env=os.environ | {"LLVM_PROFILE_FILE": str(profile)},
        )  # fmt: skip
        edges = re.findall(r"cov: (\d+)", said)
        runs = re.search(r"number_of_executed_units: (\d+)", said)
        if not edges or runs is None:
            raise FuzzError(f"libFuzzer printed no statistics:\n{said[-4000:]}")
        lines, uncovered = coverage(program, profile)
    return Found(int(runs[1]), int(edges[-1]), lines, uncovered)


def report(found: Found) -> None:
    """Print what a run covered."""
    sys.stdout.write(f"{found.runs} inputs, {found.edges} edges, no crash\n")
    for name, percent in found.lines.items():
        missed = ", ".join(map(str, found.uncovered[name])) or "none"
        sys.stdout.write(f"{name}: {percent:.1f} % of lines; not reached: {missed}\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=ROOT / "build" / "fuzz" / "corpus")
    args = parser.parse_args()
    try:
        found = fuzz(args.seconds, args.corpus)
    except FuzzError as error:
        sys.exit(str(error))
    report(found)


if __name__ == "__main__":
    main()
