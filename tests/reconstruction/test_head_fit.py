"""Heads leave in the order of a naive block surgeon, at the error it says; what stays is fitted to all of them."""

from __future__ import annotations

from collections.abc import Sequence

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Moments, Statistics, collect
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.planning.selection import Selector, requirements
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.heads import after_heads, head_contributions, head_order, head_site
from onnxsnp.reconstruction.refit import RIDGE, solve

HEADS, SIZE = 4, 3


def problem(seed: int, heads: int = HEADS, size: int = SIZE, out: int = 7) -> tuple[np.ndarray, ...]:
    """W, C, and rows of heads that are scattered over the input."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((200, heads * size)) @ rng.standard_normal((heads * size, heads * size))
    blocks = rng.permutation(heads * size).reshape(heads, size)
    weight = rng.standard_normal((heads * size, out)) * rng.uniform(0.2, 2, (heads * size, 1))
    return weight, np.cov(x, rowvar=False, bias=True), blocks


def refit_error(weight: np.ndarray, covariance: np.ndarray, rows: np.ndarray, ridge: float = RIDGE) -> float:
    """min E‖x W − x W'‖² + λ‖W − W'‖² over the W' that are zero but in some rows."""
    strength = ridge * np.trace(covariance) / len(covariance)
    full = np.zeros_like(weight)
    inner = covariance[np.ix_(rows, rows)] + strength * np.eye(len(rows))
    full[rows] = np.linalg.solve(inner, covariance[rows] @ weight + strength * weight[rows])
    gap = weight - full
    return float(np.sum(gap * (covariance @ gap)) + strength * np.sum(gap**2))


def naive(
    weight: np.ndarray, covariance: np.ndarray, blocks: np.ndarray, ridge: float
) -> tuple[list[int], list[float]]:
    """Try every head that is left, each time with a fit from scratch."""
    left, order, errors = list(range(len(blocks))), [], []
    while len(left) > 1:
        costs = {
            head: refit_error(weight, covariance, blocks[[one for one in left if one != head]].reshape(-1), ridge)
            for head in left
        }
        gone = min(left, key=lambda head: costs[head])
        left.remove(gone)
        order.append(gone)
        errors.append(costs[gone])
    return order, errors


@pytest.mark.parametrize("ridge", [RIDGE, 1e-6, 0.3])
@pytest.mark.parametrize(("heads", "size"), [(2, 5), (4, 3), (6, 4), (5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_order_and_errors_are_those_of_a_naive_search(seed: int, heads: int, size: int, ridge: float) -> None:
    weight, covariance, blocks = problem(seed, heads, size)
    found = head_order(weight, covariance, blocks, ridge=ridge)
    order, errors = naive(weight, covariance, blocks, ridge)
    assert found.order.tolist() == order
    np.testing.assert_allclose(found.errors, errors, rtol=1e-6)


def test_heads_that_repeat_others_go_before_those_that_only_say_little() -> None:
    weight, covariance, _ = problem(0, 3, 2)
    blocks = np.arange(6).reshape(3, 2)
    copy = np.zeros((6, 6))  # x of head 1 is that of head 0, loud as it is
    copy[:, :2] = copy[:, 2:4] = np.eye(6)[:, :2]
    copy[:, 4:] = np.eye(6)[:, 4:] * 0.3
    covariance = copy.T @ covariance @ copy
    found = head_order(weight, covariance, blocks, ridge=1e-8)
    assert found.order[0] in (0, 1)
    assert found.errors[0] < 1e-6 * found.errors[1]


def test_dead_heads_go_first_and_cost_nothing() -> None:
    weight, covariance, blocks = problem(1)
    found = head_order(weight, covariance, blocks, first=np.asarray([False, True, False, True]))
    assert found.order[:2].tolist() == [1, 3] and not found.errors[:2].any() and found.errors[2] > 0
    assert head_order(weight, covariance, blocks, first=np.ones(HEADS, bool)).order.tolist() == [0, 1, 2]


def test_a_covariance_without_full_rank_gives_finite_errors() -> None:
    weight, covariance, blocks = problem(2)
    found = head_order(weight, covariance[:, :2] @ covariance[:, :2].T, blocks)
    assert np.isfinite(found.errors).all() and (np.diff(found.errors) >= 0).all()
    with pytest.raises(ValueError, match="finite"):
        head_order(weight * np.nan, covariance, blocks)


@pytest.fixture(scope="module")
def case() -> tuple[Analysis, list[Batch], Statistics]:
    model = graphs.transformer(heads=4, qk=3, v=5, width=14)
    analysis = analyse_model(model)
    batches = [Batch(graphs.inputs_for(model, 12, seed), None, 12) for seed in range(6)]
    return analysis, batches, measured(analysis, batches)


def measured(analysis: Analysis, batches: Sequence[Batch]) -> Statistics:
    groups = [group for group in analysis.structure.groups if group.prunable and group.kind in ("qk", "v", "head")]
    needed = requirements(analysis, groups, "full", "snp", planned=True)
    deps, sites = analysis.dependencies, analysis.structure.sites
    return collect(
        analysis.graph, deps, sites, (), needed.tensors, batches, pair_groups=needed.rotated, gain_sites=needed.gained
    )


def projected(analysis: Analysis, batches: Sequence[Batch]) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of the first output projection."""
    linear = analysis.linears["/blocks.0/attn/proj.w"]
    session = analysis.graph.session([linear.data, "/blocks.0/attn/proj/Add.out"], threads=1, optimize=False)
    values = [session.run(None, batch.inputs) for batch in batches]
    x, y = (np.concatenate([one[at] for one in values]).astype(np.float64) for at in range(2))
    return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])


def test_the_contribution_of_a_head_is_what_the_output_loses_without_it(
    case: tuple[Analysis, list[Batch], Statistics],
) -> None:
    analysis, batches, statistics = case
    x, _ = projected(analysis, batches)
    weight = analysis.graph.weights["/blocks.0/attn/proj.w"].astype(np.float64)
    for refitted in (False, True):
        got = head_contributions(analysis, analysis.groups["head.0"], statistics.moments, refitted=refitted)
        inputs = x - x.mean(axis=0) if refitted else x
        parts = [inputs[:, 5 * head : 5 * head + 5] @ weight[5 * head : 5 * head + 5] for head in range(4)]
        assert got is not None
        np.testing.assert_allclose(got, [np.mean(np.sum(part**2, axis=1)) for part in parts], rtol=1e-4)
    assert head_contributions(analysis, analysis.groups["head.0"], {}, refitted=True) is None


def chosen(analysis: Analysis, statistics: Statistics, counts: dict[str, int], compensation: str = "full") -> Plan:
    reconstruction = Reconstruction(analysis, statistics, compensation)
    return Plan("", Selector(analysis, statistics, reconstruction, "l2").entries(counts))


@pytest.mark.parametrize("compensation", ["refit", "full"])
def test_without_heads_the_projection_is_fitted_to_its_old_output(
    case: tuple[Analysis, list[Batch], Statistics], compensation: str
) -> None:
    analysis, batches, statistics = case
    x, y = projected(analysis, batches)
    plan = Plan("", [GroupPlan("head.0", "head", 4, 1, [[0, 3]])])
    new = Reconstruction(analysis, statistics, compensation).weights(plan)
    assert new.keys() == {"/blocks.0/attn/proj.w", "/blocks.0/attn/proj.b"}
    rows = [*range(5), *range(15, 20)]
    weight = new["/blocks.0/attn/proj.w"]
    assert not np.delete(weight, rows, axis=0).any()
    best = np.linalg.lstsq(np.column_stack([x[:, rows], np.ones(len(x))]), y, rcond=None)[0]
    ideal = np.mean((y - np.column_stack([x[:, rows], np.ones(len(x))]) @ best) ** 2)
    got = np.mean((y - x @ weight - new["/blocks.0/attn/proj.b"]) ** 2)
    assert ideal <= got < 1.02 * ideal
    plain = analysis.graph.weights["/blocks.0/attn/proj.w"][rows]
    assert got < 0.9 * np.mean((y - x[:, rows] @ plain - analysis.graph.weights["/blocks.0/attn/proj.b"]) ** 2)


def mixed_values(analysis: Analysis, updates: dict[str, np.ndarray], batches: Sequence[Batch]) -> np.ndarray:
    """What the first output projection gives with new weights."""
    graph = analysis.graph.copy()
    graph.weights.update(updates)
    session = graph.session(["/blocks.0/attn/proj/Add.out"], threads=1, optimize=False)
    values = np.concatenate([session.run(None, batch.inputs)[0] for batch in batches]).astype(np.float64)
    return values.reshape(-1, values.shape[-1])


def test_values_are_rotated_for_the_heads_that_stay(case: tuple[Analysis, list[Batch], Statistics]) -> None:
    analysis, batches, statistics = case
    _, y = projected(analysis, batches)
    reconstruction = Reconstruction(analysis, statistics, "full")
    heads = GroupPlan("head.0", "head", 4, 1, [[0, 3]])
    alone = reconstruction.weights(Plan("", [heads]))

    def error(width: int, entries: Sequence[GroupPlan] = (heads,)) -> float:
        values = GroupPlan("v.0", "v", 5, 4, [list(range(width))] * 4)
        new = reconstruction.weights(Plan("", [*entries, values]))
        assert new.keys() == {f"/blocks.0/attn/{name}" for name in ("v.w", "v.b", "proj.w", "proj.b")}
        assert entries == () or not new["/blocks.0/attn/proj.w"][5:15].any()
        return float(np.mean((y - mixed_values(analysis, new, batches)) ** 2))

    floor = float(np.mean((y - mixed_values(analysis, alone, batches)) ** 2))
    assert error(4) < 1.3 * floor  # next to nothing beyond what the heads cost
    assert floor < error(3) < error(2) < error(1)
    view, moments = after_heads(
        analysis, analysis.linears["/blocks.0/attn/proj.w"], analysis.groups["head.0"], [0, 3], _held(case)
    )
    rows = [*range(5), *range(15, 20)]
    refit, _ = solve(analysis.graph.weights["/blocks.0/attn/proj.w"], _held(case), np.asarray(rows), centred=True)
    np.testing.assert_allclose(view.graph.weights["/blocks.0/attn/proj.w"][rows], refit, rtol=1e-4, atol=1e-6)
    assert view.graph.weights["/blocks.0/attn/q.w"] is analysis.graph.weights["/blocks.0/attn/q.w"]
    assert analysis.graph.weights["/blocks.0/attn/proj.w"] is not view.graph.weights["/blocks.0/attn/proj.w"]
    outside = np.delete(np.arange(20), rows)
    assert not moments.covariance[np.ix_(rows, outside)].any() and not moments.mean[outside].any()
    np.testing.assert_allclose(
        moments.covariance[np.ix_(rows, rows)], _held(case).covariance[np.ix_(rows, rows)], rtol=1e-9, atol=1e-12
    )


def _held(case: tuple[Analysis, list[Batch], Statistics]) -> Moments:
    analysis, _, statistics = case
    return statistics.moments[analysis.linears["/blocks.0/attn/proj.w"].data]


def test_weights_follow_the_plan_and_not_the_one_before(case: tuple[Analysis, list[Batch], Statistics]) -> None:
    analysis, _, statistics = case
    values = GroupPlan("v.0", "v", 5, 4, [[0, 1]] * 4)
    heads = [GroupPlan("head.0", "head", 4, 1, [keep]) for keep in ([0, 3], [1, 2])]
    plans = [Plan("", list(entries)) for entries in ([values], [heads[0], values], [heads[1], values], [heads[1]])]
    one = Reconstruction(analysis, statistics, "full")
    for plan in [*plans, *plans[::-1]]:
        got, want = one.weights(plan), Reconstruction(analysis, statistics, "full").weights(plan)
        assert got.keys() == want.keys() and all(np.array_equal(got[name], want[name]) for name in want)
    answers = [one.weights(plan)["/blocks.0/attn/proj.w"] for plan in plans]
    assert all(not np.array_equal(a, b) for at, a in enumerate(answers) for b in answers[:at])


def test_heads_that_share_keys_and_values_go_together() -> None:
    model = graphs.grouped(keys=3, queries=2)
    analysis = analyse_model(model)
    batches = [Batch(graphs.inputs_for(model, 12, seed), None, 12) for seed in range(4)]
    statistics = measured(analysis, batches)
    site = head_site(analysis, analysis.groups["head.0"])
    assert site is not None and site.blocks.tolist() == [list(range(10 * at, 10 * at + 10)) for at in range(3)]
    plan = chosen(analysis, statistics, {"head.0": 2})
    held = statistics.moments[site.output.data]
    weight = analysis.graph.weights["proj.w"].astype(np.float64)
    order, _ = naive(weight, held.covariance, site.blocks, RIDGE)
    assert plan.groups[0].keep == [sorted({0, 1, 2} - {order[0]})]
    new = Reconstruction(analysis, statistics, "full").weights(plan)
    assert not new["proj.w"][site.blocks[order[0]]].any()
