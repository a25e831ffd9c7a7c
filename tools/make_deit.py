"""Build DeiT-Tiny/Small/Base shaped ONNX models with random weights, using numpy and onnx only.

The graph has the node sequence of a TorchScript export of timm's DeiT at opset 17: packed QKV that is reshaped to
``(batch, tokens, 3, heads, size)``, the scale multiplied into Q, LayerNormalization as one op, GELU as
Div / Erf / Add / Mul / Mul, and (with a dynamic batch) the same chains of Shape / Gather / Concat that compute the
target shapes at run time.  The weights are random, so the models serve for timing and for tests of structure,
not for accuracy.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8
LAYER_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class DeitShape:
    """Hyper-parameters of one plain vision transformer with a class token."""

    width: int
    heads: int
    depth: int = 12
    ffn_ratio: int = 4
    image: int = 224
    patch: int = 16
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of the {self.heads} heads")
        if self.image % self.patch:
            raise ValueError(f"image size {self.image} is not a multiple of the patch size {self.patch}")

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.width // self.heads

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward block."""
        return self.width * self.ffn_ratio

    @property
    def tokens(self) -> int:
        """Sequence length: the patches and one class token."""
        return (self.image // self.patch) ** 2 + 1


DEIT_SHAPES: dict[str, DeitShape] = {
    "deit_tiny": DeitShape(width=192, heads=3),
    "deit_small": DeitShape(width=384, heads=6),
    "deit_base": DeitShape(width=768, heads=12),
}


class GraphBuilder:
    """Collects nodes and initializers, naming them after a scope as the TorchScript exporter does."""

    def __init__(self, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)
        self._counts: dict[str, int] = {}

    def op(self, scope: str, op_type: str, inputs: list[str], outputs: int = 1, **attributes: object) -> list[str]:
        """Append one node and return the names of its outputs."""
        base = f"{scope}/{op_type}"
        count = self._counts.get(base, 0)
        self._counts[base] = count + 1
        name = base if count == 0 else f"{base}_{count}"
        names = [f"{name}_output_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return names

    def one(self, scope: str, op_type: str, inputs: list[str], **attributes: object) -> str:
        """Append one node with one output and return the name of that output."""
        return self.op(scope, op_type, inputs, **attributes)[0]

    def constant(self, scope: str, value: float | list[int]) -> str:
        """Append a Constant node (int64 for integers, float32 for floats) and return its output name."""
        dtype = np.float32 if isinstance(value, float) else np.int64
        return self.one(scope, "Constant", [], value=numpy_helper.from_array(np.asarray(value, dtype)))

    def weight(self, name: str, values: np.ndarray) -> str:
        """Add a float32 initializer and return its name."""
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), name))
        return name

    def truncated(self, *shape: int, scale: float = 0.02, mean: float = 0.0) -> np.ndarray:
        """Normal values whose tails are clipped at two standard deviations."""
        return mean + scale * np.clip(self._random.standard_normal(shape, np.float32), -2.0, 2.0)

    def xavier(self, rows: int, columns: int) -> np.ndarray:
        """Normal values of the Glorot scale for a ``rows x columns`` linear map."""
        scale = np.float32((2.0 / (rows + columns)) ** 0.5)
        return scale * self._random.standard_normal((rows, columns), np.float32)


def _scalar_at(graph: GraphBuilder, scope: str, tensor: str, axis: int) -> str:
    """Size of one axis, read at run time: Shape and Gather."""
    shape = graph.one(scope, "Shape", [tensor])
    return graph.one(scope, "Gather", [shape, graph.constant(scope, axis)], axis=0)


def _joined_shape(graph: GraphBuilder, scope: str, parts: list[str | int]) -> str:
    """A shape vector from scalars known at run time (names) and constants (numbers), joined by Concat."""
    vectors: list[str] = []
    for part in (part for part in parts if isinstance(part, str)):
        vectors.append(graph.one(scope, "Unsqueeze", [part, graph.constant(scope, [0])]))
    vectors += [graph.constant(scope, [part]) for part in parts if isinstance(part, int)]
    return graph.one(scope, "Concat", vectors, axis=0)


def _linear(graph: GraphBuilder, scope: str, name: str, tensor: str, matrix: np.ndarray) -> str:
    """``x @ W + b`` as MatMul and Add, with the bias as the first operand of Add."""
    bias = graph.weight(f"{name}.bias", graph.truncated(matrix.shape[1]))
    product = graph.one(scope, "MatMul", [tensor, graph.weight(f"{name}.weight", matrix)])
    return graph.one(scope, "Add", [bias, product])


def _layer_norm(graph: GraphBuilder, scope: str, name: str, tensor: str, width: int) -> str:
    """One LayerNormalization node over the last axis."""
    gain = graph.weight(f"{name}.weight", graph.truncated(width, mean=1.0))
    bias = graph.weight(f"{name}.bias", graph.truncated(width))
    return graph.one(
        scope, "LayerNormalization", [tensor, gain, bias], axis=-1, epsilon=LAYER_NORM_EPSILON
    )


def _patches(graph: GraphBuilder, shape: DeitShape, batch: int | None) -> str:
    """Patch embedding: strided Conv, Reshape and Transpose to ``(batch, patches, width)``."""
    scope, size = "/patch_embed", shape.patch
    fan_in = shape.channels * size * size
    kernel = graph.truncated(shape.width, shape.channels, size, size, scale=fan_in**-0.5)
    inputs = [
        "image",
        graph.weight("patch_embed.proj.weight", kernel),
        graph.weight("patch_embed.proj.bias", graph.truncated(shape.width)),
    ]
    conv = graph.one(
        f"{scope}/proj", "Conv", inputs,
        dilations=[1, 1], group=1, kernel_shape=[size, size], pads=[0, 0, 0, 0], strides=[size, size],
    )  # fmt: skip
    if batch is None:
        full = graph.one(scope, "Shape", [conv])
        axes, start, end = (graph.constant(scope, [value]) for value in (0, 0, 2))
        head = graph.one(scope, "Slice", [full, start, end, axes])
        target = graph.one(scope, "Concat", [head, graph.constant(scope, [-1])], axis=0)
    else:
        target = graph.constant(scope, [batch, shape.width, shape.tokens - 1])
    flat = graph.one(scope, "Reshape", [conv, target], allowzero=0)
    return graph.one(scope, "Transpose", [flat], perm=[0, 2, 1])


def _expanded_token(graph: GraphBuilder, patches: str, token: str) -> str:
    """The class token expanded to the run-time batch, through the exporter's Where chain for ``-1`` sizes."""
    batch = _scalar_at(graph, "", patches, 0)
    wanted = _joined_shape(graph, "", [batch, -1, -1])
    wanted = graph.one("", "Reshape", [wanted, graph.constant("", [-1])], allowzero=0)
    ones = graph.one(
        "", "ConstantOfShape", [graph.one("", "Shape", [wanted])],
        value=numpy_helper.from_array(np.asarray([1], np.int64)),
    )  # fmt: skip
    minus = graph.one("", "Mul", [ones, graph.constant("", -1)])
    keep = graph.one("", "Equal", [wanted, minus])
    return graph.one("", "Expand", [token, graph.one("", "Where", [keep, ones, wanted])])


def _embedding(graph: GraphBuilder, shape: DeitShape, batch: int | None) -> tuple[str, str]:
    """Patches, class token and position embedding; also the index 0 that later selects the class token."""
    patches = _patches(graph, shape, batch)
    token = graph.weight("cls_token", graph.truncated(1, 1, shape.width))
    positions = graph.weight("pos_embed", graph.truncated(1, shape.tokens, shape.width))
    index = graph.constant("", 0)
    if batch is None:
        token = _expanded_token(graph, patches, token)
    else:
        token = graph.one("", "Expand", [token, graph.constant("", [batch, 1, shape.width])])
    joined = graph.one("", "Concat", [token, patches], axis=1)
    return graph.one("", "Add", [joined, positions]), index


def _split_heads(
    graph: GraphBuilder, scope: str, packed: str, shape: DeitShape, sizes: list[str | int]
) -> tuple[str, str, str]:
    """Q, K and V of shape ``(batch, heads, tokens, size)`` out of the packed projection."""
    target: str
    if all(isinstance(size, int) for size in sizes):
        target = graph.constant(scope, [*sizes, 3, shape.heads, shape.head_size])  # type: ignore[list-item]
    else:
        target = _joined_shape(graph, scope, [*sizes, 3, shape.heads, shape.head_size])
    apart = graph.one(scope, "Reshape", [packed, target], allowzero=0)
    front = graph.one(scope, "Transpose", [apart], perm=[2, 0, 3, 1, 4])
    parts = graph.op(scope, "Split", [front, graph.constant(scope, [1, 1, 1])], outputs=3, axis=0)
    query, key, value = (graph.one(scope, "Squeeze", [part, graph.constant(scope, [0])]) for part in parts)
    return query, key, value


def _attention(graph: GraphBuilder, block: int, tensor: str, shape: DeitShape, batch: int | None) -> str:
    """Multi-head self-attention with its output projection."""
    scope, name, width = f"/blocks/blocks.{block}/attn", f"blocks.{block}.attn", shape.width
    sizes: list[str | int] = [batch or 0, shape.tokens]
    if batch is None:
        sizes = [_scalar_at(graph, scope, tensor, axis) for axis in (0, 1)]
    matrix = np.concatenate([graph.xavier(width, width) for _ in range(3)], axis=1)
    packed = _linear(graph, f"{scope}/qkv", f"{name}.qkv", tensor, matrix)
    query, key, value = _split_heads(graph, scope, packed, shape, sizes)
    query = graph.one(scope, "Mul", [query, graph.constant(scope, shape.head_size**-0.5)])
    key = graph.one(scope, "Transpose", [key], perm=[0, 1, 3, 2])
    scores = graph.one(scope, "MatMul", [query, key])
    weights = graph.one(scope, "Softmax", [scores], axis=-1)
    mixed = graph.one(scope, "MatMul", [weights, value])
    mixed = graph.one(scope, "Transpose", [mixed], perm=[0, 2, 1, 3])
    if batch is None:
        target = _joined_shape(graph, scope, [*sizes, width])
    else:
        target = graph.constant(scope, [batch, shape.tokens, width])
    merged = graph.one(scope, "Reshape", [mixed, target], allowzero=0)
    return _linear(graph, f"{scope}/proj", f"{name}.proj", merged, graph.xavier(width, width))


def _gelu(graph: GraphBuilder, scope: str, tensor: str) -> str:
    """Exact GELU: ``x * (erf(x / sqrt 2) + 1) * 0.5``."""
    scaled = graph.one(scope, "Div", [tensor, graph.constant(scope, 2.0**0.5)])
    error = graph.one(scope, "Erf", [scaled])
    shifted = graph.one(scope, "Add", [error, graph.constant(scope, 1.0)])
    product = graph.one(scope, "Mul", [tensor, shifted])
    return graph.one(scope, "Mul", [product, graph.constant(scope, 0.5)])


def _feed_forward(graph: GraphBuilder, block: int, tensor: str, shape: DeitShape) -> str:
    """Two linear maps with GELU between them."""
    scope, name = f"/blocks/blocks.{block}/mlp", f"blocks.{block}.mlp"
    hidden = _linear(graph, f"{scope}/fc1", f"{name}.fc1", tensor, graph.xavier(shape.width, shape.hidden))
    active = _gelu(graph, f"{scope}/act", hidden)
    return _linear(graph, f"{scope}/fc2", f"{name}.fc2", active, graph.xavier(shape.hidden, shape.width))


def _block(graph: GraphBuilder, block: int, tensor: str, shape: DeitShape, batch: int | None) -> str:
    """One pre-norm transformer block."""
    scope, name = f"/blocks/blocks.{block}", f"blocks.{block}"
    normed = _layer_norm(graph, f"{scope}/norm1", f"{name}.norm1", tensor, shape.width)
    tensor = graph.one(scope, "Add", [tensor, _attention(graph, block, normed, shape, batch)])
    normed = _layer_norm(graph, f"{scope}/norm2", f"{name}.norm2", tensor, shape.width)
    return graph.one(scope, "Add", [tensor, _feed_forward(graph, block, normed, shape)])


def _head(graph: GraphBuilder, tensor: str, index: str, shape: DeitShape) -> None:
    """Final normalisation, class token, classifier; writes the graph output ``logits``."""
    normed = _layer_norm(graph, "/norm", "norm", tensor, shape.width)
    token = graph.one("", "Gather", [normed, index], axis=1)
    matrix = graph.weight("head.weight", graph.xavier(shape.classes, shape.width))
    bias = graph.weight("head.bias", graph.truncated(shape.classes))
    graph.nodes.append(
        helper.make_node(
            "Gemm", [token, matrix, bias], ["logits"], name="/head/Gemm", alpha=1.0, beta=1.0, transB=1
        )
    )


def _model(graph: GraphBuilder, name: str, shape: DeitShape, batch: int | None) -> onnx.ModelProto:
    """Wrap the collected nodes into a model."""
    first: str | int = "batch" if batch is None else batch
    image = helper.make_tensor_value_info(
        "image", TensorProto.FLOAT, [first, shape.channels, shape.image, shape.image]
    )
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [first, shape.classes])
    built = helper.make_graph(graph.nodes, name, [image], [logits], graph.initializers)
    return helper.make_model(
        built, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="make_deit"
    )


def resolve_shape(
    name: str, *, depth: int | None = None, image: int | None = None, classes: int | None = None
) -> DeitShape:
    """The shape registered under ``name``, with the given fields replaced."""
    if name not in DEIT_SHAPES:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(DEIT_SHAPES)}")
    changes = {"depth": depth, "image": image, "classes": classes}
    return replace(DEIT_SHAPES[name], **{key: value for key, value in changes.items() if value is not None})


def make_deit(
    name: str,
    *,
    seed: int = 0,
    depth: int | None = None,
    image: int = 224,
    classes: int = 1000,
    batch: int | None = None,
    shape: DeitShape | None = None,
) -> onnx.ModelProto:
    """Build a DeiT-shaped model with random weights.

    Args:
        name: ``deit_tiny``, ``deit_small`` or ``deit_base``; with ``shape``, only the name of the graph.
        seed: seed of the random weights; the same arguments always give the same bytes.
        depth: number of blocks, 12 by default.
        image: height and width of the input, a multiple of 16.
        classes: number of outputs.
        batch: a fixed batch size; None leaves the batch dynamic.
        shape: a complete shape of your own, which overrides ``name``, ``depth``, ``image`` and ``classes``.

    Returns:
        A checked-by-construction opset 17 model with the input ``image`` and the output ``logits``.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    shape = shape or resolve_shape(name, depth=depth, image=image, classes=classes)
    graph = GraphBuilder(seed)
    tensor, index = _embedding(graph, shape, batch)
    for block in range(shape.depth):
        tensor = _block(graph, block, tensor, shape, batch)
    _head(graph, tensor, index, shape)
    return _model(graph, name, shape, batch)


def count_parameters(model: onnx.ModelProto) -> int:
    """Number of floating-point values stored as initializers."""
    return sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)


def save_whole(model: onnx.ModelProto, path: Path) -> None:
    """Write the model so that ``path`` appears complete or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def main(arguments: list[str] | None = None) -> int:
    """Command line: build one model and write it."""
    parser = argparse.ArgumentParser(description="Write a DeiT-shaped ONNX model with random weights.")
    parser.add_argument("name", choices=sorted(DEIT_SHAPES), help="which shape to build")
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: NAME.onnx)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: 0)")
    parser.add_argument("--depth", type=int, help="number of blocks (default: 12)")
    parser.add_argument("--image", type=int, default=224, help="input height and width (default: 224)")
    parser.add_argument("--classes", type=int, default=1000, help="number of outputs (default: 1000)")
    parser.add_argument("--batch", type=int, help="fixed batch size (default: dynamic)")
    options = parser.parse_args(arguments)
    output = options.output or Path(f"{options.name}.onnx")
    try:
        model = make_deit(
            options.name, seed=options.seed, depth=options.depth, image=options.image,
            classes=options.classes, batch=options.batch,
        )  # fmt: skip
        onnx.checker.check_model(model)
        save_whole(model, output)
    except (ValueError, OSError) as error:
        print(f"make_deit: {error}", file=sys.stderr)
        return 1
    print(f"{output}: {count_parameters(model) / 1e6:.2f} M parameters, {output.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
