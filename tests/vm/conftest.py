"""What tests in real VMs share: the image, the accelerator's verdict, a run, VMs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import interrupts
import pytest

from images import Image, ensure
from testbed import accel
from testbed.qemu_args import VmSpec
from testbed.run import Run
from testbed.vm import Vm

SpecMaker = Callable[..., VmSpec]

interrupts.allow()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything under tests/vm boots VMs."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="session")
def image() -> Image:
    """The default image; built if need be."""
    return ensure()


@pytest.fixture(scope="session")
def verdict(image: Image) -> accel.Verdict:
    """The accelerator that was proved."""
    return accel.choose("auto", image.kernel)


@pytest.fixture(scope="session")
def spec(image: Image, verdict: accel.Verdict) -> SpecMaker:
    """`spec(name, **fields)`: a VM of the default image under the proved accelerator."""

    def make(name: str, **fields: object) -> VmSpec:
        return VmSpec.from_image(name, image, **{"accel": verdict.accel, **fields})

    return make


@pytest.fixture
def run() -> Iterator[Run]:
    """A run of this test's own."""
    with Run(keep="never") as run:
        yield run


@pytest.fixture(scope="module")
def vm(spec: SpecMaker) -> Iterator[Vm]:
    """One VM for all tests of a module that do it no harm."""
    with Run(keep="never") as run, Vm.boot(spec("shared"), run) as vm:
        yield vm
