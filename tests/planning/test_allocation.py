"""How much from where: rounding, uniform ratios, ratios from files, and the ratio that meets a cost."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.errors import PlanError
from onnxsnp.planning.allocation import check_ratio, from_file, keep_count, off_target, parse_scope, to_cost, uniform


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer(blocks=3, heads=4, qk=16, v=16, width=64, ffn=128, tokens=17))


def pick(analysis: Analysis, *kinds: str) -> list:
    return [group for group in analysis.structure.groups if group.kind in kinds]


@pytest.mark.parametrize(
    ("size", "removed", "multiple", "want"),
    [
        (64, 13, 1, 51),
        (64, 0, 1, 64),
        (64, 63.9, 1, 1),
        (64, 64, 1, 1),
        (10, 3.4, 1, 7),
        (10, 3.6, 1, 6),
        (64, 20, 8, 48),
        (64, 22, 8, 40),
        (64, 19, 8, 48),
        (64, 63, 8, 8),
        (6, 3, 8, 6),
        (12, 0, 8, 12),
    ],
)
def test_kept_counts(size: int, removed: float, multiple: int, want: int) -> None:
    assert keep_count(size, removed, multiple) == want


@given(st.integers(1, 500), st.floats(0, 1, exclude_max=True), st.sampled_from([1, 2, 4, 8, 16]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_kept_counts_are_within_bounds_and_half_a_step(size: int, ratio: float, multiple: int) -> None:
    kept = keep_count(size, ratio * size, multiple)
    assert 1 <= kept <= size and (kept % multiple == 0 or kept == size)
    if multiple == 1:
        assert abs(kept - (1 - ratio) * size) <= 0.5 + 1e-9 or kept == 1


def test_a_ratio_of_zero_keeps_everything_whatever_the_multiple() -> None:
    assert keep_count(36, 0, 8) == 36


def test_uniform_takes_the_same_share_of_every_group(analysis: Analysis) -> None:
    kept = uniform(pick(analysis, "qk", "ffn"), 0.25)
    assert kept == {**{f"qk.{i}": 12 for i in range(3)}, **{f"ffn.{i}": 96 for i in range(3)}}
    assert uniform(pick(analysis, "ffn"), 0.3, 16)["ffn.0"] == 96


SCOPES = [("qk", "v", "ffn"), ("ffn",), ("v",), ("qk",), ("qk", "v", "ffn", "residual"), ("v", "ffn")]


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("scope", SCOPES, ids="+".join)
def test_the_share_asked_for_is_met_to_one_percent_or_one_step(
    analysis: Analysis, scope: tuple[str, ...], multiple: int, what: str
) -> None:
    groups = pick(analysis, *scope)
    total = analysis.cost.total(what)
    step = max(
        total - analysis.cost.total(what, {group.atom: group.size - min(multiple, group.size - 1)}) for group in groups
    )
    for share in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
        try:
            kept = to_cost(groups, analysis.cost, share, what, multiple)
        except PlanError as error:
            assert "can remove at most" in error.message
            continue
        sizes = {analysis.groups[name].atom: size for name, size in kept.items()}
        got = 1 - analysis.cost.total(what, sizes) / total
        note = off_target(kept, analysis.groups, analysis.cost, share, what)
        assert bool(note) == (abs(got - share) > 0.01 * share)
        assert abs(got - share) <= max(0.01 * share, step / total)
        assert all(size % multiple == 0 or size == analysis.groups[name].size for name, size in kept.items())
        assert set(kept) == {group.id for group in groups} and min(kept.values()) >= 1


def test_the_default_scope_in_single_steps_meets_every_share(analysis: Analysis) -> None:
    for share in np.arange(0.05, 0.8, 0.05):
        to_cost(pick(analysis, "qk", "v", "ffn"), analysis.cost, float(share))


def test_nothing_asked_is_nothing_removed(analysis: Analysis) -> None:
    groups = pick(analysis, "qk", "v", "ffn")
    for multiple in (1, 5, 8):
        assert to_cost(groups, analysis.cost, 0.0, "macs", multiple) == {group.id: group.size for group in groups}


def test_more_than_the_scope_can_give_is_refused_with_what_it_can(analysis: Analysis) -> None:
    with pytest.raises(PlanError, match=r"can remove at most \d+\.\d% of the macs, 60\.0% were asked"):
        to_cost(pick(analysis, "qk"), analysis.cost, 0.6)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, math.nan, math.inf])
def test_ratios_outside_the_range_are_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match="at least 0 and below 1"):
        check_ratio(ratio)


def test_scopes_are_read_and_typos_answered() -> None:
    assert parse_scope("qk, ffn,qk") == ("qk", "ffn") and parse_scope(["v"]) == ("v",)
    with pytest.raises(PlanError, match="did you mean 'residual'"):
        parse_scope("residul")
    with pytest.raises(PlanError, match="unknown scope ''"):
        parse_scope("")
    with pytest.raises(PlanError, match="empty"):
        parse_scope([])


BY_KIND = {"query_key": [0.25, 0.5, 0.125], "value": [0.0, 0.5, 0.75], "ffn": [0.5, 0.25, 0.1], "residual": 0.25}
KEPT = {
    "qk.0": 12,
    "qk.1": 8,
    "qk.2": 14,
    "v.0": 16,
    "v.1": 8,
    "v.2": 4,
    "ffn.0": 64,
    "ffn.1": 96,
    "ffn.2": 115,
    "residual": 48,
}


def written(tmp_path: Path, data: Any) -> str:
    path = tmp_path / "ratios.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_ratios_by_kind(analysis: Analysis, tmp_path: Path) -> None:
    assert from_file(written(tmp_path, BY_KIND), analysis.structure.groups) == KEPT


def test_one_of_several_sets_is_picked_by_name(analysis: Analysis, tmp_path: Path) -> None:
    data = {"source": "text", "models": {"tiny": {**BY_KIND, "expected": {"gmacs": 1}}, "small": {"residual": 0.5}}}
    path = written(tmp_path, data)
    assert from_file(f"{path}:tiny", analysis.structure.groups) == KEPT
    assert from_file(f"{path}:small", analysis.structure.groups) == {"residual": 32}
    with pytest.raises(PlanError, match="has no entry 'tinny'; did you mean 'tiny'"):
        from_file(f"{path}:tinny", analysis.structure.groups)
    with pytest.raises(PlanError, match="add one of :tiny, :small"):
        from_file(path, analysis.structure.groups)


def test_the_only_set_needs_no_name(analysis: Analysis, tmp_path: Path) -> None:
    assert from_file(written(tmp_path, {"models": {"tiny": BY_KIND}}), analysis.structure.groups) == KEPT


def test_names_of_the_authors_files(analysis: Analysis, tmp_path: Path) -> None:
    data = {
        "matmul": 0.25,
        "matmul_1": 0.0,
        "matmul_2": 0.5,
        "matmul_3": 0.5,
        "matmul_4": 0.125,
        "matmul_5": 0.75,
        "blocks_0_mlp_fc1": 0.5,
        "blocks_1_mlp_fc1": 0.25,
        "blocks_2_mlp_fc1": 0.1,
        "add_24": 0.25,
    }
    assert from_file(written(tmp_path, data), analysis.structure.groups) == KEPT


def test_multiples_apply_to_files_too(analysis: Analysis, tmp_path: Path) -> None:
    assert from_file(written(tmp_path, {"ffn": [0.3, 0.3, 0.3]}), analysis.structure.groups, 32)["ffn.0"] == 96


def test_a_scope_passes_over_the_kinds_that_are_not_in_it(analysis: Analysis, tmp_path: Path) -> None:
    path = written(tmp_path, BY_KIND)
    assert from_file(path, pick(analysis, "qk"), scoped=True) == {f"qk.{i}": KEPT[f"qk.{i}"] for i in range(3)}
    with pytest.raises(PlanError, match=r"gives a ratio for 'v\.0', which this model does not have"):
        from_file(path, pick(analysis, "qk"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"query_key": [0.1] * 4}, r"gives a ratio for 'qk\.3'"),
        ({"ffn": [0.1, 1.0, 0.1]}, "'ffn.1' the ratio 1"),
        ({"ffn": [0.1, -0.2, 0.1]}, "'ffn.1' the ratio -0.2"),
        ('{"ffn": [NaN]}', "the ratio nan"),
        ({"ffn": ["much"]}, "does not hold numbers where ratios are expected"),
        ({"ffn": {"0": 0.5}}, "does not hold numbers where ratios are expected"),
        ({"blocks_0_attn": 0.5}, "names 'blocks_0_attn', which is not a known kind or module"),
        ([0.1], "does not hold ratios by kind"),
        ("{", "cannot read ratios"),
    ],
)
def test_files_that_do_not_fit_are_refused(analysis: Analysis, tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        from_file(written(tmp_path, data), analysis.structure.groups)


def test_a_missing_file_is_named(analysis: Analysis, tmp_path: Path) -> None:
    for name in ("absent.json", "absent.json:tiny", "automatic"):
        with pytest.raises(PlanError, match=f"no such allocation: '.*{name}'"):
            from_file(str(tmp_path / name), analysis.structure.groups)
