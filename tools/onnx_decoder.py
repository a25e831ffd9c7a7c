"""A tiny decoder written with the operators that ONNX has since opsets 23 and 24, and the same in torch.

RMSNormalization, RotaryEmbedding, Attention with grouped heads, Swish; the table of words is the classifier too.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

WIDTH, HEADS, SHARED, SIZE, FFN, WORDS, TOKENS, DEPTH = 24, 4, 2, 8, 40, 50, 10, 2


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


def as_onnx(model: Decoder) -> onnx.ModelProto:
    """The decoder in ONNX, operator by operator, with a free batch."""
    nodes: list[onnx.NodeProto] = []
    held = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    turned = {name: array.T if array.ndim == 2 and "layers" in name else array for name, array in held.items()}
    weights = {name: numpy_helper.from_array(array, name) for name, array in turned.items()}

    def op(kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"{name}.y"], name=name, **attributes))
        return f"{name}.y"

    for table in ("cosine", "sine"):
        weights[table] = numpy_helper.from_array(held[table][None], table)
        op("Expand", table, op("Concat", "batch", "sizes", name=f"{table}/shape", axis=0), name=table)
    weights["sizes"] = numpy_helper.from_array(torch.tensor([TOKENS, SIZE // 2]).numpy(), "sizes")
    nodes.insert(0, helper.make_node("Shape", ["input_ids"], ["batch"], name="batch", start=0, end=1))
    x = op("Gather", "words.weight", "input_ids", name="words", axis=0)
    for index in range(DEPTH):
        at = f"layers.{index}"
        y = op("RMSNormalization", x, f"{at}.norm1.weight", name=f"{at}/norm1", axis=-1, epsilon=1e-5)
        parts = ("query", "key", "value")
        query, key, value = (op("MatMul", y, f"{at}.{part}.weight", name=f"{at}/{part}") for part in parts)
        query = op("RotaryEmbedding", query, "cosine.y", "sine.y", name=f"{at}/turned_query", num_heads=HEADS)
        key = op("RotaryEmbedding", key, "cosine.y", "sine.y", name=f"{at}/turned_key", num_heads=SHARED)
        mixed = op("Attention", query, key, value, name=f"{at}/attention",
                   is_causal=1, q_num_heads=HEADS, kv_num_heads=SHARED)  # fmt: skip
        x = op("Add", x, op("MatMul", mixed, f"{at}.out.weight", name=f"{at}/out"), name=f"{at}/add1")
        y = op("RMSNormalization", x, f"{at}.norm2.weight", name=f"{at}/norm2", axis=-1, epsilon=1e-5)
        gate = op("Swish", op("MatMul", y, f"{at}.gate.weight", name=f"{at}/gate"), name=f"{at}/swish")
        y = op("Mul", gate, op("MatMul", y, f"{at}.up.weight", name=f"{at}/up"), name=f"{at}/mul")
        x = op("Add", x, op("MatMul", y, f"{at}.down.weight", name=f"{at}/down"), name=f"{at}/add2")
    x = op("RMSNormalization", x, "norm.weight", name="norm", axis=-1, epsilon=1e-5)
    head = op("Transpose", "words.weight", name="tied", perm=[1, 0])
    nodes.append(helper.make_node("MatMul", [x, head], ["logits"], name="head"))
    graph = helper.make_graph(
        nodes, "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", TOKENS])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", TOKENS, WORDS])],
        list(weights.values()),
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
