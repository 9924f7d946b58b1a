"""What `testbed bench block` reads of fio."""

import json

import pytest

from testbed.bench.errors import BenchFailed
from testbed.bench.names.block import parse_fio


def fio(**changes: object) -> str:
    side = {"total_ios": 5000, "io_bytes": 5000 << 12, "runtime": 2500}
    return "fio: a warning\n" + json.dumps({"jobs": [{"error": 0, "read": side, "write": side} | changes]})


def test_requests_a_second_and_megabytes_a_second() -> None:
    assert parse_fio(fio(), "read", operations=True) == (2000, 5)
    assert parse_fio(fio(), "write", operations=False) == (5000 * 4096 / 2.5e6, 5000 * 4096 / 1e9)


@pytest.mark.parametrize("output", ["", "{}", "fio: no such file", fio(error=5), fio(read={"total_ios": 0}),
                                    fio(read={"total_ios": 0, "io_bytes": 0, "runtime": 9})])
def test_what_is_none_of_fio_is_one_line(output: str) -> None:
    with pytest.raises(BenchFailed, match="fio's output is not what it should be"):
        parse_fio(output, "read", operations=True)
