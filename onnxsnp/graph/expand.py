"""Fused operators spelled out in plain ONNX operators, so that the rules need not know them.

onnxruntime's optimised files, and the tools around it, hold operators that stand for several (`com.microsoft`, and a
few that it puts into ONNX's own domain before ONNX had them). Each is replaced by what it computes; what then follows
(axes, groups, cuts, refits) sees an ordinary graph. onnxruntime fuses most of them again when it loads the cut file.
A variant that cannot be spelled out, such as one with a key/value cache, stays, and the graph says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto, helper

from onnxsnp.graph import fused_attention as attention
from onnxsnp.graph.ir import Graph, Namer, attribute
from onnxsnp.graph.precision import BRAIN, element_types
from onnxsnp.graph.writer import LeftAloneError, Writer

_MICROSOFT = "com.microsoft"


def expand(graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Replace fused operators in place; `Graph.unexpanded` gets the reasons of those that stay.

    Args:
        shapes: size of every tensor.

    Returns:
        The types of the operators that were replaced.
    """
    rules = {node.name: _expansion(node, graph.opset, shapes) for node in graph.nodes}
    fused = [node for node in graph.nodes if rules[node.name] is not None]
    if not fused:
        return []
    types = _float_types(graph, fused)
    namer = Namer(graph.names())
    nodes: list[NodeProto] = []
    done: list[str] = []
    for node in graph.nodes:
        rule = rules[node.name]
        if rule is None:
            nodes.append(node)
            continue
        writer = Writer(graph, node, shapes, types[node.name], namer)
        try:
            rule(writer)
        except LeftAloneError as error:
            graph.unexpanded[node.name] = str(error)
            nodes.append(node)
        else:
            graph.weights.update(writer.weights)
            nodes.extend(writer.nodes)
            done.append(node.op_type)
    graph.nodes = nodes
    graph.drop_dead()
    return sorted(set(done))


_Expansion = Callable[[Writer], None]


def _expansion(node: NodeProto, opset: int, shapes: Mapping[str, tuple[int, ...]]) -> _Expansion | None:
    """What spells a node out; None where it is plain already, or unknown."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    if opset >= _STANDARD_SINCE.get((domain, node.op_type), 1_000):
        return None
    if (domain, node.op_type) == ("", "GlobalAveragePool") and len(shapes.get(node.input[0], ())) == 3:
        return _mean  # of an image it is a rule's; over one axis, a normalisation's mean
    if domain == "com.microsoft.nchwc":
        return _laid_out
    return EXPANSIONS.get((domain, node.op_type))


def _float_types(graph: Graph, nodes: list[NodeProto]) -> dict[str, np.dtype]:
    """Element type of the first floating-point input of each node, which is that of the constants it hides."""
    declared = {value.name: value.type.tensor_type.elem_type for value in graph.shell.graph.input}
    known: dict[str, np.dtype] = {
        name: np.dtype(helper.tensor_dtype_to_np_dtype(kind)) for name, kind in declared.items()
    }
    known |= {name: array.dtype for name, array in graph.weights.items()}
    asked = sorted({name for node in nodes for name in node.input if name and name not in known})
    if graph.brain:  # sessions would say single precision; what inference does not know is what the rest is
        typed = element_types(graph.skeleton())
        known |= {name: typed.get(name, BRAIN) for name in asked}
    elif asked:
        session = graph.session(asked, optimize=False)
        for value in session.get_outputs():
            known[value.name] = _RUNTIME_TYPES.get(value.type, np.dtype(np.int64))
    return {
        node.name: next((known[name] for name in node.input if name and known[name].kind not in "iub"), np.dtype("f4"))
        for node in nodes
    }


_RUNTIME_TYPES: dict[str, np.dtype] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(double)": np.dtype(np.float64),
}


def _laid_out(w: Writer) -> None:
    raise LeftAloneError("onnxruntime laid it out for the machine it ran on; prune the file from before that")


# ------------------------------------------------------------------------------------------------- products and biases


def _fused_matmul(w: Writer) -> None:
    """FusedMatMul and TransposeMatMul: alpha · A' B', with either operand transposed.

    `trans` swaps the axes of the matrix; with `transBatch` one of them, the first axis, lies in front of the batch.
    """
    operands = []
    for slot, mark in enumerate("AB"):
        name = w.node.input[slot]
        rank = len(w.shapes[name])
        swapped, apart = (attribute(w.node, f"{which}{mark}", 0) for which in ("trans", "transBatch"))
        batch, matrix = list(range(rank - 2)), [rank - 2, rank - 1]
        if apart:
            batch, matrix = list(range(1, rank - 1)), [0, rank - 1]
        order = batch + (matrix[::-1] if swapped else matrix)
        operands.append(name if rank < 2 or order == sorted(order) else w.add("Transpose", name, perm=order))
    alpha = attribute(w.node, "alpha", 1.0)
    if alpha == 1.0:
        w.add("MatMul", *operands, into=w.node.output[0])
    else:
        w.add("Mul", w.add("MatMul", *operands), w.number(alpha), into=w.node.output[0])


def _fused_gemm(w: Writer) -> None:
    plain = {mark: attribute(w.node, mark) for mark in ("alpha", "beta", "transA", "transB")}
    product = {mark: value for mark, value in plain.items() if value is not None}
    settings = [attribute(w.node, mark) for mark in ("activation_alpha", "activation_beta", "activation_gamma")]
    _activated(w, w.add("Gemm", *w.node.input, **product), [value for value in settings if value is not None])


def _fused_conv(w: Writer) -> None:
    """FusedConv: a convolution, then the sum with a fourth input, then an activation."""
    kept = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")
    settings = {mark: attribute(w.node, mark) for mark in kept if attribute(w.node, mark) is not None}
    result = w.add("Conv", *w.node.input[:3], **settings)
    if w.given(3):
        result = w.add("Add", result, w.node.input[3])
    _activated(w, result, list(attribute(w.node, "activation_params") or []))


_ACTIVATIONS = {
    "Clip": (),  # before opset 11 an attribute, since then inputs
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}


def _activated(w: Writer, tensor: str, settings: list[float]) -> None:
    name = (attribute(w.node, "activation") or b"").decode()
    if name not in _ACTIVATIONS or (name == "Clip" and w.opset < 11):
        raise LeftAloneError(f"its activation is '{name}'")
    if name == "Clip":
        w.add("Clip", tensor, *map(w.number, settings), into=w.node.output[0])
    else:
        w.add(name, tensor, into=w.node.output[0], **dict(zip(_ACTIVATIONS[name], settings, strict=False)))


# --------------------------------------------------------------------------------------------------------- activations


def _gelu(w: Writer) -> None:
    """Gelu and BiasGelu: x Φ(x)."""
    w.gelu(_biased(w), into=w.node.output[0])


def _fast_gelu(w: Writer) -> None:
    """FastGelu: the approximation with tanh."""
    w.gelu(_biased(w), tanh=True, into=w.node.output[0])


def _biased(w: Writer) -> str:
    return w.add("Add", w.node.input[0], w.node.input[1]) if w.given(1) else w.node.input[0]


def _quick_gelu(w: Writer) -> None:
    """QuickGelu: x σ(α x)."""
    data, alpha = w.node.input[0], attribute(w.node, "alpha", 1.702)
    scaled = data if alpha == 1.0 else w.add("Mul", data, w.number(alpha))
    w.add("Mul", data, w.add("Sigmoid", scaled), into=w.node.output[0])


# ------------------------------------------------------------------------------------------------------ normalisations


def _mean(w: Writer) -> None:
    """GlobalAveragePool over the last of three axes."""
    w.mean(w.node.input[0], into=w.node.output[0])


def _layer_norm(w: Writer) -> None:
    """LayerNormalization in a file of an opset that did not have it yet."""
    rank = len(w.shapes[w.node.input[0]])
    _only_output(w, 0)
    if attribute(w.node, "axis", -1) % rank != rank - 1:
        raise LeftAloneError("it runs over several axes")
    beta = w.node.input[2] if w.given(2) else ""
    w.layer_norm(w.node.input[0], w.node.input[1], beta, attribute(w.node, "epsilon", 1e-5), into=w.node.output[0])


def _rms_norm(w: Writer) -> None:
    """SimplifiedLayerNormalization: x / RMS(x) · γ."""
    rank = len(w.shapes[w.node.input[0]])
    _only_output(w, 0)
    if attribute(w.node, "axis", -1) % rank != rank - 1:
        raise LeftAloneError("it runs over several axes")
    w.rms_norm(w.node.input[0], w.node.input[1], attribute(w.node, "epsilon", 1e-5), into=w.node.output[0])


def _skip_layer_norm(w: Writer) -> None:
    """LayerNorm(input + bias + skip), and the sum itself as fourth output."""
    beta = w.node.input[3] if w.given(3) else ""
    total = _skip_sum(w, 4)
    w.layer_norm(total, w.node.input[2], beta, attribute(w.node, "epsilon", 1e-12), into=w.node.output[0])


def _skip_rms_norm(w: Writer) -> None:
    """The same with x / RMS(x) · γ."""
    total = _skip_sum(w, 3)
    w.rms_norm(total, w.node.input[2], attribute(w.node, "epsilon", 1e-12), into=w.node.output[0])


def _skip_sum(w: Writer, bias: int) -> str:
    _only_output(w, 0, 3)
    data = w.add("Add", w.node.input[0], w.node.input[bias]) if w.given(bias) else w.node.input[0]
    return w.add("Add", data, w.node.input[1], into=w.output(3))


def _embed_layer_norm(w: Writer) -> None:
    """LayerNorm(word + position + segment embedding); the length of each sequence; the sum."""
    ids, segments, words, positions, table, gamma, beta, mask, places = [*w.node.input] + [""] * (9 - len(w.node.input))
    if not places:
        count = w.size_of(ids, 1)
        places = w.add("Range", w.whole(0), count, w.whole(1))
    total = w.add("Add", w.add("Gather", words, ids, axis=0), w.add("Gather", positions, places, axis=0))
    if segments and table:
        total = w.add("Add", total, w.add("Gather", table, segments, axis=0))
    if w.output(2):
        w.add("Identity", total, into=w.output(2))
    w.layer_norm(total, gamma, beta, attribute(w.node, "epsilon", 1e-12), into=w.node.output[0])
    if w.output(1):
        one = w.integers([1], np.int32)
        shown = w.add("Equal", w.cast(mask, np.int32), one) if mask else ""
        count = w.cast(shown, np.int32) if mask else w.add("Mul", w.cast(ids, np.int32), w.integers([0], np.int32))
        w.reduce_sum(count, 1, into=w.output(1))


def _only_output(w: Writer, *used: int) -> None:
    """Statistics that a normalisation gives besides are for training."""
    if any(name and slot not in used for slot, name in enumerate(w.node.output)):
        raise LeftAloneError("its statistics are read too")


# ------------------------------------------------------------------------------------------------------------ the list

EXPANSIONS: dict[tuple[str, str], _Expansion] = {
    ("", "LayerNormalization"): _layer_norm,
    ("", "RotaryEmbedding"): attention.standard_rotary,
    ("", "SimplifiedLayerNormalization"): _rms_norm,
    (_MICROSOFT, "Attention"): attention.packed,
    (_MICROSOFT, "BiasGelu"): _gelu,
    (_MICROSOFT, "EmbedLayerNormalization"): _embed_layer_norm,
    (_MICROSOFT, "FastGelu"): _fast_gelu,
    (_MICROSOFT, "FusedConv"): _fused_conv,
    (_MICROSOFT, "FusedGemm"): _fused_gemm,
    (_MICROSOFT, "FusedMatMul"): _fused_matmul,
    (_MICROSOFT, "Gelu"): _gelu,
    (_MICROSOFT, "GroupQueryAttention"): attention.grouped,
    (_MICROSOFT, "MultiHeadAttention"): attention.separate,
    (_MICROSOFT, "QuickGelu"): _quick_gelu,
    (_MICROSOFT, "RotaryEmbedding"): attention.rotary,
    (_MICROSOFT, "SkipLayerNormalization"): _skip_layer_norm,
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_rms_norm,
    (_MICROSOFT, "TransposeMatMul"): _fused_matmul,
}

_STANDARD_SINCE = {("", "LayerNormalization"): 17}
