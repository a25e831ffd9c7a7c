"""Normalisations spelled out where the importer has no layer for them."""

from __future__ import annotations

from math import prod

from onnxsnp.deploy.lowering.site import Rule, Site


def layer_normalization(s: Site) -> str | None:
    """(x − E x) / √(Var x + ε) · γ + β over the last axes (arXiv 1607.06450, eq. 4).

    TensorRT 8.6 and later has a layer of its own, which computes in single precision at fp16 too; it gives one output.
    """
    extra = any(s.output(slot) for slot in (1, 2))
    if s.takes("LayerNormalization") and not extra:
        return None
    axes = list(range(s.attr("axis", -1) % s.rank(), s.rank()))
    mean = s.reduce("ReduceMean", s.data, axes, into=s.output(1))
    centred = s.add("Sub", s.data, mean)
    variance = s.reduce("ReduceMean", s.add("Mul", centred, centred), axes)
    deviation = s.add("Sqrt", s.add("Add", variance, s.number(s.attr("epsilon", 1e-5))))
    if s.output(2):
        s.add("Div", s.number(1.0), deviation, into=s.output(2))
    _scaled(s, s.add("Div", centred, deviation))
    return "the importer has no LayerNormalization" if not extra else "its statistics are read too"


def rms_normalization(s: Site) -> str | None:
    """x / √(E x² + ε) · γ over the last axes (arXiv 1910.07467, eq. 4)."""
    if s.takes(s.node.op_type):
        return None
    axes = list(range(s.attr("axis", -1) % s.rank(), s.rank()))
    square = s.reduce("ReduceMean", s.add("Mul", s.data, s.data), axes)
    deviation = s.add("Sqrt", s.add("Add", square, s.number(s.attr("epsilon", 1e-5))))
    _scaled(s, s.add("Div", s.data, deviation))
    return "the importer has no RMSNormalization"


def _scaled(s: Site, unit: str) -> None:
    """Times the second input, plus the third where there is one."""
    if s.given(2):
        s.add("Add", s.add("Mul", unit, s.node.input[1]), s.node.input[2], into=s.output_name)
    else:
        s.add("Mul", unit, s.node.input[1], into=s.output_name)


def group_normalization(s: Site) -> str | None:
    """The statistics of groups of channels; scale and bias per group up to opset 20, per channel from 21 on.

    The versions differ in what the scale is, and importers in which of them they read; so it is always spelled out.
    """
    sizes, groups = s.shape(), int(s.attr("num_groups", 1))
    batch, channels = sizes[0], sizes[1]
    grouped = s.reshape(s.data, [batch, groups, prod(sizes[1:]) // groups])
    centred = s.add("Sub", grouped, s.reduce("ReduceMean", grouped, [2]))
    variance = s.reduce("ReduceMean", s.add("Mul", centred, centred), [2])
    deviation = s.add("Sqrt", s.add("Add", variance, s.number(s.attr("epsilon", 1e-5))))
    unit = s.add("Div", centred, deviation)
    per_group = s.source < 21
    spread = [1, groups, 1] if per_group else [1, channels, *[1] * (len(sizes) - 2)]
    if not per_group:
        unit = s.reshape(unit, sizes)
    factors = [s.reshape(name, spread) for name in s.node.input[1:3]]
    result = s.add("Add", s.add("Mul", unit, factors[0]), factors[1], into="" if per_group else s.output_name)
    if per_group:
        s.reshape(result, sizes, into=s.output_name)
    return "importers differ in what its scale is"


def mean_variance_normalization(s: Site) -> str | None:
    """(x − E x) / √(Var x + 1e-9), the constant as in ONNX's own function body."""
    if s.takes("MeanVarianceNormalization"):
        return None
    axes = s.attr("axes", [0, 2, 3])
    centred = s.add("Sub", s.data, s.reduce("ReduceMean", s.data, axes))
    deviation = s.add("Sqrt", s.reduce("ReduceMean", s.add("Mul", centred, centred), axes))
    s.add("Div", centred, s.add("Add", deviation, s.number(1e-9)), into=s.output_name)
    return "the importer has no MeanVarianceNormalization"


def batch_normalization(s: Site) -> str | None:
    """Outputs and attributes of training are not there when a model runs."""
    if s.attr("training_mode", 0) or len([name for name in s.node.output if name]) > 1:
        return None
    s.emit("BatchNormalization", s.node.input[:5], [s.output_name], s.node.name, epsilon=s.attr("epsilon", 1e-5))
    return "without what is for training"


def instance_normalization(s: Site) -> str | None:
    """Statistics of each channel of each sample, where scale and bias are computed, or the rank is not 3 to 5.

    InstanceNormalization of TensorRT 8.2 to 8.5 is a plugin which needs both as initializers.
    """
    if s.target.tensorrt >= (8, 6) or (s.value(1) is not None and s.value(2) is not None and 3 <= s.rank() <= 5):
        return None
    axes = list(range(2, s.rank()))
    centred = s.add("Sub", s.data, s.reduce("ReduceMean", s.data, axes))
    variance = s.reduce("ReduceMean", s.add("Mul", centred, centred), axes)
    unit = s.add("Div", centred, s.add("Sqrt", s.add("Add", variance, s.number(s.attr("epsilon", 1e-5)))))
    spread = [1, s.shape()[1], *[1] * len(axes)]
    factors = [s.reshape(name, spread) for name in s.node.input[1:3]]
    s.add("Add", s.add("Mul", unit, factors[0]), factors[1], into=s.output_name)
    return "the importer takes it with constant scale and bias only"


RULES: dict[str, Rule] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
    "SimplifiedLayerNormalization": rms_normalization,
}
