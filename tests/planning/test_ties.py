"""Groups that get their widths together: they do, a budget is met as they allow, and nothing better is missed."""

from __future__ import annotations

import itertools

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.graph.groups import Group
from onnxsnp.planning.allocation import to_cost, uniform
from onnxsnp.planning.automatic import _item, knapsack
from onnxsnp.planning.sites import inside, site_item
from onnxsnp.planning.ties import Tie, alone, tied

SIZE = 24


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer(blocks=2, heads=3, qk=SIZE, v=SIZE, width=30, ffn=40))


def pick(analysis: Analysis, *kinds: str) -> list[Group]:
    return [group for group in analysis.structure.groups if group.kind in kinds]


def ties(analysis: Analysis, step: int = 4, least: int = 8) -> list[Tie]:
    widths = np.asarray([[one, one] for one in (*range(least, SIZE, step), SIZE)])
    return [Tie((analysis.groups[f"qk.{block}"], analysis.groups[f"v.{block}"]), widths) for block in range(2)]


def falling(rng: np.random.Generator, size: int) -> np.ndarray:
    steps = np.sort(rng.exponential(size=size) ** 2)
    return np.append(np.cumsum(steps)[::-1], 0.0)


def test_every_group_comes_once_and_a_tie_only_whole(analysis: Analysis) -> None:
    groups = pick(analysis, "qk", "v", "ffn")
    found = tied(groups, 8, ties(analysis))
    assert [tuple(one.id for one in choice.groups) for choice in found].count(("qk.0", "v.0")) == 1
    assert sorted(one.id for choice in found for one in choice.groups) == sorted(one.id for one in groups)
    apart = tied(pick(analysis, "qk", "ffn"), 8, ties(analysis))
    assert all(len(choice.groups) == 1 for choice in apart)
    assert {tuple(alone(group, 16).widths[:, 0]) for group in pick(analysis, "ffn")} == {(16, 32, 40)}
    assert tuple(alone(pick(analysis, "head")[0], 16).widths[:, 0]) == (1, 2, 3)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.35, 0.5, 0.8])
def test_one_ratio_for_all_keeps_ties(analysis: Analysis, ratio: float) -> None:
    kept = uniform(pick(analysis, "qk", "v", "ffn"), ratio, 1, ties(analysis))
    nearest = min((*range(8, SIZE, 4), SIZE), key=lambda width: abs(width - SIZE * (1 - ratio)))
    assert {kept[name] for name in ("qk.0", "qk.1", "v.0", "v.1")} == {nearest}
    assert kept["ffn.0"] == round(40 * (1 - ratio))


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_a_cost_is_met_by_steps_of_ties(analysis: Analysis, share: float, what: str) -> None:
    groups = pick(analysis, "qk", "v", "ffn")
    kept = to_cost(groups, analysis.cost, share, what, 1, ties(analysis))
    assert all(kept[f"qk.{block}"] == kept[f"v.{block}"] for block in range(2))
    sizes = {group.atom: kept[group.id] for group in groups}
    step = analysis.cost.share(what, analysis.groups["ffn.0"].atom) / 40  # the finest there is
    left = analysis.cost.total(what, sizes) - (1 - share) * analysis.cost.total(what)
    assert abs(left) <= max(step, analysis.cost.share(what, analysis.groups["qk.0"].atom) / SIZE * 4)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.45])
@pytest.mark.parametrize("seed", range(4))
def test_no_better_choice_is_missed(analysis: Analysis, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    groups = pick(analysis, "qk", "v")
    losses = {group.id: falling(rng, group.size) for group in groups}
    choices = tied(groups, 1, ties(analysis))
    counts = knapsack([_item(one, losses, analysis.cost, "macs") for one in choices], analysis.cost, "macs", share)

    def cost(picked: dict[str, int]) -> float:
        return analysis.cost.total("macs", {analysis.groups[name].atom: width for name, width in picked.items()})

    plans = [
        {name: width for one, row in zip(choices, rows, strict=True) for name, width in one.at(row).items()}
        for rows in itertools.product(*(range(len(one.widths)) for one in choices))
    ]
    assert counts in plans

    def lost(picked: dict[str, int]) -> float:
        return sum(losses[name][width] for name, width in picked.items())

    assert lost(counts) <= min(lost(plan) for plan in plans if cost(plan) <= cost(counts)) + 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_beside_heads_ties_hold_and_every_useful_combination_is_there(analysis: Analysis, seed: int) -> None:
    rng = np.random.default_rng(seed)
    heads = analysis.groups["head.0"]
    tie = ties(analysis)[0]
    assert {group.id for group in inside(heads, pick(analysis, "qk", "v"))} == {group.id for group in tie.groups}
    curves = {group.id: falling(rng, group.size) for group in (heads, *tie.groups)}
    item = site_item(
        heads, [tie], curves["head.0"], lambda group, kept: curves[group.id] * kept / 3, analysis.cost, "macs"
    )
    assert [group.id for group in item.groups] == ["head.0", "qk.0", "v.0"]
    assert (item.widths[:, 1] == item.widths[:, 2]).all()
    rows = list(zip(item.costs, item.losses, strict=True))
    for kept, width in itertools.product(range(1, 4), tie.widths[:, 0].tolist()):
        sizes = dict(zip((group.atom for group in item.groups), (kept, width, width), strict=True))
        cost = analysis.cost.total("macs", sizes)
        loss = curves["head.0"][kept] + sum(curves[group.id][width] for group in tie.groups) * kept / 3
        assert any(one <= cost + 1e-6 and other <= loss + 1e-9 for one, other in rows)
