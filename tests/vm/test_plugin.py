"""The pytest plugin as a stranger's project uses it: a pytest of its own, run on a test file of its own."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"

PASSING = README.read_text().partition("<!-- ten-line test -->\n```python\n")[2].partition("```")[0]

FAILING = """
def test_fails(vm):
    vm.succeed("echo from-the-guest > /dev/console")
    vm.wait_for_console_text("from-the-guest")
    assert False, "on purpose"
"""


def run_pytest(directory: Path, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_it.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XDG_RUNTIME_DIR": str(directory)}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Not tmp_path: sockets live in it, and their paths must be short."""
    path = Path(tempfile.mkdtemp(prefix="idc-"))
    yield path
    shutil.rmtree(path)


def test_the_test_of_the_readme(directory: Path) -> None:
    assert 5 < len(PASSING.strip().splitlines()) <= 12
    done = run_pytest(directory, PASSING)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_first_test_of_the_page(directory: Path) -> None:
    page = (README.parent / "docs/writing-tests.md").read_text()
    example = page.partition("<!-- runs as a test -->\n```python\n")[2].partition("```")[0]
    assert "vm_pair" in example
    done = run_pytest(directory, example)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_a_failing_test_shows_the_console_and_keeps_the_logs(directory: Path) -> None:
    done = run_pytest(directory, FAILING)
    assert done.returncode == 1
    assert "from-the-guest" in done.stdout.partition("console of VM vm")[2]
    kept = done.stdout.partition("logs are kept in ")[2].split()[0]
    assert (Path(kept) / "vm.console.log").read_text().count("from-the-guest") == 1
    packed = Path(done.stdout.partition("to pass on: ")[2].split()[0])
    with tarfile.open(packed) as archive:
        assert any(name.endswith("vm.console.log") for name in archive.getnames())


def test_workers_side_by_side_do_not_meet(directory: Path) -> None:
    tests = "\n".join(f"def test_{n}(vm):\n    assert vm.succeed('hostname') == 'vm\\n'\n" for n in range(4))
    done = run_pytest(directory, tests, "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


@pytest.mark.parametrize("marker", ["needs_kvm", "testbed(memory_mib=300)"])
def test_markers_are_known(directory: Path, marker: str) -> None:
    text = f"import pytest\n\n@pytest.mark.{marker}\ndef test_it(vm):\n    assert int(vm.succeed('nproc')) == 1\n"
    done = run_pytest(directory, text, "--strict-markers", "-rs")
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout or "needs KVM: " in done.stdout
