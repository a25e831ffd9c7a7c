"""Spelled-out operators compute what onnxruntime's fused ones compute, in every variant and opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from fused import assert_same, expanded, model_of, noise

from onnxsnp.graph.expand import expand
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.normalize import as_graph, normalize
from onnxsnp.graph.probe import probe
from onnxsnp.model import load


@pytest.mark.parametrize("opset", [11, 14, 17, 20])
@pytest.mark.parametrize("op", ["Gelu", "BiasGelu", "FastGelu", "QuickGelu"])
def test_activations(op: str, opset: int) -> None:
    feeds = {"x": 3 * noise(2, 5, 8)}
    biased = op in ("BiasGelu", "FastGelu")
    settings = {"alpha": 1.3} if op == "QuickGelu" else {}
    weights = {"b": noise(8)} if biased else {}
    assert_same(model_of(op, feeds, weights, ["x", *weights], opset=opset, **settings), feeds, 1e-5)


def test_an_activation_without_its_optional_bias() -> None:
    feeds = {"x": noise(2, 5, 8)}
    assert_same(model_of("FastGelu", feeds, {}, ["x"]), feeds, 1e-5)


@pytest.mark.parametrize("trans", [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("op", ["FusedMatMul", "TransposeMatMul"])
def test_products_with_scale_and_transposes(op: str, trans: tuple[int, int]) -> None:
    a = noise(2, 3, *((4, 5) if trans[0] else (5, 4)))
    b = noise(2, 3, *((6, 4) if trans[1] else (4, 6)))
    feeds = {"a": a, "b": b}
    assert_same(model_of(op, feeds, {}, ["a", "b"], transA=trans[0], transB=trans[1], alpha=0.35), feeds)


@pytest.mark.parametrize("trans", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_products_of_matrices_with_one_axis_in_front_of_the_batch(trans: tuple[int, int]) -> None:
    a = noise(*((4, 2, 3, 5) if trans[0] else (5, 2, 3, 4)))
    b = noise(*((6, 2, 3, 4) if trans[1] else (4, 2, 3, 6)))
    settings = {"transA": trans[0], "transB": trans[1], "transBatchA": 1, "transBatchB": 1, "alpha": 0.35}
    assert_same(model_of("FusedMatMul", {"a": a, "b": b}, {}, ["a", "b"], **settings), {"a": a, "b": b})


def test_a_product_by_a_transposed_weight_has_a_constant_weight_after_normalisation() -> None:
    feeds, weights = {"a": noise(2, 5, 4)}, {"w": noise(6, 4)}
    found = normalize(load(model_of("FusedMatMul", feeds, weights, ["a", "w"], transB=1)))
    assert [node.op_type for node in found.graph.nodes] == ["MatMul"]
    np.testing.assert_array_equal(found.graph.weights[found.graph.nodes[0].input[1]], weights["w"].T)


@pytest.mark.parametrize(
    ("activation", "settings"),
    [
        ("Tanh", {}),
        ("LeakyRelu", {"activation_alpha": 0.2}),
        ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
    ],
)
def test_gemm_with_an_activation(activation: str, settings: dict[str, float]) -> None:
    feeds, weights = {"a": noise(5, 4)}, {"w": noise(6, 4), "b": noise(6)}
    model = model_of(
        "FusedGemm", feeds, weights, ["a", "w", "b"], transB=1, alpha=0.5, activation=activation, **settings
    )
    assert_same(model, feeds)


@pytest.mark.parametrize(
    ("activation", "settings"),
    [("Relu", None), ("LeakyRelu", [0.2]), ("Clip", [-0.1, 0.5]), ("HardSigmoid", [0.3, 0.4])],
)
@pytest.mark.parametrize("joined", [False, True])
def test_convolutions_with_a_sum_and_an_activation(activation: str, settings: list[float] | None, joined: bool) -> None:
    feeds = {"x": noise(1, 3, 6, 6)} | ({"z": noise(1, 4, 6, 6)} if joined else {})
    weights = {"w": noise(4, 3, 3, 3), "b": noise(4)}
    model = model_of(
        "FusedConv", feeds, weights, ["x", "w", "b", *(["z"] if joined else [])],
        activation=activation, pads=[1, 1, 1, 1], **({"activation_params": settings} if settings else {}),
    )  # fmt: skip
    assert_same(model, feeds)


def test_an_unknown_activation_leaves_the_operator_with_a_reason() -> None:
    graph = expanded_or_as_it_is("FusedGemm", activation="Affine")
    assert "Affine" in graph.unexpanded["fused"]


def expanded_or_as_it_is(op: str, **attributes: Any) -> Graph:
    feeds, weights = {"a": noise(5, 4)}, {"w": noise(4, 6), "b": noise(6)}
    graph = as_graph(load(model_of(op, feeds, weights, ["a", "w", "b"], **attributes)))
    expand(graph, {"a": (5, 4), "w": (4, 6), "b": (6,), "out0": (5, 6)})
    assert [node.op_type for node in graph.nodes] == [op]
    return graph


@pytest.mark.parametrize("opset", [11, 14, 17, 18])
@pytest.mark.parametrize("inputs", ["x y g", "x y g b", "x y g b c", "x y g  c"])
def test_skip_layer_norm_and_its_sum(inputs: str, opset: int) -> None:
    feeds = {"x": noise(2, 5, 8), "y": noise(2, 5, 8)}
    weights = {name: 1 + noise(8) for name in ("g", "b", "c") if name in inputs}
    model = model_of(
        "SkipLayerNormalization", feeds, weights, inputs.split(" "), ["out", "", "", "sum"], opset, epsilon=1e-3
    )
    assert_same(model, feeds, 1e-5)


@pytest.mark.parametrize("inputs", ["x y g", "x y g c"])
def test_skip_rms_norm_and_its_sum(inputs: str) -> None:
    feeds = {"x": noise(2, 5, 8), "y": noise(2, 5, 8)}
    weights = {name: 1 + noise(8) for name in ("g", "c") if name in inputs}
    model = model_of(
        "SkipSimplifiedLayerNormalization", feeds, weights, inputs.split(), ["out", "", "", "sum"], epsilon=1e-3
    )
    assert_same(model, feeds, 1e-5)


def test_normalisations_in_files_older_than_them() -> None:
    feeds, weights = {"x": noise(2, 5, 8)}, {"g": 1 + noise(8), "b": noise(8)}
    assert_same(model_of("LayerNormalization", feeds, weights, ["x", "g", "b"], opset=13, domain=""), feeds, 1e-5)
    del weights["b"]
    assert_same(
        model_of("SimplifiedLayerNormalization", feeds, weights, ["x", "g"], domain="", epsilon=1e-3), feeds, 1e-5
    )


def test_an_rms_norm_in_half_precision_does_not_overflow() -> None:
    feeds, weights = {"x": 300 * noise(2, 5, 8, dtype="f2")}, {"g": noise(8, dtype="f2")}
    graph = assert_same(model_of("SimplifiedLayerNormalization", feeds, weights, ["x", "g"], domain=""), feeds, 2e-3)
    assert np.isfinite(graph.session(optimize=False).run(None, feeds)[0]).all()


def test_a_layer_norm_whose_statistics_are_read_stays() -> None:
    feeds, weights = {"x": noise(2, 5, 8), "y": noise(2, 5, 8)}, {"g": noise(8)}
    graph = expanded(model_of("SkipLayerNormalization", feeds, weights, ["x", "y", "g"], ["out", "mean", "spread"]))
    assert "statistics" in graph.unexpanded["fused"]


@pytest.mark.parametrize("kind", ["i4", "i8"])
@pytest.mark.parametrize("inputs", ["i s w p t g b m", "i  w p  g b", "i s w p t g b m q"])
def test_embeddings_their_sum_and_the_lengths(inputs: str, kind: str) -> None:
    rng = np.random.default_rng(1)
    mask = np.asarray([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    every = {
        "i": rng.integers(0, 11, (2, 5)),
        "s": rng.integers(0, 2, (2, 5)),
        "m": mask,
        "q": rng.integers(0, 7, (2, 5)),
    }
    feeds = {name: array.astype("i4") for name, array in every.items() if name in inputs.split(" ")}
    table = {"w": noise(11, 8), "p": noise(7, 8), "t": noise(2, 8), "g": noise(8), "b": noise(8)}
    weights = {name: array for name, array in table.items() if name in inputs.split(" ")}
    model = model_of(
        "EmbedLayerNormalization", feeds, weights, inputs.split(" "), ["out", "lengths", "sum"], epsilon=1e-3
    )
    assert_same(model, feeds, 1e-5)


def test_plain_operators_are_left_as_they_are() -> None:
    feeds, weights = {"x": noise(2, 5, 8)}, {"g": noise(8), "b": noise(8)}
    graph = as_graph(load(model_of("LayerNormalization", feeds, weights, ["x", "g", "b"], domain="")))
    assert expand(graph, probe(graph).shapes) == []
    assert [node.op_type for node in graph.nodes] == ["LayerNormalization"]


@pytest.mark.parametrize("opset", [11, 18])
def test_pooling_over_one_axis_is_a_mean(opset: int) -> None:
    feeds = {"x": noise(2, 5, 8)}
    graph = assert_same(model_of("GlobalAveragePool", feeds, {}, ["x"], opset=opset, domain=""), feeds)
    assert [node.op_type for node in graph.nodes] == ["ReduceMean"]
    feeds = {"x": noise(2, 5, 4, 4)}
    assert not expanded_types(model_of("GlobalAveragePool", feeds, {}, ["x"], opset=opset, domain=""))


def expanded_types(model: onnx.ModelProto) -> list[str]:
    graph = as_graph(load(model))
    return expand(graph, probe(graph).shapes)


@pytest.mark.parametrize(
    ("op", "inputs", "domain", "opset"),
    [
        ("LayerNormalization", "x g", "", 13),
        ("SimplifiedLayerNormalization", "x g", "", 17),
        ("SkipLayerNormalization", "x y g", "com.microsoft", 17),
        ("SkipSimplifiedLayerNormalization", "x y g", "com.microsoft", 17),
        ("EmbedLayerNormalization", "i  w p  g b", "com.microsoft", 17),
    ],
)
def test_a_norm_that_does_not_say_its_epsilon_has_the_operators_own(
    op: str, inputs: str, domain: str, opset: int
) -> None:
    small = {"x": 1e-3 * noise(2, 5, 8), "y": 1e-3 * noise(2, 5, 8), "i": np.zeros((2, 5), "i4")}
    tables = {"g": 1 + noise(8), "b": noise(8), "w": 1e-3 * noise(3, 8), "p": 1e-3 * noise(7, 8)}
    names = inputs.split(" ")
    feeds = {name: array for name, array in small.items() if name in names}
    weights = {name: array for name, array in tables.items() if name in names}
    outputs = ["out", "lengths"] if op.startswith("Embed") else 1
    assert_same(model_of(op, feeds, weights, names, outputs, opset, domain), feeds, 1e-5)
