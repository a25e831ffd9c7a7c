"""A tiny decoder written with the operators that ONNX has since opsets 23 and 24, and the same in torch.

RMSNormalization, RotaryEmbedding, Attention with grouped heads, Swish; the table of words is the classifier too.
One step of it with onnxruntime's GroupQueryAttention has the keys and values of earlier tokens as inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

WIDTH, HEADS, SHARED, SIZE, FFN, WORDS, TOKENS, DEPTH = 24, 4, 2, 16, 40, 50, 10, 2


class DecoderLayer(nn.Module):
    """Pre-norm causal attention with rotated queries and keys, and a gated feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(WIDTH, eps=1e-5) for _ in range(2))
        self.query = nn.Linear(WIDTH, HEADS * SIZE, bias=False)
        self.key, self.value = (nn.Linear(WIDTH, SHARED * SIZE, bias=False) for _ in range(2))
        self.out = nn.Linear(HEADS * SIZE, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, FFN, bias=False) for _ in range(2))
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
        """One block over ``(batch, tokens, width)``; the tables are ``(tokens, size / 2)``."""

        def apart(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(*y.shape[:2], -1, SIZE).transpose(1, 2)

        def turned(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, -1)
            return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

        y = self.norm1(x)
        query, key, value = turned(apart(self.query(y))), turned(apart(self.key(y))), apart(self.value(y))
        self.kept = key, value
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """Words, blocks, a norm, and the words again."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
        self.layers = nn.ModuleList([DecoderLayer() for _ in range(DEPTH)])
        angles = torch.outer(torch.arange(TOKENS), 100.0 ** (-torch.arange(SIZE // 2) / (SIZE // 2)))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of every position."""
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        return self.norm(x) @ self.words.weight.T


class _Writer:
    """Nodes and weights of the decoder in ONNX; what kind of attention it has is up to the caller."""

    def __init__(self, model: Decoder) -> None:
        self.nodes: list[onnx.NodeProto] = []
        held = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        turned = {name: array.T if array.ndim == 2 and "layers" in name else array for name, array in held.items()}
        self.weights = {name: numpy_helper.from_array(array, name) for name, array in turned.items()}

    def op(self, kind: str, *inputs: str, name: str, more: tuple[str, ...] = (), **attributes: Any) -> str:
        """Append a node; returns the name of its first output."""
        self.nodes.append(helper.make_node(kind, list(inputs), [f"{name}.y", *more], name=name, **attributes))
        return f"{name}.y"

    def constant(self, name: str, array: np.ndarray) -> str:
        self.weights[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def body(self, attention: Callable[[str, str, str, str], str]) -> None:
        """Everything between the word ids and the logits."""
        x = self.op("Gather", "words.weight", "input_ids", name="words", axis=0)
        for index in range(DEPTH):
            at = f"layers.{index}"
            y = self.op("RMSNormalization", x, f"{at}.norm1.weight", name=f"{at}/norm1", axis=-1, epsilon=1e-5)
            query, key, value = (self._linear(y, at, part) for part in ("query", "key", "value"))
            x = self.op("Add", x, self._linear(attention(at, query, key, value), at, "out"), name=f"{at}/add1")
            y = self.op("RMSNormalization", x, f"{at}.norm2.weight", name=f"{at}/norm2", axis=-1, epsilon=1e-5)
            gate = self.op("Swish", self._linear(y, at, "gate"), name=f"{at}/swish")
            y = self.op("Mul", gate, self._linear(y, at, "up"), name=f"{at}/mul")
            x = self.op("Add", x, self._linear(y, at, "down"), name=f"{at}/add2")
        x = self.op("RMSNormalization", x, "norm.weight", name="norm", axis=-1, epsilon=1e-5)
        head = self.op("Transpose", "words.weight", name="tied", perm=[1, 0])
        self.nodes.append(helper.make_node("MatMul", [x, head], ["logits"], name="head"))

    def _linear(self, x: str, at: str, part: str) -> str:
        return self.op("MatMul", x, f"{at}.{part}.weight", name=f"{at}/{part}")

    def model(self, inputs: dict[str, tuple[int, list[Any]]], outputs: dict[str, list[Any]]) -> onnx.ModelProto:
        """The model; inputs by name with type and sizes, outputs with sizes."""
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info(name, kind, sizes) for name, (kind, sizes) in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name, sizes in outputs.items()],
            list(self.weights.values()),
        )
        imports = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=11)


def as_onnx(model: Decoder) -> onnx.ModelProto:
    """The decoder in ONNX, operator by operator, with a free batch."""
    w = _Writer(model)
    w.nodes.append(helper.make_node("Shape", ["input_ids"], ["batch"], name="batch", start=0, end=1))
    shape = w.op("Concat", "batch", w.constant("tokens", np.asarray([TOKENS])), name="places/shape", axis=0)
    places = w.op("Expand", w.constant("order", np.arange(TOKENS)[None]), shape, name="places")

    def attention(at: str, query: str, key: str, value: str) -> str:
        held = {"cosine": model.cosine, "sine": model.sine}  # each layer has tables of its own
        tables = *(w.constant(f"{at}.{name}", table.numpy()) for name, table in held.items()), places
        query = w.op("RotaryEmbedding", query, *tables, name=f"{at}/turned_query", num_heads=HEADS)
        key = w.op("RotaryEmbedding", key, *tables, name=f"{at}/turned_key", num_heads=SHARED)
        heads = {"q_num_heads": HEADS, "kv_num_heads": SHARED}
        return w.op("Attention", query, key, value, name=f"{at}/attention", is_causal=1, **heads)

    w.body(attention)
    return w.model(
        {"input_ids": (TensorProto.INT64, ["batch", TOKENS])}, {"logits": ["batch", TOKENS, WORDS]}
    )


def step_as_onnx(model: Decoder) -> onnx.ModelProto:
    """One step: the next token's logits from its id and the keys and values of the tokens before it."""
    w = _Writer(model)
    past = TOKENS - 1
    w.op("ReduceSum", "attention_mask", w.constant("last", np.asarray([1])), name="seen", keepdims=0)
    w.op("Cast", w.op("Sub", "seen.y", w.constant("one", np.asarray(1)), name="before"), name="lengths", to=6)
    w.constant("total", np.asarray(TOKENS, np.int32))
    inputs = {"input_ids": (TensorProto.INT64, ["batch", 1]), "attention_mask": (TensorProto.INT64, ["batch", TOKENS])}
    outputs: dict[str, list[Any]] = {"logits": ["batch", 1, WORDS]}
    for index in range(DEPTH):
        for part in ("key", "value"):
            inputs[f"past.{index}.{part}"] = (TensorProto.FLOAT, ["batch", SHARED, past, SIZE])
            outputs[f"present.{index}.{part}"] = ["batch", SHARED, TOKENS, SIZE]

    def attention(at: str, query: str, key: str, value: str) -> str:
        index = at.removeprefix("layers.")
        states = [f"past.{index}.{part}" for part in ("key", "value")]
        made = tuple(f"present.{index}.{part}" for part in ("key", "value"))
        return w.op(
            "GroupQueryAttention", query, key, value, *states, "lengths.y", "total", "cosine", "sine",
            name=f"{at}/attention", more=made, domain="com.microsoft", num_heads=HEADS, kv_num_heads=SHARED,
            do_rotary=1,
        )  # fmt: skip

    w.body(attention)
    return w.model(inputs, outputs)
