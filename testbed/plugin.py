"""pytest plugin: fresh real VMs for each test, their consoles in the report of a failing one.

Loaded by pytest itself once the package is installed. Fixtures: `testbed`, `vm`, `vm_pair`, `region`. Nothing is
shared between tests or between workers of pytest-xdist but the image, which has its own lock. Depends on pytest and on
`testbed.bed`.

    def test_transfer(vm_pair, region):
        vm_pair.front.succeed("echo hello > /tmp/greeting")
        transfer(vm_pair.front, "/tmp/greeting", vm_pair.back, "/tmp", OverRegion(region.name))
        assert vm_pair.back.succeed("cat /tmp/greeting") == "hello\\n"
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from testbed import accel as accelerators
from testbed.errors import TestbedError
from testbed.qemu_args import DEFAULT_QEMU

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from host.region import Region
    from images import Image
    from testbed.accel import Verdict
    from testbed.bed import Testbed
    from testbed.vm import Vm

MARKERS = (
    "needs_kvm: only a machine whose KVM runs a stock kernel can show it; skipped elsewhere, with the probe's reason",
    "needs_root: needs root; skipped for an ordinary user",
    "testbed(network=False, **fields): how the VMs of the fixtures `vm` and `vm_pair` are made; fields of VmSpec, and "
    "memory_mib",
)
_bed = pytest.StashKey["Testbed"]()
_failed = pytest.StashKey[bool]()
#: Console lines of each VM that a failing test's report shows.
TAIL = 40


@dataclass(frozen=True)
class VmPair:
    """Two VMs, booted at the same time."""

    front: Vm
    back: Vm

    def __iter__(self) -> Iterator[Vm]:
        """So that `front, back = vm_pair` works."""
        return iter((self.front, self.back))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of all testbeds of a session."""
    group = parser.getgroup("testbed", "idc-testbed: virtual machines with shared memory")
    group.addoption("--testbed-accel", choices=["auto", "kvm", "tcg"], default="auto", help="accelerator of the VMs")
    group.addoption("--testbed-qemu", default=DEFAULT_QEMU, metavar="PROGRAM", help="QEMU binary")
    group.addoption("--testbed-keep", choices=["failed", "always", "never"], default="failed",
                    help="when the directory with a test's logs stays")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known to --strict-markers."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def pytest_report_header(config: pytest.Config) -> str:
    """Which accelerator was asked for; the proven one is known once a test needs a VM."""
    return f"testbed: accel {config.getoption('--testbed-accel')}, qemu {config.getoption('--testbed-qemu')}"


@pytest.fixture(scope="session")
def testbed_image(request: pytest.FixtureRequest) -> Image:
    """Kernel and root file system; built when they are not there, which is said on the terminal."""
    import images

    reporter = request.config.pluginmanager.get_plugin("terminalreporter")

    def say(text: str) -> None:
        if reporter is not None:
            reporter.write_line(f"testbed image: {text}")

    return images.ensure(progress=say)


@pytest.fixture(scope="session")
def testbed_verdict(request: pytest.FixtureRequest, testbed_image: Image) -> Verdict:
    """The accelerator that was proved."""
    option = request.config.getoption
    return accelerators.choose(option("--testbed-accel"), testbed_image.kernel, qemu=option("--testbed-qemu"))


@pytest.fixture(autouse=True)
def _testbed_needs(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("needs_root") and os.geteuid() != 0:
        pytest.skip("needs root")
    if request.node.get_closest_marker("needs_kvm"):
        verdict = request.getfixturevalue("testbed_verdict")
        if verdict.accel != "kvm":
            pytest.skip(f"needs KVM: {verdict.reason}")


@pytest.fixture
def testbed(request: pytest.FixtureRequest, testbed_image: Image, testbed_verdict: Verdict) -> Iterator[Testbed]:
    """A testbed of this test's own, ended with it, whatever the test did."""
    from testbed.bed import Testbed

    option = request.config.getoption
    bed = Testbed(accel=testbed_verdict.accel, qemu=option("--testbed-qemu"), image=testbed_image,
                  keep=option("--testbed-keep"))
    request.node.stash[_bed] = bed
    try:
        yield bed
    finally:
        bed.close(failed=request.node.stash.get(_failed, False))


def _boot(request: pytest.FixtureRequest, bed: Testbed, *names: str) -> list[Vm]:
    marker = request.node.get_closest_marker("testbed")
    fields: dict[str, Any] = dict(marker.kwargs) if marker else {}
    network = bool(fields.pop("network", False))
    return bed.boot(*(bed.spec(name, **fields) for name in names), network=network)


@pytest.fixture
def vm(request: pytest.FixtureRequest, testbed: Testbed) -> Vm:
    """One fresh VM."""
    return _boot(request, testbed, "vm")[0]


@pytest.fixture
def vm_pair(request: pytest.FixtureRequest, testbed: Testbed) -> VmPair:
    """Two fresh VMs, `front` and `back`."""
    front, back = _boot(request, testbed, "front", "back")
    return VmPair(front, back)


@pytest.fixture
def region(testbed: Testbed, vm_pair: VmPair) -> Region:
    """A region that both VMs of `vm_pair` may write, with the channels of a default link."""
    return testbed.link(vm_pair.front, vm_pair.back)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Add to a failing test's report what its VMs said last, and where the rest is."""
    report = yield
    if not report.failed:
        return report
    item.stash[_failed] = True
    bed = item.stash.get(_bed, None)
    if bed is None or call.when == "teardown":
        return report
    for name, machine in bed.vms.items():
        tail = "\n".join(machine.console.tail()[-TAIL:]) or "(empty)"
        report.sections.append((f"console of VM {name}", f"{tail}\nlog: {machine.log}"))
    if item.config.getoption("--testbed-keep") != "never":
        report.sections.append(("testbed", _bundled(bed)))
    return report


def _bundled(bed: Testbed) -> str:
    """Pack what is known while the VMs still live, beside the logs; say where both are."""
    from testbed import bundle

    path = bed.run.directory / "bundle.tar.gz"
    try:
        bundle.make(path, directory=bed.run.directory)
    except TestbedError as error:
        return f"logs are kept in {bed.run.directory}\nno bundle: {error}"
    return f"logs are kept in {bed.run.directory}\nall of it, to pass on: {path}"
