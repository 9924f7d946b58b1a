"""What tracing costs, measured for a moment: that the rows are there and the builds differ, not how large it is."""

from testbed.bench import tracing
from testbed.bench.groups import Group, Pace, measure
from testbed.bench.places import processes
from testbed.bench.tracing import Measurement, build, interval, subjects

TINY = Pace(rounds=2, seconds=0.01, scout_seconds=0.001, kept=1, quick=True)


def test_the_build_without_the_hook_lacks_every_question_for_it() -> None:
    assert build("without").STRIPPED >= 8
    assert build("off").STRIPPED == 0
    assert build("off").Near is not build("without").Near


def test_each_variant_has_a_row_and_each_cost_an_interval() -> None:
    with processes() as place:
        assert place.run is not None
        found = measure(Group("trace", place.pair, [*subjects(Measurement(place.run, 0.02))]), TINY)
    rows = {(each.row.name, each.row.mode): each.row for each in found}
    assert set(rows) == {("trace", variant) for variant in tracing.VARIANTS} | {
        ("trace-cost", variant) for variant in ("off", "on")}
    for variant in tracing.VARIANTS:
        assert rows["trace", variant].samples >= 2 * 10 * tracing.COUNT
    assert "95 % interval" in rows["trace-cost", "on"].note
    assert "over 20 turns" in rows["trace-cost", "off"].note


def test_an_interval_holds_the_mean_and_narrows() -> None:
    few, many = (interval([0.01, 0.02, 0.03, 0.015, 0.025] * times) for times in (4, 400))
    for mean, least, most in (few, many):
        assert least < mean < most
    assert many[2] - many[1] < few[2] - few[1]
