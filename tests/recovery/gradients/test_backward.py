"""Whole models: gradients of every parameter, and what happens where one cannot pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxsnp.model import load
from onnxsnp.recovery.gradients.backward import Backward, backward_graph
from onnxsnp.recovery.gradients.static import Static, static_graph

FOLDER = Path(__file__).parents[2] / "exports" / "families"


def inputs_of(name: str) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(0), {}
    for tensor, spec in json.loads((FOLDER / f"{name}.json").read_text())["inputs"].items():
        shape = spec["shape"]
        array: Any = rng.integers(0, spec["below"], shape) if "below" in spec else rng.standard_normal(shape)
        found[tensor] = np.asarray(np.ones(shape) if spec.get("mask") else array).astype(spec["type"])
    return found


def differentiated(name: str) -> tuple[Static, Backward, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The model, its backward graph for random gradients of the outputs, inputs, and those gradients by output."""
    inputs = inputs_of(name)
    static = static_graph(load(FOLDER / f"{name}.onnx"), {tensor: array.shape for tensor, array in inputs.items()})
    inputs = {tensor: array.astype("f4") if array.dtype.kind == "f" else array for tensor, array in inputs.items()}
    rng = np.random.default_rng(1)
    seeds = {output: rng.standard_normal(static.shapes[output], np.float32) for output in static.graph.outputs}
    built = backward_graph(
        static.graph, static.shapes, {output: f"seed {output}" for output in seeds}, static.parameters
    )
    shell = onnx.ModelProto()
    shell.CopyFrom(built.graph.shell)
    for output, seed in seeds.items():
        shell.graph.input.append(helper.make_tensor_value_info(f"seed {output}", 1, seed.shape))
    built.graph.shell = shell
    return static, built, inputs, seeds


@pytest.mark.parametrize(
    "name",
    [
        "format_half_vit",  # half precision is trained in single
        "format_keras_vit",
        "format_onnx24_decoder",  # Attention, RotaryEmbedding, RMSNormalization, Swish
        "format_ort_transformers_bert",  # onnxruntime's fused operators
        "hf_clip_ts17_dyn",
        "maxvit_torchvision_ts17",
        "swin_timm_dynamo18_dyn",
        "timm_xcit_ts17_dyn",
    ],
)
def test_gradients_of_whole_models_are_slopes(name: str) -> None:
    static, built, inputs, seeds = differentiated(name)
    assert not built.stops
    asked = list(built.gradients.values())
    feeds = {**inputs, **{f"seed {output}": seed for output, seed in seeds.items()}}
    found = dict(zip(built.gradients, built.graph.session(asked, threads=1).run(asked, feeds), strict=True))
    session = static.graph.session(list(seeds), feed=list(found), threads=1)
    rng = np.random.default_rng(2)
    ways = {key: rng.standard_normal(array.shape) * static.graph.weights[key].std() for key, array in found.items()}

    def loss(step: float) -> float:
        moved = {key: (static.graph.weights[key] + step * way).astype(np.float32) for key, way in ways.items()}
        results = session.run(list(seeds), inputs, moved)
        return sum(float(np.vdot(result.astype(float), seeds[key])) for key, result in zip(seeds, results, strict=True))

    parts = [float(np.vdot(found[key].astype(float), way)) for key, way in ways.items()]
    slope = (loss(2e-4) - loss(-2e-4)) / 4e-4
    assert sum(parts) == pytest.approx(slope, abs=5e-3 * float(np.linalg.norm(parts)))
    assert float(np.linalg.norm(parts)) > 0.1


def test_an_operator_without_a_rule_is_named_and_what_is_behind_it_is_trained() -> None:
    _, built, _, _ = differentiated("format_ort_cache_decoder")
    assert len(built.stops) == 2
    assert all(reason.endswith("com.microsoft.GroupQueryAttention") for reason in built.stops.values())
    assert all("GroupQueryAttention" in reason for reason in built.missing.values())
    assert {"layers.1.out.weight", "layers.1.query.weight"} <= built.gradients.keys() | built.missing.keys()
    assert built.gradients
    assert built.missing
    assert not built.gradients.keys() & built.missing.keys()


def test_a_parameter_that_no_gradient_reaches_says_why() -> None:
    _, built, _, _ = differentiated("maxvit_torchvision_ts17")
    assert built.missing
    assert all("running" in name and "BatchNormalization" in reason for name, reason in built.missing.items())
