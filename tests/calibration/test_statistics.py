"""Moments computed inside the session are numpy's on the captured activations, whatever the layout."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import ENOUGH, Moments, Statistics, collect
from onnxsnp.errors import DataError
from onnxsnp.scoring.snp import qk_scores

LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {},
    "packed": {"qkv": "packed", "v": 4},
    "flat": {"qkv": "flat"},
    "K first": {"reverse": True},
    "opset 11": {"opset": 11},
    "opset 18": {"opset": 18},
    "static batch": {"batch": 4},
    "free tokens": {"tokens": "S"},
}


def batches(model: Any, sizes: tuple[int, ...] = (4, 4, 4), tokens: int = 6) -> list[Batch]:
    return [Batch(graphs.inputs_for(model, size, seed, S=tokens), None, size) for seed, size in enumerate(sizes)]


def captured(analysis: Analysis, names: list[str], data: list[Batch]) -> dict[str, list[np.ndarray]]:
    session = analysis.graph.session(names, optimize=False)
    runs = [session.run(None, batch.inputs) for batch in data]
    return {name: [run[index] for run in runs] for index, name in enumerate(names)}


def measured(analysis: Analysis, data: list[Batch], tensors: list[str] | None = None, **options: Any) -> Statistics:
    groups = [group for group in analysis.structure.groups if group.kind == "qk"]
    return collect(
        analysis.graph, analysis.dependencies, analysis.structure.sites, groups, tensors or [], data, **options
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_are_numpys(layout: str) -> None:
    model = graphs.transformer(**LAYOUTS[layout])
    analysis = analyse_model(model)
    data = batches(model)
    tensors = sorted(linear.data for linear in analysis.linears.values())
    found = measured(analysis, data, tensors).moments
    tensors = [name for name in tensors if name != "x"]
    for name, arrays in captured(analysis, tensors, data).items():
        rows = np.concatenate([array.reshape(-1, array.shape[-1]) for array in arrays]).astype(np.float64)
        assert found[name].count == len(rows)
        np.testing.assert_allclose(found[name].second, rows.T @ rows, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found[name].total, rows.sum(axis=0), rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found[name].mean, rows.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(found[name].covariance, np.cov(rows.T, bias=True), atol=1e-3)


def test_moments_of_an_image_are_those_of_its_channels() -> None:
    model = graphs.depthwise(6)
    analysis = analyse_model(model)
    name = analysis.linears["project.w"].data
    data = batches(model)
    found = measured(analysis, data, [name]).moments[name]
    arrays = captured(analysis, [name], data)[name]
    rows = np.concatenate([array.transpose(0, 2, 3, 1).reshape(-1, 6) for array in arrays]).astype(np.float64)
    assert found.count == len(rows)
    np.testing.assert_allclose(found.second, rows.T @ rows, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found.mean, rows.mean(axis=0), atol=1e-4)


@pytest.mark.parametrize("width", [255, 256, 257, 259, 300, 511, 513, 1024, 1025])
def test_second_moments_in_bands_are_numpys_and_exactly_symmetric(width: int) -> None:
    model = graphs.mlp(5, width, 3)
    analysis = analyse_model(model)
    data = [Batch(graphs.inputs_for(model, size, size), None, size) for size in (30, 7)]
    name = analysis.linears["fc1.w"].data
    found = measured(analysis, data, [name]).moments[name]
    rows = np.concatenate(captured(analysis, [name], data)[name]).astype(np.float64)
    assert rows.shape == (37, width) and found.count == 37
    assert found.second.dtype == (np.float32 if width >= 256 else np.float64)
    assert np.array_equal(found.second, found.second.T)
    np.testing.assert_allclose(found.second, rows.T @ rows, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.total, rows.sum(axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_query_key_scores_are_those_of_the_captured_operands(layout: str) -> None:
    model = graphs.transformer(**LAYOUTS[layout])
    analysis = analyse_model(model)
    data = batches(model)
    found = measured(analysis, data, rank=2).qk
    for index, site in enumerate(analysis.structure.sites):
        operands = captured(analysis, [site.query[0], site.key[0]], data)
        total = np.zeros((3, 4))
        for query, key in zip(operands[site.query[0]], operands[site.key[0]], strict=True):
            q, k = (
                np.moveaxis(array, (axis, tokens), (3, 2))
                for array, axis, tokens in (
                    (query, site.query[1], site.query_tokens[1]),
                    (key, site.key[1], site.key_tokens[1]),
                )
            )
            q, k = q.astype(np.float64), k.astype(np.float64)  # [images, heads, tokens, size]
            grams = [np.einsum("bhti,bhtj->bhij", one, one) for one in (q, k)]
            total += qk_scores(grams[0], grams[1], q.shape[2], k.shape[2], rank=2)
        np.testing.assert_allclose(found[f"qk.{index}"], total, rtol=1e-3, atol=1e-3)


def test_scores_are_the_papers_formula_on_the_captured_operands() -> None:
    model = graphs.transformer(blocks=1)
    analysis = analyse_model(model)
    data = batches(model, (2,))
    (site,) = analysis.structure.sites
    operands = captured(analysis, [site.query[0], site.key[0]], data)
    q = operands[site.query[0]][0].astype(np.float64)
    k = np.moveaxis(operands[site.key[0]][0].astype(np.float64), site.key[1], 3)
    want = np.zeros((3, 4))
    for image in range(2):
        for head in range(3):
            u, sigma, vt = np.linalg.svd(q[image, head] @ k[image, head].T)
            for pair in range(4):
                one = np.outer(q[image, head, :, pair], k[image, head, :, pair])
                for component in range(2):
                    other = sigma[component] * np.outer(u[:, component], vt[component])
                    want[head, pair] += abs((one * other).sum()) / np.linalg.norm(one) / np.linalg.norm(other)
    np.testing.assert_allclose(measured(analysis, data, rank=2).qk["qk.0"], want, rtol=1e-3)


def test_passes_over_parts_of_the_data_add_up() -> None:
    model = graphs.transformer()
    analysis = analyse_model(model)
    data = batches(model, (3, 5, 1))
    name = analysis.linears["/blocks.0/mlp/fc2.w"].data
    whole = measured(analysis, data, [name], rank=2)
    parts = [measured(analysis, [batch], [name], rank=2) for batch in data]
    assert whole.samples == 9 == sum(part.samples for part in parts)
    np.testing.assert_allclose(whole.qk["qk.1"], sum(part.qk["qk.1"] for part in parts), rtol=1e-6)
    np.testing.assert_allclose(whole.moments[name].second, sum(part.moments[name].second for part in parts), rtol=1e-6)


def test_progress_counts_samples() -> None:
    model = graphs.transformer()
    seen: list[int] = []
    measured(analyse_model(model), batches(model, (3, 5)), progress=seen.append)
    assert seen == [3, 8]


def test_activations_that_are_not_finite_are_named() -> None:
    model = graphs.mlp(4, 6, 3)
    analysis = analyse_model(model)
    name = analysis.linears["fc1.w"].data
    feed = {"x": np.full((2, 4), np.nan, np.float32)}
    with pytest.raises(DataError, match=f"activation '{name}' is not finite"):
        measured(analysis, [Batch(feed, None, 2)], [name])


def test_half_precision_is_measured_in_single() -> None:
    model = graphs.transformer(dtype=np.float16, blocks=1)
    analysis = analyse_model(model)
    name = analysis.linears["/blocks.0/mlp/fc2.w"].data
    found = measured(analysis, batches(model), [name])
    rows = np.concatenate([array.reshape(-1, 20) for array in captured(analysis, [name], batches(model))[name]])
    np.testing.assert_allclose(found.moments[name].second, rows.T.astype(np.float64) @ rows, rtol=1e-2, atol=1e-2)


def test_double_precision_is_measured() -> None:
    model = graphs.mlp(4, 6, 3)
    for tensor in model.graph.initializer:
        if tensor.data_type == 1:
            tensor.CopyFrom(
                graphs.onnx.numpy_helper.from_array(
                    graphs.onnx.numpy_helper.to_array(tensor).astype(np.float64), tensor.name
                )
            )
    for value in [*model.graph.input, *model.graph.output]:
        value.type.tensor_type.elem_type = 11
    analysis = analyse_model(model)
    measured(analysis, batches(model), [analysis.linears["fc1.w"].data])


def test_moments_of_nothing_are_zero() -> None:
    empty = Moments(np.zeros((2, 2)), np.zeros(2))
    assert not empty.mean.any() and not empty.covariance.any()


def test_of_a_wide_activation_with_tokens_in_plenty_every_few_count_and_all_places_take_part() -> None:
    model = graphs.mlp(5, 256, 3)
    analysis = analyse_model(model)
    data = [Batch(graphs.inputs_for(model, 2048, seed), None, 2048) for seed in range(3)]
    name = analysis.linears["fc1.w"].data
    arrays = captured(analysis, [name], data)[name]
    every = 3 * 2048 // (ENOUGH * 256)
    assert every == 3
    wanted = np.concatenate([arrays[0], *(array[number % 3 :: 3] for number, array in enumerate(arrays) if number)])
    for threads in (1, 2):
        found = measured(analysis, data, [name], samples=3 * 2048, threads=threads).moments[name]
        assert found.count == len(wanted)
        np.testing.assert_allclose(found.second, wanted.astype(np.float64).T @ wanted, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(found.total, wanted.sum(axis=0, dtype=np.float64), rtol=1e-4, atol=1e-2)
    assert measured(analysis, data, [name], samples=2048).moments[name].count == 3 * 2048
    assert measured(analysis, data, [name]).moments[name].count == 3 * 2048


@pytest.mark.parametrize("name", ["attention_mask", "src_key_padding_mask"])
@pytest.mark.parametrize("symbol", ["T", "U"])
def test_tokens_that_are_padding_do_not_count(name: str, symbol: str) -> None:
    net = graphs.Net()
    x = net.input("x", ["N", "T", 4])
    mask = net.input(name, ["N", symbol], np.int64)
    ids = net.input("ids", ["N", symbol], np.int64)
    there = net.op("Unsqueeze", net.op("Cast", mask, to=onnx.TensorProto.FLOAT), [2])
    hidden = net.op("Relu", net.linear(net.op("Add", x, net.op("Gather", net.weight("e", 9, 4), ids)), "fc1", 4, 6))
    flat = net.op("Identity", net.reshape(hidden, -1, 6))
    net.output(net.reshape(net.linear(flat, "fc2", 6, 3), 2, -1, 3), [2, "T", 3])
    net.output(there, ["N", symbol, 1], "seen")
    model = net.proto()
    feed = {"x": np.random.default_rng(0).standard_normal((2, 7, 4)).astype(np.float32)}
    feed["ids"] = np.arange(14).reshape(2, 7) % 9
    kept = np.asarray([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    feed[name] = kept if name == "attention_mask" else 1 - kept
    analysis = analyse_model(model)
    tensors = sorted({analysis.linears[weight].data for weight in ("fc1.w", "fc2.w")})
    found = collect(analysis.graph, analysis.dependencies, [], [], tensors, [Batch(feed, None, 2)], threads=1).moments
    values = dict(zip(tensors, analysis.graph.session(tensors, threads=1).run(None, feed), strict=True))
    for tensor in tensors:
        rows = values[tensor].reshape(14, -1)[kept.reshape(-1) == 1].astype(np.float64)
        assert found[tensor].count == 10
        np.testing.assert_allclose(found[tensor].second, rows.T @ rows, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[tensor].mean, rows.mean(axis=0), rtol=1e-5, atol=1e-6)
