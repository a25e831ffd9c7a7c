"""Layers that share a weight refit it on what all of them see."""

from __future__ import annotations

import graphs
import numpy as np

from onnxsnp.analysis import analyse_model
from onnxsnp.calibration.pooling import pool
from onnxsnp.calibration.statistics import Moments
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.refit import solve


def moments(seed: int, rows: int) -> tuple[np.ndarray, Moments]:
    x = np.random.default_rng(seed).standard_normal((rows, 4)) + seed
    return x, Moments(x.T @ x, x.sum(axis=0), rows)


def test_pooled_moments_are_those_of_all_rows_together() -> None:
    (x, a), (y, b), (_, c) = moments(1, 5), moments(2, 9), moments(3, 7)
    held = {"a": a, "b": b, "c": c}
    pool(held, [{"a", "b"}, {"c", "absent"}])
    both = np.concatenate([x, y])
    np.testing.assert_allclose(held["a"].covariance, np.cov(both.T, bias=True))
    np.testing.assert_allclose(held["a"].mean, both.mean(axis=0))
    assert held["b"] is held["a"] and held["c"] is c


def test_sets_that_overlap_are_one() -> None:
    held = {name: moments(seed, 3)[1] for seed, name in enumerate("abcd")}
    pool(held, [{"a", "b"}, {"c", "d"}, {"b", "c"}])
    assert {held[name].count for name in "abcd"} == {12}


def test_the_pooled_fit_is_the_best_for_all_layers_together() -> None:
    (x, a), (y, b) = moments(1, 60), moments(4, 40)
    held = {"a": a, "b": b}
    pool(held, [{"a", "b"}])
    weight, keep = np.random.default_rng(0).standard_normal((4, 3)), np.asarray([0, 2])

    def error(fit: np.ndarray, shift: np.ndarray) -> float:
        return sum(float(np.sum((rows @ weight - rows[:, keep] @ fit - shift) ** 2)) for rows in (x, y))

    best = error(*solve(weight, held["a"], keep, centred=True, ridge=0.0))
    assert best < min(error(*solve(weight, one, keep, centred=True, ridge=0.0)) for one in (a, b))


def test_a_shared_layer_is_refitted_alike_and_stays_one_weight() -> None:
    net = graphs.Net()
    x = net.input("x", ["N", 5, 8])
    first, last = net.weight("first", 8, 16), net.weight("last", 16, 8)
    scale, shift, inner, outer = (net.weight(f"v{index}", size) for index, size in enumerate((8, 8, 16, 8)))
    for _ in range(3):
        normed = net.op("LayerNormalization", x, scale, shift, axis=-1)
        hidden = net.op("Relu", net.op("Add", net.op("MatMul", normed, first), inner))
        x = net.op("Add", x, net.op("Add", net.op("MatMul", hidden, last), outer))
    net.output(net.linear(x, "head", 8, 4), ["N", 5, 4])
    model = net.proto()
    assert len(analyse_model(model).shared_inputs) == 2
    result = prune(model, 0.5, allocation="uniform", scope="ffn", calibration=graphs.calibration(model, 64), samples=32)
    assert result.model is not None and result.record["verification"]["passed"]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in result.model.graph.initializer if len(tensor.dims) == 2}
    assert sorted(shapes.values()) == [(8, 4), (8, 8), (8, 8)]
    old = np.concatenate([array.ravel() for array in graphs.initializers(model).values()])
    square = [array for array in graphs.initializers(result.model).values() if array.shape == (8, 8)]
    assert sum(not np.isin(array, old).all() for array in square) >= 1  # refitted, not only selected
