"""Heads and the widths inside them as one choice: exact costs, and no better choice left out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.graph.groups import Group
from onnxsnp.planning.automatic import knapsack
from onnxsnp.planning.sites import Item, inside, site_item
from onnxsnp.planning.ties import alone

HEADS, QK, V = 4, 5, 6


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(graphs.transformer(blocks=2, heads=HEADS, qk=QK, v=V, width=10))


def curves(analysis: Analysis, seed: int) -> dict[str, np.ndarray]:
    """Losses by width, falling to 0, of every attention group; of those inside heads per head, [heads, size + 1]."""
    rng = np.random.default_rng(seed)
    found = {}
    for group in analysis.structure.groups:
        steps = np.sort(rng.exponential(size=(group.heads, group.size)) ** 2)
        falling = np.concatenate([np.cumsum(steps, axis=1)[:, ::-1], np.zeros((group.heads, 1))], axis=1)
        found[group.id] = falling[0] if group.kind == "head" else falling
    return found


def item(analysis: Analysis, index: int, losses: Mapping[str, np.ndarray], what: str = "macs", step: int = 1) -> Item:
    heads = analysis.groups[f"head.{index}"]
    members = inside(heads, [group for group in analysis.structure.groups if group.kind in ("qk", "v")])
    assert {group.id for group in members} == {f"qk.{index}", f"v.{index}"}
    choices = [alone(group, step) for group in members]

    def curve(group: Group, kept: int) -> np.ndarray:
        total: np.ndarray = losses[group.id][:kept].sum(axis=0)
        return total

    return site_item(heads, choices, losses[heads.id], curve, analysis.cost, what)


def plans(analysis: Analysis, index: int, losses: Mapping[str, np.ndarray], what: str) -> list[tuple[float, float]]:
    """Cost and loss of every combination."""
    groups = [analysis.groups[f"{kind}.{index}"] for kind in ("head", "qk", "v")]
    found = []
    for heads, qk, v in itertools.product(range(1, HEADS + 1), range(1, QK + 1), range(1, V + 1)):
        cost = analysis.cost.total(what, dict(zip([one.atom for one in groups], (heads, qk, v), strict=True)))
        inner = losses[f"qk.{index}"][:heads, qk].sum() + losses[f"v.{index}"][:heads, v].sum()
        found.append((cost, losses[f"head.{index}"][heads] + inner))
    return found


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("seed", range(4))
def test_every_choice_costs_what_it_says_and_none_is_beaten(analysis: Analysis, seed: int, what: str) -> None:
    losses = curves(analysis, seed)
    found = item(analysis, 0, losses, what)
    every = plans(analysis, 0, losses, what)
    for pick in range(len(found.costs)):
        sizes = {group.atom: width for group, width in found.chosen(pick)}
        assert found.costs[pick] == pytest.approx(analysis.cost.total(what, sizes))
        (heads, qk, v) = (width for _, width in found.chosen(pick))
        inner = losses["qk.0"][:heads, qk].sum() + losses["v.0"][:heads, v].sum()
        assert found.losses[pick] == pytest.approx(losses["head.0"][heads] + inner)
        assert not any(
            cost < found.costs[pick] * (1 - 1e-9) and loss < found.losses[pick] * (1 - 1e-9) for cost, loss in every
        )
    for cost, loss in every:  # each is there or beaten
        assert any(
            one <= cost * (1 + 1e-9) and other <= loss + 1e-9
            for one, other in zip(found.costs, found.losses, strict=True)
        )
    assert [width for _, width in found.chosen(len(found.costs) - 1)] == [HEADS, QK, V] and found.losses[-1] == 0
    assert (np.diff(found.costs) > 0).all() and (np.diff(found.losses) <= 0).all()


def test_widths_are_those_allowed(analysis: Analysis) -> None:
    found = item(analysis, 1, curves(analysis, 0), step=2)
    for pick in range(len(found.costs)):
        heads, qk, v = (width for _, width in found.chosen(pick))
        assert 1 <= heads <= HEADS and qk in (2, 4, QK) and v in (2, 4, V)


def frontier(items: Sequence[Item], total: float) -> np.ndarray:
    """Costs and losses of the best plans, by dynamic programming over all items, [n, 2]."""
    front = np.asarray([[total, 0.0]])
    for one in items:
        every = (front[:, None] + np.stack([one.costs - total, one.losses], axis=1)).reshape(-1, 2)
        every = every[np.lexsort((every[:, 1], every[:, 0]))]
        front = every[np.r_[True, np.diff(np.minimum.accumulate(every[:, 1])) < 0]]
    return front


@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_meets_its_budget_and_is_next_to_the_optimum(seed: int) -> None:
    analysis = analyse_model(graphs.transformer(blocks=8, heads=HEADS, qk=QK, v=V, width=10))
    losses = curves(analysis, seed)
    items = [item(analysis, index, losses) for index in range(8)]
    total = analysis.cost.total("macs")
    best = frontier(items, total)
    for share in (0.25, 0.4, 0.5):
        counts = knapsack(items, analysis.cost, "macs", share)
        assert counts.keys() == {f"{kind}.{index}" for kind in ("head", "qk", "v") for index in range(8)}
        cost = analysis.cost.total("macs", {analysis.groups[name].atom: kept for name, kept in counts.items()})
        assert 1 - cost / total == pytest.approx(share, abs=0.005)
        lost = 0.0
        for index in range(8):
            heads, qk, v = (counts[f"{kind}.{index}"] for kind in ("head", "qk", "v"))
            inner = losses[f"qk.{index}"][:heads, qk].sum() + losses[f"v.{index}"][:heads, v].sum()
            lost += losses[f"head.{index}"][heads] + inner
        assert best[best[:, 0] <= cost * (1 + 1e-9), 1].min() <= lost + 1e-9
        assert lost <= best[best[:, 0] <= cost - 0.02 * total, 1].min() + 1e-9


def test_what_is_not_inside_the_heads_is_left_out(analysis: Analysis) -> None:
    groups = analysis.structure.groups
    assert [group.id for group in inside(analysis.groups["head.1"], groups)] == ["qk.1", "v.1"]
    assert inside(analysis.groups["ffn.0"], groups) == []
