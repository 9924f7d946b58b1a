"""What tracing costs, measured for a moment: that the rows are there and the builds differ, not how large it is."""

import pytest

from idc.measure.traced import VARIANTS, build
from testbed.bench import scenes, tracing
from testbed.bench.groups import Group, Pace, measure
from testbed.bench.names.trace import groups
from testbed.bench.places import processes
from testbed.bench.scenes import Processes
from testbed.bench.tracing import WORKS, Measurement, Work, interval, subjects

TINY = Pace(rounds=2, seconds=0.01, scout_seconds=0.001, kept=1, quick=True)


def test_the_build_without_the_hook_lacks_every_question_for_it() -> None:
    assert build("without").STRIPPED >= 18
    assert build("off").STRIPPED == 0
    assert build("off").PythonNear is not build("without").PythonNear


@pytest.mark.parametrize("work", WORKS, ids=lambda work: f"{work.api}-{work.outstanding}")
def test_each_variant_has_a_row_and_each_cost_an_interval(work: Work) -> None:
    with processes() as place:
        assert place.run is not None
        measurement = Measurement(Processes(place.run), 0.02, work)
        found = measure(Group("trace", place.pair, [*subjects(measurement)]), TINY)
    rows = {(each.row.name, each.row.mode): each.row for each in found}
    assert set(rows) == {("trace", variant) for variant in VARIANTS} | {
        (name, variant) for name in ("trace-cost", "trace-bound") for variant in ("off", "on")}
    for variant in VARIANTS:
        assert rows["trace", variant].samples >= 2 * tracing.LEAST_TURNS * scenes.COUNT // work.outstanding
        assert rows["trace", variant].outstanding == (work.outstanding if work.outstanding > 1 else None)
    assert "95 % interval" in rows["trace-cost", "on"].note
    assert "turns" in rows["trace-cost", "off"].note


def test_every_kind_of_transaction_is_measured_between_processes() -> None:
    with processes() as place:
        assert len(groups(place, TINY)) == len(WORKS)
        assert place.absent == []


def test_an_interval_holds_the_mean_and_narrows() -> None:
    few, many = (interval([0.01, 0.02, 0.03, 0.015, 0.025] * times) for times in (4, 400))
    for mean, least, most in (few, many):
        assert least < mean < most
    assert many[2] - many[1] < few[2] - few[1]
    _, least, most = interval([0.01, 0.02, 0.03] * 3 + [20.0])
    assert most - least < 0.1, "one turn in which the machine stood still"
