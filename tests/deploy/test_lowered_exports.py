"""Every export, lowered for every target: nothing that its importer refuses, a valid file, the same outputs."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from one_node import assert_imported
from onnx import TensorProto

from onnxsnp.deploy.lint import lint
from onnxsnp.deploy.lower import emitted_opset, lower
from onnxsnp.deploy.parity import parity
from onnxsnp.deploy.targets import BUILT_IN
from onnxsnp.errors import ModelError
from onnxsnp.model import load

FOLDER = Path(__file__).resolve().parent.parent / "exports"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*.onnx"))
# one of each pair of release and opset; the others have the same rules
TARGETS = ("jetson-nano", "jetson-xavier", "tensorrt-8.6", "jetson-orin")
CASES = [
    (name, target)
    for number, name in enumerate(FILES)
    for target in TARGETS
    if target in ("jetson-nano", "jetson-orin") or number % 2 == (target == "tensorrt-8.6")
]
# what cannot be lowered: file, and what lint says of which operators
REFUSED = {
    # caches belong to the model's callers, and no ONNX operator updates them in place
    "families/format_ort_cache_decoder.onnx": {("GroupQueryAttention", "domain")},
    # integers that are made at run time from floating-point numbers; TensorRT has QuantizeLinear with fixed scales
    "families/format_dynamic_quantised_bert.onnx": {
        ("DynamicQuantizeLinear", "operator"),
        ("MatMulInteger", "operator"),
        ("DequantizeLinear", "element-type"),
        ("DequantizeLinear", "quantise-type"),
        ("DequantizeLinear", "quantise-zero"),
        ("Gather", "element-type"),
    },
    # asymmetric: zero points that are not 0
    "families/format_static_quantised_vit.onnx": {
        ("QuantizeLinear", "quantise-zero"),
        ("DequantizeLinear", "quantise-zero"),
        ("DequantizeLinear", "element-type"),
        ("DequantizeLinear", "quantise-type"),
        ("Conv", "constant-input"),
    },
}
WHOLE = "families/format_branch_vit.onnx"  # an If on what the image holds


@functools.cache
def feeds(name: str) -> dict[str, np.ndarray]:
    """Inputs that fit, one sample where the batch is free."""
    rng = np.random.default_rng(len(name))
    described = (FOLDER / name).with_suffix(".json")
    specs = json.loads(described.read_text()) if "families" in name else {"inputs": {}, "dynamic_batch": False}
    found = {}
    for value in load(FOLDER / name).proto.graph.input:
        spec = specs["inputs"].get(value.name, {})
        kind = value.type.tensor_type
        shape = list(spec.get("shape") or [dim.dim_value or 1 for dim in kind.shape.dim])
        shape[0] = 1 if specs["dynamic_batch"] else shape[0]
        array = rng.integers(0, spec["below"], shape) if "below" in spec else rng.standard_normal(shape)
        if spec.get("mask"):
            array = np.ones(shape)
            array[..., -1] = 0
        found[value.name] = np.asarray(array).astype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return found


@pytest.mark.parametrize(("name", "target"), CASES, ids=[f"{Path(name).stem}-{target}" for name, target in CASES])
def test_a_lowered_export_is_taken_and_computes_the_same(name: str, target: str) -> None:
    profile, inputs = BUILT_IN[target], feeds(name)
    sizes = {key: array.shape for key, array in inputs.items()}
    if name == WHOLE:
        with pytest.raises(ModelError, match="If runs other operators as its inputs' values say"):
            lower(FOLDER / name, profile, input_shapes=sizes)
        return
    lowered = lower(FOLDER / name, profile, input_shapes=sizes).proto
    onnx.checker.check_model(lowered, full_check=True)
    assert lowered.opset_import[0].version == emitted_opset(profile)
    assert all(dim.dim_value > 0 for value in [*lowered.graph.input, *lowered.graph.output] for dim in _dims(value))
    errors = Counter((one.op, one.rule) for one in lint(lowered, profile) if one.severity == "error")
    assert errors.keys() <= REFUSED.get(name, set()), errors
    assert bool(errors) == (name in REFUSED)
    found = parity(FOLDER / name, lowered, inputs)
    assert found.passed, found
    if target == "jetson-orin" and name not in REFUSED:  # its importer is close to the one that can be had here
        assert_imported(lowered)


@pytest.mark.parametrize("name", FILES[::3], ids=[Path(name).stem for name in FILES[::3]])
def test_an_export_in_half_precision_is_valid_and_close(name: str) -> None:
    inputs = feeds(name)
    sizes = {key: array.shape for key, array in inputs.items()}
    if name == WHOLE or name in REFUSED:
        pytest.skip("cannot be lowered")
    lowered = lower(FOLDER / name, BUILT_IN["rtx"], precision="fp16", input_shapes=sizes).proto
    onnx.checker.check_model(lowered, full_check=True)
    assert TensorProto.FLOAT16 in {tensor.data_type for tensor in lowered.graph.initializer}
    found = parity(FOLDER / name, lowered, inputs, "fp16")
    assert found.passed, found
    assert_imported(lowered)


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


def test_the_exceptions_are_files_that_are_there() -> None:
    assert {*REFUSED, WHOLE} <= set(FILES)
