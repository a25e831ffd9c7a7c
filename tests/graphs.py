"""Small models built in code: transformers in the layouts that exporters write, and plain chains of operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxsnp.graph.precision import widen
from onnxsnp.planning.plan import GroupPlan, Plan

Size = int | str
Hook = Callable[["Net", Any], Any]
HEADS, SIZE, TOKENS, WIDTH = 2, 6, 5, 12  # of `attention`


class Net:
    """A graph under construction. `op` adds a node and returns its (first) output."""

    def __init__(self, opset: int = 17, seed: int = 0, dtype: Any = np.float32) -> None:
        self.graph = gs.Graph(opset=opset)
        self.opset, self.dtype = opset, np.dtype(dtype)
        self.rng = np.random.default_rng(seed)
        self.count = 0

    def input(self, name: str, shape: Sequence[Size], dtype: Any = None) -> gs.Variable:
        variable = gs.Variable(name, dtype or self.dtype, list(shape))
        self.graph.inputs.append(variable)
        return variable

    def output(self, tensor: gs.Variable, shape: Sequence[Size], name: str = "y", dtype: Any = None) -> None:
        """Make a tensor an output of the model, under the given name."""
        tensor.name, tensor.dtype, tensor.shape = name, dtype or self.dtype, list(shape)
        self.graph.outputs.append(tensor)

    def op(self, kind: str, *inputs: Any, outputs: int = 1, name: str | None = None, **attrs: Any) -> Any:
        self.count += 1
        name = name or f"{kind}_{self.count}"
        made = [gs.Variable(f"{name}.out{index or ''}") for index in range(outputs)]
        self.graph.nodes.append(gs.Node(kind, name, attrs, [self.tensor(item) for item in inputs], made))
        return made[0] if outputs == 1 else made

    def tensor(self, item: Any) -> Any:
        """Variables as they are, None as an omitted input, anything else as a constant."""
        if isinstance(item, gs.Variable | gs.Constant):
            return item
        if item is None:
            return gs.Variable.empty()
        array = np.asarray(item)
        array = array.astype(np.int64) if array.dtype.kind in "iu" else array.astype(self.dtype)
        self.count += 1
        return gs.Constant(f"const_{self.count}", array)

    def weight(self, name: str, *shape: int, scale: float | None = None, shift: float = 0.0) -> gs.Constant:
        fan = shape[0] if len(shape) > 1 else 4
        values = self.rng.standard_normal(shape) * (scale if scale is not None else fan**-0.5) + shift
        return gs.Constant(name, values.astype(self.dtype))

    def linear(self, x: Any, name: str, fan_in: int, fan_out: int, bias: bool = True) -> gs.Variable:
        y = self.op("MatMul", x, self.weight(f"{name}.w", fan_in, fan_out), name=f"{name}/MatMul")
        return self.op("Add", y, self.weight(f"{name}.b", fan_out), name=f"{name}/Add") if bias else y

    def reshape(self, x: Any, *sizes: int) -> gs.Variable:
        return self.op("Reshape", x, np.asarray(sizes))

    def squeeze(self, x: Any, axis: int) -> gs.Variable:
        return self.op("Squeeze", x, [axis]) if self.opset >= 13 else self.op("Squeeze", x, axes=[axis])

    def unsqueeze(self, x: Any, axis: int) -> gs.Variable:
        return self.op("Unsqueeze", x, [axis]) if self.opset >= 13 else self.op("Unsqueeze", x, axes=[axis])

    def split(self, x: Any, sizes: Sequence[int], axis: int) -> list[gs.Variable]:
        if self.opset >= 13:
            return self.op("Split", x, list(sizes), outputs=len(sizes), axis=axis)
        return self.op("Split", x, outputs=len(sizes), axis=axis, split=list(sizes))

    def mean(self, x: Any, axis: int, keepdims: int = 1) -> gs.Variable:
        if self.opset >= 18:
            return self.op("ReduceMean", x, [axis], keepdims=keepdims)
        return self.op("ReduceMean", x, axes=[axis], keepdims=keepdims)

    def norm(self, x: Any, name: str, width: int, weights: tuple[Any, Any] | None = None) -> gs.Variable:
        """LayerNormalization over the last axis; spelled out where the opset has none."""
        scale, bias = weights or (
            self.weight(f"{name}.scale", width, scale=0.2, shift=1.0),
            self.weight(f"{name}.bias", width, scale=0.2),
        )
        if self.opset >= 17:
            return self.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-5)
        centred = self.op("Sub", x, self.mean(x, -1))
        spread = self.op("Sqrt", self.op("Add", self.mean(self.op("Mul", centred, centred), -1), 1e-5))
        return self.op("Add", self.op("Mul", self.op("Div", centred, spread), scale), bias)

    def proto(self) -> onnx.ModelProto:
        """The finished, checked model."""
        self.graph.cleanup().toposort()
        model = gs.export_onnx(self.graph, ir_version=8)
        onnx.checker.check_model(model)
        return model


def transformer(
    *,
    blocks: int = 2,
    heads: int = 3,
    qk: int = 4,
    v: int = 6,
    width: int = 12,
    ffn: int = 20,
    tokens: Size = 5,
    batch: Size = "N",
    features: int = 7,
    classes: int = 5,
    qkv: str = "separate",
    reverse: bool = False,
    scale: str = "constant",
    gate: str | None = None,
    activation: str = "relu",
    qk_norm: bool = False,
    pool: str = "mean",
    shared_norm: bool = False,
    alias: bool = False,
    attention: bool = True,
    probabilities: str = "Softmax",
    opset: int = 17,
    seed: int = 0,
    dtype: Any = np.float32,
) -> onnx.ModelProto:
    """A classifier over tokens [batch, tokens, features] -> [batch, classes].

    Args:
        qkv: "separate", "packed" (5-D reshape and Gather, needs v == qk), or "flat" (one projection, Split of unequal
            sizes on the flat axis).
        reverse: scores are K Qᵀ, softmax over the second last axis, values transposed.
        scale: "constant", or "shape" (recomputed from the size of Q at run time).
        gate: None, "pair" (two projections) or "packed" (one projection and a Split).
        activation: "relu" or "gelu_tanh" (x + 0.04·x³ spelled out).
        qk_norm: LayerNormalization over the head size of Q and K.
        pool: "mean" over the tokens, "first" (a class token that is expanded to the batch at run time).
        shared_norm: every normalisation reads the same two initializers.
        alias: the same through Identity nodes.
        probabilities: operator that turns scores into weights.
    """
    net = Net(opset, seed, dtype)
    x = net.input("x", [batch, tokens, features])
    h = net.linear(x, "embed", features, width)
    if isinstance(tokens, int):
        h = net.op("Add", h, net.weight("position", 1, tokens, width), name="position/Add")
    count = tokens if isinstance(tokens, int) else 0
    if pool == "first":
        size = net.op("Gather", net.op("Shape", x), [0], axis=0)
        target = net.op("Concat", size, [1], [width], axis=0)
        h = net.op("Concat", net.op("Expand", net.weight("cls", 1, 1, width), target), h, axis=1)
        count = count + 1 if count else 0
    shared = (
        (net.weight("norm.scale", width, scale=0.2, shift=1.0), net.weight("norm.bias", width, scale=0.2))
        if shared_norm or alias
        else None
    )

    def norm(value: Any, name: str) -> gs.Variable:
        if shared is None or not alias:
            return net.norm(value, name, width, shared)
        return net.norm(value, name, width, (net.op("Identity", shared[0]), net.op("Identity", shared[1])))

    for index in range(blocks):
        scope = f"/blocks.{index}"
        if attention:
            y = _attention(
                net,
                norm(h, f"{scope}/norm1"),
                f"{scope}/attn",
                heads,
                qk,
                v,
                width,
                count,
                qkv,
                reverse,
                scale,
                qk_norm,
                probabilities,
            )
            h = net.op("Add", h, y, name=f"{scope}/Add_1")
        y = _ffn(net, norm(h, f"{scope}/norm2"), f"{scope}/mlp", width, ffn, gate, activation)
        h = net.op("Add", h, y, name=f"{scope}/Add_2")
    h = norm(h, "norm")
    h = net.op("Gather", h, 0, axis=1) if pool == "first" else net.mean(h, 1, keepdims=0)
    net.output(net.linear(h, "head", width, classes), [batch, classes])
    return net.proto()


def _attention(
    net: Net,
    x: Any,
    name: str,
    heads: int,
    qk: int,
    v: int,
    width: int,
    count: int,
    qkv: str,
    reverse: bool,
    scale: str,
    qk_norm: bool,
    probabilities: str,
) -> gs.Variable:
    def apart(value: Any, size: int) -> gs.Variable:  # -> [batch, heads, tokens, size]
        return net.op("Transpose", net.reshape(value, 0, count or 0, heads, size), perm=[0, 2, 1, 3])

    if qkv == "packed":
        both = net.linear(x, f"{name}/qkv", width, 3 * heads * qk)
        stacked = net.op("Transpose", net.reshape(both, 0, count or 0, 3, heads, qk), perm=[2, 0, 3, 1, 4])
        q, k, value = (net.op("Gather", stacked, part, axis=0) for part in range(3))
    elif qkv == "flat":
        both = net.linear(x, f"{name}/qkv", width, heads * (2 * qk + v))
        q, k, value = net.split(both, [heads * qk, heads * qk, heads * v], axis=-1)
        q, k, value = apart(q, qk), apart(k, qk), apart(value, v)
    else:
        q = apart(net.linear(x, f"{name}/q", width, heads * qk), qk)
        k = apart(net.linear(x, f"{name}/k", width, heads * qk), qk)
        value = apart(net.linear(x, f"{name}/v", width, heads * v), v)
    if qk_norm:
        q, k = net.norm(q, f"{name}/q_norm", qk), net.norm(k, f"{name}/k_norm", qk)
    if scale == "shape":
        size = net.op(
            "Cast",
            net.op("Gather", net.op("Shape", q), 3, axis=0),
            to=int(onnx.helper.np_dtype_to_tensor_dtype(net.dtype)),
        )
        q = net.op("Div", q, net.op("Sqrt", size))
    else:
        q = net.op("Mul", q, float(qk) ** -0.5)
    axis = {"axis": -2 if reverse else -1} if probabilities == "Softmax" else {}
    if reverse:
        scores = net.op("MatMul", k, net.op("Transpose", q, perm=[0, 1, 3, 2]), name=f"{name}/MatMul")
        mixed = net.op(
            "MatMul",
            net.op("Transpose", value, perm=[0, 1, 3, 2]),
            net.op(probabilities, scores, name=f"{name}/{probabilities}", **axis),
            name=f"{name}/MatMul_1",
        )
        joined = net.op("Transpose", mixed, perm=[0, 3, 1, 2])
    else:
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]), name=f"{name}/MatMul")
        mixed = net.op(
            "MatMul",
            net.op(probabilities, scores, name=f"{name}/{probabilities}", **axis),
            value,
            name=f"{name}/MatMul_1",
        )
        joined = net.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return net.linear(net.reshape(joined, 0, count or 0, heads * v), f"{name}/proj", heads * v, width)


def _ffn(net: Net, x: Any, name: str, width: int, ffn: int, gate: str | None, activation: str) -> gs.Variable:
    if gate == "packed":
        left, right = net.split(net.linear(x, f"{name}/fc1", width, 2 * ffn), [ffn, ffn], axis=-1)
    else:
        left = net.linear(x, f"{name}/fc1", width, ffn)
        right = net.linear(x, f"{name}/up", width, ffn) if gate == "pair" else None
    if activation == "gelu_tanh":
        cube = net.op("Mul", net.op("Mul", left, left), left)
        inner = net.op("Add", left, net.op("Mul", cube, 0.044715), name=f"{name}/act/Add")
        inner = net.op("Tanh", net.op("Mul", inner, 0.7978845))
        hidden = net.op("Mul", net.op("Mul", left, 0.5), net.op("Add", inner, 1.0))
    elif gate is not None:
        hidden = net.op("Mul", left, net.op("Sigmoid", left))
    else:
        hidden = net.op("Relu", left)
    if right is not None or gate == "packed":
        hidden = net.op("Mul", hidden, right)
    return net.linear(hidden, f"{name}/fc2", ffn, width)


def attention(opset: int = 17, **hooks: Hook) -> onnx.ModelProto:
    """One attention block and one FFN; hooks change tensors on the way.

    Hooks: flat_q, flat_k, flat_v [N, T, H·d] behind the projections; q, k, v [N, H, T, d]; scores [N, H, T, T];
    mixed [N, H, T, d] and joined [N, T, H·d] before the output projection; end [N, T, width] after it.
    """
    net = Net(opset)
    x = net.input("x", ["N", TOKENS, WIDTH])

    def hooked(value: Any, *names: str) -> Any:
        for name in names:
            value = hooks[name](net, value) if name in hooks else value
        return value

    def apart(name: str) -> Any:
        flat = hooked(net.linear(x, name, WIDTH, HEADS * SIZE), f"flat_{name}")
        return hooked(
            net.op("Transpose", net.reshape(flat, 0, TOKENS, HEADS, SIZE), perm=[0, 2, 1, 3], name=f"{name}4"), name
        )

    q, k, v = (apart(name) for name in "qkv")
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]), name="score")
    mixed = net.op("MatMul", net.op("Softmax", hooked(scores, "scores"), axis=-1), v, name="mix")
    mixed = net.op("Transpose", hooked(mixed, "mixed"), perm=[0, 2, 1, 3])
    joined = hooked(net.reshape(mixed, 0, TOKENS, HEADS * SIZE), "joined")
    h = hooked(net.op("Add", x, net.linear(joined, "proj", HEADS * SIZE, WIDTH)), "end")
    h = net.op("Add", h, net.linear(net.op("Relu", net.linear(h, "fc1", WIDTH, 20)), "fc2", 20, WIDTH))
    net.output(h, ["N", TOKENS, WIDTH])
    return net.proto()


def grouped(
    keys: int = 2, queries: int = 3, qk: int = 4, v: int = 5, width: int = 12, tokens: int = 5, seed: int = 0
) -> onnx.ModelProto:
    """Attention in which `queries` query heads share each of `keys` key-value heads, between two projections."""
    net = Net(seed=seed)
    x = net.input("x", ["N", tokens, 7])
    h = net.linear(x, "embed", 7, width)

    def apart(name: str, heads: int, size: int) -> Any:
        flat = net.linear(h, name, width, heads * size)
        return net.op("Transpose", net.reshape(flat, 0, tokens, heads, size), perm=[0, 2, 1, 3])

    def repeated(value: Any, size: int) -> Any:
        wide = net.op("Expand", net.unsqueeze(value, 2), [1, keys, queries, tokens, size])
        return net.reshape(wide, 0, keys * queries, tokens, size)

    q, k, value = apart("q", keys * queries, qk), apart("k", keys, qk), apart("v", keys, v)
    k = net.op("Transpose", repeated(k, qk), perm=[0, 1, 3, 2])
    scores = net.op("MatMul", net.op("Mul", q, float(qk) ** -0.5), k, name="score")
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), repeated(value, v), name="mix")
    joined = net.reshape(net.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, tokens, keys * queries * v)
    h = net.op("Add", h, net.linear(joined, "proj", keys * queries * v, width))
    net.output(net.linear(net.norm(h, "norm", width), "head", width, 3), ["N", tokens, 3])
    return net.proto()


def mlp(
    *sizes: int, batch: Size = "N", activation: str = "Relu", opset: int = 17, seed: int = 0, bias: bool = True
) -> onnx.ModelProto:
    """Projections [batch, sizes[0]] -> [batch, sizes[-1]] with activations between them."""
    net = Net(opset, seed)
    h = net.input("x", [batch, sizes[0]])
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        h = net.linear(h, f"fc{index}", fan_in, fan_out, bias)
        if index < len(sizes) - 2:
            h = net.op(activation, h)
    net.output(h, [batch, sizes[-1]])
    return net.proto()


def depthwise(channels: int = 6, opset: int = 17, batch: Size = "N", kernel: int = 1) -> onnx.ModelProto:
    """1x1 convolution, depthwise 3x3 convolution, convolution of a kernel, mean over the image."""
    net = Net(opset)
    x = net.input("x", [batch, 3, 8, 8])
    h = net.op("Conv", x, net.weight("expand.w", channels, 3, 1, 1), net.weight("expand.b", channels))
    h = net.op("Relu", h)
    h = net.op(
        "Conv",
        h,
        net.weight("depth.w", channels, 1, 3, 3, scale=0.3),
        net.weight("depth.b", channels),
        group=channels,
        pads=[1, 1, 1, 1],
        name="depth",
    )
    project = net.weight("project.w", 5, channels, kernel, kernel, scale=channels**-0.5)
    h = net.op("Conv", net.op("Relu", h), project, net.weight("project.b", 5))
    net.output(net.op("GlobalAveragePool", h), [batch, 5, 1, 1])
    return net.proto()


def inputs_for(model: onnx.ModelProto, batch: int = 2, seed: int = 0, **symbols: int) -> dict[str, np.ndarray]:
    """Random inputs; symbolic sizes by name, axis 0 otherwise `batch`."""
    rng = np.random.default_rng(seed)
    held = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name in held:
            continue
        kind = value.type.tensor_type
        shape = [dim.dim_value or symbols.get(dim.dim_param, batch) for dim in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[value.name] = (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 3, shape)).astype(
            dtype
        )
    return feeds


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a model in onnxruntime; bfloat16, which its CPU does not run, in single precision."""
    import onnxruntime as ort

    model = onnx.ModelProto.FromString(model.SerializeToString())
    widen(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, dict(feeds))


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Weights of a finished model by name."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def set_weights(model: onnx.ModelProto, values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The same model with other values in some of its initializers."""
    clone = onnx.ModelProto()
    clone.CopyFrom(model)
    for tensor in clone.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values[tensor.name], order="C"), tensor.name))
    return clone


def random_plan(groups: Sequence[Any], rng: np.random.Generator, model: str = "any", least: int = 1) -> Plan:
    """A plan that keeps a random number of random neurons in each of the groups.

    At least three channels of a residual stream: a layer normalisation over one or two is all round-off.
    """
    entries = []
    for group in groups:
        fewest = max(least, 3) if group.kind == "residual" and group.size > 3 else least
        kept = int(rng.integers(fewest, max(group.size, fewest + 1)))
        keep = [sorted(rng.permutation(group.size)[:kept].tolist()) for _ in range(group.heads)]
        entries.append(GroupPlan(group.id, group.kind, group.size, group.heads, keep))
    return Plan(model, entries)


def keeping(group: Any, keep: Sequence[Sequence[int]]) -> GroupPlan:
    """A group's plan with these indices."""
    return GroupPlan(group.id, group.kind, group.size, group.heads, [list(head) for head in keep])


def calibration(model: onnx.ModelProto, samples: int = 16, seed: int = 3, **symbols: int) -> dict[str, np.ndarray]:
    """Calibration inputs in memory."""
    return inputs_for(model, samples, seed, **symbols)
