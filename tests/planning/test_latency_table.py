"""Latency as a cost: exact on made-up times, refused where a table does not fit, and never rewarding a larger width."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.errors import PlanError
from onnxsnp.evaluation.cost import CostModel
from onnxsnp.evaluation.layers import TimedModel, find_layers, model_signature
from onnxsnp.graph.groups import Group
from onnxsnp.planning.allocation import off_target, to_cost
from onnxsnp.planning.automatic import _item, knapsack
from onnxsnp.planning.latency import LayerLatency, isotonic, measure_table, table_for
from onnxsnp.planning.latency_table import LatencyTable, LayerTimes, WholeTime, read_table, write_table
from onnxsnp.planning.ties import alone

Price = Callable[[str, float], float]  # (kind of group, width as a share of the full size) -> ms of the layer


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer(blocks=3, heads=2, qk=16, v=16, width=32, ffn=96, tokens=6))


def scoped(analysis: Analysis, *kinds: str) -> list[Group]:
    return [group for group in analysis.structure.groups if group.kind in (kinds or ("qk", "v", "ffn"))]


def table_of(analysis: Analysis, price: Price, rest: float = 1.0, steps: int = 8) -> LatencyTable:
    """A table in which a model takes what its layers take, and `rest`."""
    groups = scoped(analysis)
    layers = {}
    for name, layer in find_layers(analysis, groups).items():
        group = analysis.groups[name]
        widths = tuple(sorted({1, *(group.size * step // steps for step in range(1, steps + 1))}))
        times = tuple(price(group.kind, width / group.size) for width in widths)
        layers[layer.signature] = LayerTimes(widths, times)
    wholes = []
    for share in (1.0, 0.5):
        kept = {group.id: round(group.size * share) for group in groups}
        wholes.append(WholeTime(kept, rest + sum(price(group.kind, share) for group in groups)))
    return LatencyTable(model_signature(analysis), "made up", tuple(wholes), layers)


def priced(analysis: Analysis, price: Price, **options: Any) -> CostModel:
    table = table_of(analysis, price, **options)
    return replace(analysis.cost, latency=LayerLatency(table, analysis, scoped(analysis)))


def linear(kind: str, share: float) -> float:
    return {"qk": 1.0, "v": 2.0, "ffn": 4.0}[kind] * (0.25 + 0.75 * share)


def curves(groups: Sequence[Group], seed: int = 0) -> dict[str, np.ndarray]:
    """Losses that fall with the width, [size + 1]."""
    rng = np.random.default_rng(seed)
    return {
        group.id: np.append(np.cumsum(np.sort(rng.exponential(size=group.size)))[::-1], 0.0) / group.size
        for group in groups
    }


def solved(analysis: Analysis, cost: CostModel, share: float, multiple: int = 1) -> dict[str, int]:
    groups = scoped(analysis)
    losses = curves(groups)
    return knapsack([_item(alone(one, multiple), losses, cost, "latency") for one in groups], cost, "latency", share)


def got(analysis: Analysis, cost: CostModel, counts: dict[str, int]) -> float:
    sizes = {analysis.groups[name].atom: kept for name, kept in counts.items()}
    return 1 - cost.total("latency", sizes) / cost.total("latency")


def test_a_plan_takes_what_its_layers_and_the_rest_take(analysis: Analysis) -> None:
    cost = priced(analysis, linear)
    assert cost.total("latency") == pytest.approx(1 + 3 * (1 + 2 + 4))
    atom = {name: group.atom for name, group in analysis.groups.items()}
    assert cost.total("latency", {atom["ffn.0"]: 48}) == pytest.approx(22 - 4 * 0.75 / 2)
    sizes = {atom["ffn.0"]: 24, atom["qk.1"]: 8, atom["v.2"]: 12}
    assert cost.total("latency", sizes) == pytest.approx(22 - 4 * 0.75 * 0.75 - 0.75 / 2 - 2 * 0.75 / 4)
    differences = np.diff(cost.at_widths("latency", atom["ffn.0"], np.arange(12, 97)))
    assert differences == pytest.approx(4 * 0.75 / 96)


def test_between_measured_widths_time_is_interpolated_and_below_them_it_stays(analysis: Analysis) -> None:
    cost = priced(analysis, lambda kind, share: 1.0 + (kind == "ffn") * 16 * max(share - 0.5, 0) ** 2)
    atom = analysis.groups["ffn.0"].atom
    at = [cost.total("latency", {atom: width}) for width in (84, 90, 96)]
    assert at[1] == pytest.approx((at[0] + at[2]) / 2) and at[0] < at[2]
    assert cost.total("latency", {atom: 24}) == cost.total("latency", {atom: 48})


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_both_allocations_meet_the_latency_asked_for_to_one_percent(
    analysis: Analysis, share: float, multiple: int
) -> None:
    steps: Price = lambda kind, share: linear(kind, np.ceil(share * 4) / 4)  # noqa: E731  locally flat
    for price in (linear, steps):
        cost = priced(analysis, price)
        for counts in (
            to_cost(scoped(analysis), cost, share, "latency", multiple),
            solved(analysis, cost, share, multiple),
        ):
            step = multiple / 16 * 8 * 2 * 0.75 / cost.total("latency")  # of a value group, on the steepest segment
            assert got(analysis, cost, counts) == pytest.approx(share, abs=max(0.01 * share, step))
            if multiple == 1:
                assert off_target(counts, analysis.groups, cost, share, "latency") == ""


def test_what_takes_no_time_is_left_alone_and_what_takes_most_goes(analysis: Analysis) -> None:
    free = priced(analysis, lambda kind, share: 1.0 if kind == "ffn" else linear(kind, share))
    counts = solved(analysis, free, 0.25)
    assert all(counts[f"ffn.{index}"] == 96 for index in range(3)) and min(counts.values()) < 16
    dear = priced(analysis, lambda kind, share: linear(kind, share) * (50 if kind == "ffn" else 1))
    attention = [
        sum(kept for name, kept in solved(analysis, cost, 0.25).items() if not name.startswith("ffn"))
        for cost in (free, priced(analysis, linear), dear)
    ]
    assert attention == sorted(set(attention)) and attention[2] > 0.9 * 6 * 16


def test_a_width_in_a_flat_stretch_goes_to_the_end_where_time_drops(analysis: Analysis) -> None:
    """Only widths of 48 and below are faster, so 49 to 95 are never chosen."""
    cost = priced(analysis, lambda kind, share: 1.0 if kind != "ffn" else 2.0 - 1.0 * (share <= 0.5), steps=96)
    counts = solved(analysis, cost, 0.15)
    assert sorted(counts[f"ffn.{index}"] for index in range(3)) == [48, 48, 96]
    assert all(counts[f"{kind}.{index}"] == 16 for kind in ("qk", "v") for index in range(3))


def test_more_than_layers_can_save_is_refused_in_percent_of_latency(analysis: Analysis) -> None:
    cost = priced(analysis, linear)
    for plan in (to_cost, None):
        with pytest.raises(PlanError, match=r"most \d\d\.\d% of the latency, 90\.0% were asked; .* busy machine"):
            to_cost(scoped(analysis), cost, 0.9, "latency") if plan else solved(analysis, cost, 0.9)


def test_latency_that_was_not_measured_is_no_cost(analysis: Analysis) -> None:
    with pytest.raises(ValueError, match="has not been measured"):
        analysis.cost.total("latency")


def test_whole_models_say_how_much_the_sums_of_layers_are(analysis: Analysis) -> None:
    table = table_of(analysis, linear)
    base, half = table.whole
    slower = replace(table, whole=(base, replace(half, ms=base.ms - 3 * (base.ms - half.ms) / 4)))
    latency = LayerLatency(slower, analysis, scoped(analysis))
    sizes = {analysis.groups[name].atom: kept for name, kept in half.kept.items()}
    assert latency.total(sizes) == pytest.approx(slower.whole[1].ms) and latency.total({}) == base.ms
    quarter = {atom: kept // 2 for atom, kept in sizes.items()}  # beyond what was measured: on with the last slope
    assert base.ms - latency.total(quarter) == pytest.approx(1.5 * (base.ms - slower.whole[1].ms))
    nothing = replace(table, whole=(base, replace(half, ms=base.ms * 1.01)))  # cutting made it slower, or noise did
    assert LayerLatency(nothing, analysis, scoped(analysis)).total(sizes) == base.ms


def test_whole_models_that_could_not_be_made_narrower_say_nothing(analysis: Analysis) -> None:
    """Where widths come in multiples of the full size; the two whole models are then equal, but for noise."""
    table = table_of(analysis, linear)
    full = table.whole[0]
    latency = LayerLatency(replace(table, whole=(full, replace(full, ms=0.9 * full.ms))), analysis, scoped(analysis))
    atom = analysis.groups["ffn.0"].atom
    assert latency.total({}) == full.ms and latency.total({atom: 48}) == pytest.approx(full.ms - 4 * 0.75 / 2)


def test_layers_that_share_a_product_do_not_save_it_twice() -> None:
    """Three widths one behind the other, time in proportion to multiply-accumulates: the cost model itself."""
    analysis = analyse_model(graphs.mlp(16, 64, 48, 32, 8))
    groups = scoped(analysis)
    macs = analysis.cost
    layers = {
        layer.signature: LayerTimes(
            tuple(range(1, layer.group.size + 1)),
            tuple(macs.share("macs", layer.group.atom) / layer.group.size * w for w in range(1, layer.group.size + 1)),
        )
        for layer in find_layers(analysis, groups).values()
    }
    kept = [{one.id: one.size // part for one in groups} for part in (1, 2)]
    wholes = tuple(
        WholeTime(counts, macs.total("macs", {one.atom: counts[one.id] for one in groups})) for counts in kept
    )
    latency = LayerLatency(LatencyTable(model_signature(analysis), "", wholes, layers), analysis, groups)
    for widths in itertools.product((8, 40, 64), (12, 48), (4, 20, 32)):
        sizes = {one.atom: width for one, width in zip(groups, widths, strict=True)}
        assert latency.total(sizes) == pytest.approx(macs.total("macs", sizes))


def by_macs(models: Sequence[TimedModel], progress: Any = None) -> np.ndarray:
    """A machine that takes 1 ms for a thousand multiply-accumulates, with a burst of noise in one of four rounds."""
    times = [analyse_model(model.graph.to_proto()).cost.total("macs") / 1000 + 0.01 for model in models]
    return np.outer([1.0, 1.0, 5.0, 1.0], times)


def test_a_measured_table_costs_what_the_machine_takes(analysis: Analysis) -> None:
    groups = scoped(analysis)
    table = measure_table(analysis, groups, by_macs, "fake", multiple=4)
    assert len(table.layers) == 3 and len(table.whole) == 4
    for times in table.layers.values():
        assert all(width % 4 == 0 for width in times.widths) and 9 >= len(times.widths) >= 4
    latency = LayerLatency(table, analysis, groups)
    rng = np.random.default_rng(0)
    for _ in range(5):
        sizes = {one.atom: int(rng.integers(one.size // 4, one.size + 1)) for one in groups}
        assert latency.total(sizes) == pytest.approx(analysis.cost.total("macs", sizes) / 1000 + 0.01, rel=1e-6)


def test_a_table_survives_its_file(analysis: Analysis, tmp_path: Path) -> None:
    table = table_of(analysis, linear)
    write_table(table, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == table

    def never() -> LatencyTable:
        raise AssertionError("measured although there is a file")

    groups = scoped(analysis)
    used = table_for(analysis, groups, tmp_path / "t.json", never)
    assert used.total({}) == table.whole[0].ms and used.machine == "made up"
    table_for(analysis, groups, tmp_path / "new.json", lambda: table)
    assert read_table(tmp_path / "new.json") == table
    part = table_for(analysis, scoped(analysis, "qk"), tmp_path / "t.json", never)  # a table of more than is in scope
    sizes = {one.atom: 8 for one in scoped(analysis, "qk")}
    assert part.total(sizes) == used.total(sizes)


def test_a_model_of_equal_structure_and_other_weights_fits(analysis: Analysis) -> None:
    twin = analyse_model(graphs.transformer(blocks=3, heads=2, qk=16, v=16, width=32, ffn=96, tokens=6, seed=9))
    assert LayerLatency(table_of(analysis, linear), twin, scoped(twin)).total({}) == pytest.approx(22)


@pytest.mark.parametrize("options", [{"blocks": 2}, {"ffn": 64}, {"tokens": 7}, {"heads": 4, "qk": 8, "v": 8}])
def test_a_table_of_another_model_is_refused(analysis: Analysis, options: dict[str, int]) -> None:
    sizes = {"blocks": 3, "heads": 2, "qk": 16, "v": 16, "width": 32, "ffn": 96, "tokens": 6, **options}
    other = analyse_model(graphs.transformer(**sizes))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"t\.json holds the times of another model; name another file"):
        LayerLatency(table_of(analysis, linear), other, scoped(other), "t.json")


def test_a_table_without_what_is_asked_for_is_refused(analysis: Analysis) -> None:
    table = table_of(analysis, linear)
    wholes = tuple(replace(one, kept={"qk.0": one.kept["qk.0"]}) for one in table.whole)
    with pytest.raises(PlanError, match=r"measured without 'v\.0', which --scope asks for"):
        LayerLatency(replace(table, whole=wholes), analysis, scoped(analysis, "qk", "v")[:2])
    with pytest.raises(PlanError, match=r"no times for the layer of 'qk\.0'"):
        LayerLatency(replace(table, layers={}), analysis, scoped(analysis))


def test_the_residual_stream_has_no_layer(analysis: Analysis) -> None:
    with pytest.raises(PlanError, match="'residual' cannot be measured layer by layer; with --of latency choose"):
        table_for(analysis, scoped(analysis, "qk", "residual"), None, lambda: table_of(analysis, linear))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2, this program reads 1"),
        ({"whole": []}, "two widths or more"),
        ({"whole": [{"kept": {"qk.0": 4}, "ms": 0}]}, "0 is no time"),
        ({"whole": [{"kept": {"qk.0": 4}, "ms": 1}, {"kept": {"v.0": 4}, "ms": 1}]}, "of the same groups"),
        ({"layers": {"a": {"widths": [2, 1], "ms": [1, 1]}}}, "must ascend"),
        ({"layers": {"a": {"widths": [1, 2], "ms": [1]}}}, "2 widths, 1 times"),
        ({"layers": {"a": {"widths": [1.5], "ms": [1]}}}, "1.5 is no width"),
        ({"layers": {"a": {"widths": [1], "ms": [float("nan")]}}}, "nan is no time"),
        ({"layers": []}, "not a latency table"),
        ({"machine": None, "layers": {"a": {}}}, "it has no 'widths'"),
    ],
)
def test_what_is_no_table_is_one_clear_line(analysis: Analysis, change: dict[str, Any], says: str) -> None:
    data = {**json.loads(table_of(analysis, linear).to_json()), **change}
    with pytest.raises(PlanError, match=says) as caught:
        LatencyTable.from_json(json.dumps(data), "t.json")
    assert str(caught.value).startswith("t.json ") and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="it is not text"):
        read_table(tmp_path / "t.json")
    with pytest.raises(PlanError, match="cannot read latency table"):
        read_table(tmp_path)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_isotonic_is_the_nearest_ascending_sequence(values: list[float]) -> None:
    found = isotonic(np.asarray(values))
    assert (np.diff(found) >= 0).all() and len(found) == len(values)
    assert found.mean() == pytest.approx(np.mean(values))
    assert isotonic(found) == pytest.approx(found)
    # min-max formula (Robertson, Wright and Dykstra 1988): largest over starts of the smallest mean over ends
    for at in range(len(values)):
        best = max(min(np.mean(values[i : j + 1]) for j in range(at, len(values))) for i in range(at + 1))
        assert found[at] == pytest.approx(best)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=27, max_size=27), st.floats(0.01, 30), st.integers(0, 1000))
def test_no_noise_makes_a_larger_width_cheaper(
    analysis: Analysis, noise: list[float], narrow: float, seed: int
) -> None:
    table = table_of(analysis, linear)
    layers, left = {}, iter(noise)
    for name, times in table.layers.items():
        layers[name] = LayerTimes(times.widths, tuple(next(left) for _ in times.widths))
    noisy = replace(table, layers=layers, whole=(table.whole[0], replace(table.whole[1], ms=narrow)))
    latency = LayerLatency(noisy, analysis, scoped(analysis))
    rng = np.random.default_rng(seed)
    wide = {one.atom: int(rng.integers(1, one.size + 1)) for one in scoped(analysis)}
    one = next(iter(wide))
    assert latency.total({**wide, one: max(1, wide[one] - 1)}) <= latency.total(wide) * (1 + 1e-12)
    assert 0 <= latency.total(wide) <= table.whole[0].ms
    assert (np.diff(latency.at_widths(one, np.arange(1, 17))) >= 0).all()
