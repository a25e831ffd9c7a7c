"""Checks of single operators, by operator; each cites the importer code that it comes from.

File names are those of github.com/onnx/onnx-tensorrt: builtin_op_importers.cpp and onnx2trt_utils.cpp of the branches
8.2-GA, 8.4-GA, 8.5-GA and 8.6-GA, onnxOpImporters.cpp of 10.0-GA and 10.1-GA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from onnxsnp.deploy.targets import Target, Version
from onnxsnp.graph.ir import attribute

LOWER = "lower the model for the target (onnxsnp engine does)"


@dataclass(frozen=True)
class Place:
    """What is known around a node: opset, target, sizes (-1 where free), element types, constants, makers."""

    opset: int
    target: Target
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, np.dtype]
    held: Mapping[str, TensorProto]
    makers: Mapping[str, str]

    @property
    def version(self) -> Version:
        return self.target.tensorrt

    def rank(self, node: NodeProto, slot: int = 0) -> int | None:
        """Number of axes of an input; None where it is not known."""
        shape = self.shapes.get(node.input[slot]) if given(node, slot) else None
        return None if shape is None else len(shape)

    def value(self, node: NodeProto, slot: int) -> np.ndarray | None:
        """What an input always holds; None where it is computed."""
        tensor = self.held.get(node.input[slot]) if given(node, slot) else None
        return None if tensor is None else numpy_helper.to_array(tensor)

    def computed(self, node: NodeProto, slot: int) -> bool:
        """Whether there is an input which is no constant."""
        return given(node, slot) and node.input[slot] not in self.held


@dataclass(frozen=True)
class Problem:
    """What is wrong with a node; see `onnxsnp.deploy.lint.Finding`."""

    rule: str
    message: str
    remedy: str
    warning: bool = False


Check = Callable[[NodeProto, Place], Iterator[Problem]]


def given(node: NodeProto, slot: int) -> bool:
    """Whether a node has an input there."""
    return len(node.input) > slot and bool(node.input[slot])


def _constant(slot: int, what: str, until: Version | None = None) -> Check:
    """An input that has to be a constant, up to a release that no longer asks for it."""

    def check(node: NodeProto, place: Place) -> Iterator[Problem]:
        if place.computed(node, slot) and (until is None or place.version < until):
            message = f"its {what} are computed, and the importer takes them as a constant only"
            yield Problem("constant-input", message, f"{LOWER}; give fixed sizes where they depend on sizes")

    return check


def _kernel(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Conv: weights that are no initializer are read behind DequantizeLinear; any from 8.5 on (docs/operators.md)."""
    if place.computed(node, 1) and place.makers.get(node.input[1]) != "DequantizeLinear" and place.version < (8, 5):
        yield Problem("constant-input", "its weights are computed, and this importer takes constants", "use MatMul")


def _reduce_axes(node: NodeProto, place: Place) -> Iterator[Problem]:
    """onnx2trt_utils.cpp, reduceTensor, up to 8.6: without the attribute `axes` it reduces over all of them."""
    if place.version >= (10,) or not given(node, 1):
        return
    rank, axes = place.rank(node), place.value(node, 1)
    if axes is not None and rank is not None and len({int(axis) % rank for axis in axes.reshape(-1)}) == rank:
        return  # all axes it is
    message = "has its axes as an input, which this importer ignores: it silently reduces over ALL axes"
    yield Problem("reduce-axes", message, LOWER)


def _noop_axes(node: NodeProto, place: Place) -> Iterator[Problem]:
    """No importer reads `noop_with_empty_axes` (onnx2trt_utils.cpp, importerUtils.cpp: reduceTensor, up to 10.1)."""
    axes = place.value(node, 1)
    empty = not given(node, 1) or (axes is not None and not axes.size)
    if attribute(node, "noop_with_empty_axes", 0) and empty:
        message = (
            "reduces over no axis (noop_with_empty_axes), which this importer ignores: it silently reduces over ALL"
        )
        yield Problem("reduce-noop", message, LOWER)


def _allowzero(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Reshape of 8.2: attrs.get<int>("allowzero") without a default from opset 14 on."""
    if place.version < (8, 4) and place.opset >= 14 and attribute(node, "allowzero") is None:
        message = "has no attribute allowzero, without which this importer throws from opset 14 on"
        yield Problem("reshape-allowzero", message, LOWER)


def _shape_range(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Shape up to 8.6 reads neither `start` nor `end`."""
    cut = attribute(node, "start", 0) or attribute(node, "end") is not None
    if place.version < (10,) and cut:
        message = "asks for some of the sizes (start, end), which this importer ignores: it silently gives all of them"
        yield Problem("shape-range", message, LOWER)


def _einsum(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Einsum up to 8.6: letters a to z; no ellipsis, diagonal or broadcast (docs/operators.md)."""
    if place.version >= (10,):
        return
    equation = (attribute(node, "equation") or b"").decode().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    sizes: dict[str, set[int]] = {}
    for term, name in zip(terms, node.input, strict=False):
        for letter, size in zip(term, place.shapes.get(name, ()), strict=False):
            sizes.setdefault(letter, set()).add(size)
    reasons = {
        "letters other than a to z": any(not (one.islower() or one in "->,.") for one in equation),
        "an ellipsis": "..." in equation,
        "a diagonal": any(len(set(term)) < len(term) for term in terms if "..." not in term),
        "a broadcast": "..." not in equation and any(len(found - {-1}) > 1 for found in sizes.values()),
    }
    for what, broken in reasons.items():
        if broken:
            yield Problem("einsum", f"'{equation}' has {what}, which this importer does not take", LOWER)


def _resize(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Resize: cubic from 8.5 on; no antialiasing, no aspect ratio policy but stretch; five ways of coordinates."""
    mode = (attribute(node, "mode") or b"nearest").decode()
    way = (attribute(node, "coordinate_transformation_mode") or b"half_pixel").decode()
    policy = (attribute(node, "keep_aspect_ratio_policy") or b"stretch").decode()
    ways = ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners")
    reasons = []
    if mode == "cubic" and place.version < (8, 5):
        reasons.append("cubic interpolation")
    if way not in ways:
        reasons.append(f"the coordinates {way}")
    if attribute(node, "antialias", 0):
        reasons.append("antialiasing")
    if policy != "stretch":
        reasons.append(f"the aspect ratio policy {policy}")
    for what in reasons:
        yield Problem(
            "resize", f"has {what}, which this importer does not take", "resize before the model, or otherwise"
        )


def _pad(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Pad: the mode wrap from 10.0 on; axes (opset 18) up to 8.4 are not read."""
    mode = (attribute(node, "mode") or b"constant").decode()
    if mode == "wrap" and place.version < (10,):
        yield Problem("pad-mode", "pads by wrapping around, which this importer does not take", "pad otherwise")
    if given(node, 3) and place.version < (8, 5):
        message = "has axes as an input, which this importer ignores: it silently pads other axes"
        yield Problem("pad-axes", message, LOWER)


def _pool(node: NodeProto, place: Place) -> Iterator[Problem]:
    """poolingHelper takes images and volumes; a list of positions comes with indices, which it does not give."""
    rank = place.rank(node)
    if rank is not None and rank not in (4, 5):
        yield Problem("pool-rank", f"pools over {rank - 2} axes, and the importer pools over 2 or 3", LOWER)
    if len([name for name in node.output if name]) > 1:
        yield Problem("pool-indices", "gives indices too, which the importer does not", "use the maximum alone")
    spread = attribute(node, "dilations")
    if spread and any(one != 1 for one in spread):
        yield Problem("pool-dilations", "is dilated, which the importer does not take", "use a pool without gaps")


def _only_first(node: NodeProto, place: Place) -> Iterator[Problem]:
    """LayerNormalization gives its first output only (docs/operators.md of 10.1)."""
    if len([name for name in node.output if name]) > 1:
        yield Problem("outputs", "gives statistics too, which the importer does not", LOWER)


def _trilu(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Trilu of 8.5 takes 2 or 3 axes; any number from 8.6 on (changelog)."""
    rank = place.rank(node)
    if rank is not None and rank > 3 and place.version < (8, 6):
        yield Problem("trilu-rank", f"is over {rank} axes, and this importer takes 2 or 3", LOWER)


def _gemm(node: NodeProto, place: Place) -> Iterator[Problem]:
    """Gemm: "GEMM must have 2D inputs"."""
    for slot in (0, 1):
        if place.rank(node, slot) not in (2, None):
            yield Problem("gemm-rank", "takes matrices only", "use MatMul")


def _top_k(node: NodeProto, place: Place) -> Iterator[Problem]:
    """TopK: at most 3840 (docs/operators.md of 10.1; ITopKLayer)."""
    count = place.value(node, 1)
    if count is not None and int(count.reshape(-1)[0]) > 3840:
        yield Problem("topk-size", "asks for more than 3840 entries, which TensorRT has no kernel for", "ask for fewer")


def _quantise(node: NodeProto, place: Place) -> Iterator[Problem]:
    """QuantDequantLinearHelper: symmetric INT8 with a zero point given; constant INT8 data only from 10 on."""
    zero = place.value(node, 2)
    kind = place.types.get(node.output[0] if node.op_type == "QuantizeLinear" else node.input[0])
    remedy = "quantise symmetrically to INT8, with QuantizeLinear and DequantizeLinear around each tensor"
    if not given(node, 2) and place.version < (10,):
        yield Problem("quantise-zero", "has no zero point, and this importer asks for three inputs", LOWER)
    if zero is not None and zero.astype(np.int64).any():
        yield Problem("quantise-zero", "has a zero point that is not 0, and TensorRT is symmetric", remedy)
    if kind is not None and kind in (np.uint8, np.int16, np.uint16, np.int32):
        yield Problem("quantise-type", f"quantises to {kind}, and TensorRT takes INT8", remedy)
    capability = place.target.compute_capability
    if capability is not None and capability < (6, 1):  # the first GPUs with the instruction dp4a
        message = f"{place.target.name} computes no INT8, so this has no use there and may not build"
        yield Problem("quantise-hardware", message, "use the model as it was before quantisation", warning=True)


def _scatter(node: NodeProto, place: Place) -> Iterator[Problem]:
    """ScatterND overwrites (docs/operators.md of 10.0); ScatterElements has its reduction from 10.0 on (changelog)."""
    way = (attribute(node, "reduction") or b"none").decode()
    if way != "none" and (node.op_type == "ScatterND" or place.version < (10,)):
        message = f"combines by {way}, which this importer ignores: it silently overwrites"
        yield Problem("scatter-reduction", message, "combine the numbers by other operators")


def _control(node: NodeProto, place: Place) -> Iterator[Problem]:
    message = f"{node.op_type} runs parts of the model as its inputs say, which cannot be checked here to the end"
    yield Problem("control-flow", message, "export the model with fixed sizes, or without control flow", warning=True)


def _dropout(node: NodeProto, place: Place) -> Iterator[Problem]:
    training = place.value(node, 2)
    if place.computed(node, 2) or (training is not None and training.any()):
        yield Problem("training", "is in training mode, which the importer does not take", "export in evaluation mode")


_AXES = _constant(1, "axes")
_OTHER_REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSumSquare"),
)

CHECKS: dict[str, tuple[Check, ...]] = {
    **dict.fromkeys(_OTHER_REDUCTIONS, (_reduce_axes, _noop_axes, _AXES)),
    # ReduceSum is the one whose axes 8.2 to 8.6 read from the input, from opset 13 on
    "ReduceSum": (_noop_axes, _AXES),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), (_pool,)),
    "Conv": (_kernel, _constant(2, "biases", (8, 5))),
    "ConvTranspose": (_kernel, _constant(2, "biases", (8, 5))),
    "CumSum": (_constant(1, "axis"),),
    "DequantizeLinear": (_quantise,),
    "Dropout": (_dropout,),
    "Einsum": (_einsum,),
    "Gemm": (_gemm,),
    "If": (_control,),
    "InstanceNormalization": (_constant(1, "scale", (8, 6)), _constant(2, "bias", (8, 6))),
    "LayerNormalization": (_only_first,),
    "Loop": (_control,),
    "OneHot": (_constant(1, "depth"),),
    "Pad": (_pad, _constant(3, "axes")),
    "QuantizeLinear": (_quantise,),
    "Reshape": (_allowzero,),
    "Resize": (_resize, _constant(2, "scales", (8, 5))),
    "Scan": (_control,),
    "ScatterElements": (_scatter,),
    "ScatterND": (_scatter,),
    "Shape": (_shape_range,),
    "Slice": (_constant(3, "axes", (10, 3)),),  # tensors from 10.3 on (changelog)
    "Squeeze": (_AXES,),
    "TopK": (_constant(1, "k", (8, 6)), _top_k),  # tensors from 8.6 on (changelog)
    "Trilu": (_trilu,),
    "Unsqueeze": (_AXES,),
}
