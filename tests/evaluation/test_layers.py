"""Layers cut out of a graph: the same numbers as inside it, at any width, and one measurement for equal layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest
from onnx import numpy_helper

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.evaluation.layers import (
    TimedModel,
    boundary_values,
    find_layers,
    layer_model,
    local_timer,
    model_signature,
    sample_inputs,
    samples_per_run,
    width_grid,
)
from onnxsnp.planning.plan import GroupPlan, Plan, as_cuts
from onnxsnp.surgery.rewrite import mask_weights

EXPORTS = [
    "timm_deit_eager_ts13_dyn.onnx",
    "timm_deit_sdpa_dynamo18_b2.onnx",
    "timm_deit_sdpa_dynamo23_dyn.onnx",
    "timm_deit_sdpa_dynamo20_noopt.onnx",
    "timm_beit_eager_ts17_dyn.onnx",
    "hf_vit_eager_ts17_dyn.onnx",
    "torchvision_vit_mha_ts17_dyn.onnx",
    "own_flat_chunk_dynamo18_dyn.onnx",
    "own_gemm_ts17_dyn.onnx",
]


def run(model: TimedModel) -> list[np.ndarray]:
    return graphs.run(model.graph.to_proto(), model.inputs)


def check_layers(analysis: Analysis, kinds: tuple[str, ...] = ("qk", "v", "ffn")) -> int:
    """Every layer, whole and cut, against the same tensors of the whole model (masked where it is cut)."""
    graph = analysis.graph
    groups = [group for group in analysis.structure.groups if group.kind in kinds and group.prunable]
    layers = find_layers(analysis, groups)
    inputs = sample_inputs(analysis)
    values = boundary_values(analysis, layers.values(), inputs)
    for name, layer in layers.items():
        group = analysis.groups[name]
        for got, out in zip(run(layer_model(analysis, layer, group.size, values)), layer.outputs, strict=True):
            np.testing.assert_allclose(got, values[out], rtol=1e-4, atol=1e-5)
        kept = max(1, group.size // 3)
        entry = GroupPlan(name, group.kind, group.size, group.heads, [list(range(kept))] * group.heads)
        masked = mask_weights(graph, analysis.dependencies, as_cuts(Plan("", [entry]), analysis.groups), {})
        session = graph.session(list(layer.outputs), optimize=False, feed=masked.keys())
        wanted = session.run(None, inputs, masked)
        for got, want in zip(run(layer_model(analysis, layer, kept, values)), wanted, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    return len(layers)


@pytest.mark.parametrize("export", EXPORTS)
def test_a_layer_alone_computes_what_it_does_in_the_model(exports: Path, export: str) -> None:
    assert check_layers(analyse_model(exports / export)) == 6


@pytest.mark.parametrize(
    "options",
    [{"qkv": "flat"}, {"qkv": "packed", "v": 4}, {"gate": "packed"}, {"reverse": True}, {"tokens": "T"}, {"opset": 11}],
    ids=str,
)
def test_so_it_does_in_other_layouts(options: dict[str, Any]) -> None:
    assert check_layers(analyse_model(graphs.transformer(**options))) == 6


def test_channels_of_convolutions_are_layers_too() -> None:
    assert check_layers(analyse_model(graphs.depthwise(kernel=3)), ("channel",)) == 1


def test_a_layer_holds_the_operators_of_its_width_and_no_others() -> None:
    analysis = analyse_model(graphs.transformer(blocks=1))
    layers = find_layers(analysis, [analysis.groups[name] for name in ("qk.0", "v.0", "ffn.0")])
    kinds = {node.name: node.op_type for node in analysis.graph.nodes}
    held = {name: sorted(kinds[node] for node in layer.nodes) for name, layer in layers.items()}
    assert held["ffn.0"] == ["Add", "MatMul", "MatMul", "Relu"]
    assert held["qk.0"].count("MatMul") == 3 and "Softmax" not in held["qk.0"]
    assert held["v.0"].count("MatMul") == 3 and not layers["v.0"].nodes & layers["qk.0"].nodes


def test_equal_blocks_share_one_measurement() -> None:
    analysis = analyse_model(graphs.transformer(blocks=12))
    groups = [group for group in analysis.structure.groups if group.kind in ("qk", "v", "ffn")]
    layers = find_layers(analysis, groups)
    assert len(layers) == 36 and len({layer.signature for layer in layers.values()}) == 3
    for kind in ("qk", "v", "ffn"):
        assert len({layers[f"{kind}.{index}"].signature for index in range(12)}) == 1


def test_what_changes_the_work_changes_the_signature() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"ffn": 24},
        {"tokens": 6},
        {"heads": 4, "width": 16},
        {"qk": 5},
        {"activation": "gelu_tanh"},
        {"gate": "pair"},
    ]
    found: dict[str, set[str]] = {"qk.0": set(), "ffn.0": set(), "model": set()}
    for options in variants:
        analysis = analyse_model(graphs.transformer(**options))
        for name, layer in find_layers(analysis, [analysis.groups["qk.0"], analysis.groups["ffn.0"]]).items():
            found[name].add(layer.signature)
        found["model"].add(model_signature(analysis))
    assert {name: len(held) for name, held in found.items()} == {"qk.0": 4, "ffn.0": 6, "model": 7}
    same = analyse_model(graphs.transformer(seed=3))
    assert model_signature(same) in found["model"]


@pytest.mark.parametrize(("size", "multiple"), [(64, 1), (64, 8), (768, 16), (3, 1), (1, 1), (36, 8), (5, 8)])
def test_the_grid_reaches_from_narrow_to_full_in_multiples(size: int, multiple: int) -> None:
    grid = width_grid(size, multiple)
    assert grid[-1] == size and grid == sorted(set(grid)) and grid[0] >= min(multiple, size) and len(grid) <= 9
    assert all(width % multiple == 0 or width == size for width in grid)
    if size >= 8 * multiple:
        assert grid[0] <= max(multiple, size // 16 + 1) and max(np.diff(grid)) <= size / 8 + multiple


def test_a_fixed_batch_is_known() -> None:
    assert samples_per_run(analyse_model(graphs.transformer(batch=4))) == 4
    assert samples_per_run(analyse_model(graphs.transformer())) == 1


def test_a_layer_can_be_sent_elsewhere_as_a_file() -> None:
    analysis = analyse_model(graphs.transformer())
    layer = find_layers(analysis, [analysis.groups["ffn.1"]])["ffn.1"]
    values = boundary_values(analysis, [layer], sample_inputs(analysis))
    proto = layer_model(analysis, layer, 8, values).graph.to_proto()
    weights = [numpy_helper.to_array(tensor) for tensor in proto.graph.initializer]
    assert sorted(array.shape for array in weights) == [(8,), (8, 12), (12, 8)]
    sizes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in proto.graph.output]
    assert sizes == [[1, 5, 12]]


def test_a_session_for_timing_computes_the_same() -> None:
    analysis = analyse_model(graphs.transformer())
    inputs = sample_inputs(analysis)
    want = analysis.graph.session(threads=1).run(None, inputs)[0]
    session = analysis.graph.timed_session(threads=1)
    np.testing.assert_allclose(session.run(None, inputs)[0], want, rtol=1e-5, atol=1e-6)
    assert [value.name for value in session.get_inputs()] == ["x"]


def test_models_are_timed_side_by_side() -> None:
    analysis = analyse_model(graphs.transformer())
    models = [TimedModel(analysis.original, sample_inputs(analysis))] * 3
    calls: list[tuple[int, int]] = []
    times = local_timer(1, seconds=0.01)(models, lambda *at: calls.append(at))
    assert times.shape[1] == 3 and (times > 0).all() and calls[-1] == (len(times), len(times))
