"""Q/DQ models: constants in the form that importers read. What is asymmetric stays, and `lint` names it."""

from __future__ import annotations

import numpy as np

from onnxsnp.deploy.lowering.site import Rule, Site


def _dequantise(s: Site) -> str | None:
    """Weights are single precision, with QuantizeLinear in front where they are symmetric INT8.

    INT8 constants are read from TensorRT 10 on. A bias in INT32, and what is asymmetric, TensorRT does not dequantise
    at all: those become the numbers that they stand for, and what they are multiplied with is computed as such.
    """
    data, scale, zero = s.value(0), s.value(1), s.value(2)
    if data is None or scale is None or (s.given(2) and zero is None) or s.attr("block_size", 0):
        return _with_zero(s)
    axis = s.attr("axis", 1)
    spread = [1] * data.ndim
    if scale.size > 1:
        spread[axis] = scale.size
    offset = np.zeros(spread, np.int64) if zero is None else zero.astype(np.int64).reshape(spread)
    numbers = ((data.astype(np.int64) - offset) * scale.astype(np.float64).reshape(spread)).astype(np.float32)
    held = s.constant(numbers)
    if data.dtype != np.int8 or offset.any():
        s.alias = held
        return "it stands for constant numbers that TensorRT does not dequantise"
    if s.target.tensorrt >= (10,):
        return _with_zero(s)
    nought = s.constant(np.zeros(scale.shape, np.int8))
    settings = s.settings("output_dtype", "block_size")
    quantised = s.add("QuantizeLinear", held, s.node.input[1], nought, **settings)
    s.emit("DequantizeLinear", [quantised, s.node.input[1], nought], [s.output_name], s.node.name, **settings)
    return "importers below 10 read no INT8 constants"


def _with_zero(s: Site) -> str | None:
    """A zero point where there is none: importers below 10 ask for three inputs."""
    scale = s.value(1)
    if s.given(2) or scale is None or s.dtype() != np.int8 or s.target.tensorrt >= (10,):
        return None
    s.again(*s.node.input[:2], s.constant(np.zeros(scale.shape, np.int8)), **s.settings())
    return "importers below 10 ask for a zero point"


RULES: dict[str, Rule] = {"DequantizeLinear": _dequantise}
