"""Which plans a sweep makes."""

from __future__ import annotations

import pytest

from onnxsnp.errors import PlanError
from onnxsnp.options import Options
from onnxsnp.sweeps.points import parse_ratios, points, shared


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0.1:0.8:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ("0.1:0.35:0.1", [0.1, 0.2, 0.3]),
        ("0.5, 0.25,0.5", [0.25, 0.5]),
        ("0.1:0.2:0.05,0.9", [0.1, 0.15, 0.2, 0.9]),
        ("0.3", [0.3]),
    ],
)
def test_ratios_are_exact_decimals_with_both_ends(text: str, ratios: list[float]) -> None:
    assert parse_ratios(text) == ratios


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "cannot read"),
        ("a", "cannot read"),
        ("0.1:0.2", "cannot read"),
        ("nan", "cannot read"),
        ("0.5:0.1:0.1", "do not go up"),
        ("0.1:0.5:0", "do not go up"),
        ("0.1:0.5:0.000001", "more than 1000"),
        ("0:0.5:0.1", "between 0 and 1"),
        ("0.5,1", "between 0 and 1"),
    ],
)
def test_what_is_no_range_is_refused_with_an_example(text: str, says: str) -> None:
    with pytest.raises(PlanError, match=says) as error:
        parse_ratios(text)
    assert error.value.hint


def test_every_ratio_meets_every_method_once_under_a_name_of_its_own() -> None:
    found = points([0.3, 0.125], ["snp", "l2", "snp"], ["none", "full"])
    assert len(found) == 8 and len({point.name for point in found}) == 8
    assert found[0].name == "snp-none-12.5" and found[0].ratio == 0.125


def test_all_plans_fit_on_as_many_samples_as_the_one_that_wants_most() -> None:
    runs = shared(Options(), points([0.3], ["snp"], ["none", "full"]))
    assert [run.samples for run in runs] == [256, 256] and [run.compensation for run in runs] == ["none", "full"]
    with pytest.raises(PlanError, match="criterion"):
        shared(Options(), points([0.3], ["nonsense"], ["none"]))
