"""What tests between processes share."""

import interrupts
import pytest
import sanitized

interrupts.allow()


@pytest.fixture(scope="session")
def sanitized_core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a library whose core was built with AddressSanitizer and UBSan."""
    return sanitized.build(tmp_path_factory.mktemp("asan"))
