"""Write the same small networks as other tools write them to ``tests/exports/families``, for the tests.

Each ``format_*.onnx`` is a tiny ViT or BERT that went through another program (onnxruntime's optimisers and quantisers,
onnxsim, onnxslim) or has another form (half precision, bfloat16, constants as nodes, local functions, bodies of If).
It is compared with the export it was made from, in onnxruntime, and described beside it in a ``.json`` from the
architecture, never from its graph.  Keras and flax models: ``export_keras.py`` and ``export_flax.py``.

Needs torch, timm, onnx, onnxruntime, sympy, onnxsim and onnxslim.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from export_timm import quiet
from export_tiny import RECIPES, build, export_onnx, randomise, strip
from onnx import TensorProto, helper, numpy_helper
from onnx_decoder import DEPTH as LAYERS
from onnx_decoder import SHARED, SIZE, Decoder, as_onnx, step_as_onnx
from onnx_decoder import TOKENS as PLACES_OF_DECODER
from torch import nn

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports" / "families"
WIDTH, HEADS, FFN, WORDS, PLACES, TOKENS, CLASSES, DEPTH = 24, 3, 40, 50, 16, 12, 5, 2
LIMIT = 110_000  # bytes

# what a network of DEPTH blocks has, from its architecture
VIT_GROUPS = {"qk": DEPTH, "v": DEPTH, "head": DEPTH, "ffn": DEPTH, "residual": 1}
BERT_GROUPS = VIT_GROUPS | {"ffn": DEPTH + 1}  # the pooler's width lies between two projections too
IMAGE_INPUT = {"image": {"shape": [2, 3, 16, 16], "type": "float32"}}
TEXT_INPUTS = {
    "input_ids": {"shape": [2, TOKENS], "type": "int64", "below": WORDS},
    "attention_mask": {"shape": [2, TOKENS], "type": "int64", "mask": True},
    "token_type_ids": {"shape": [2, TOKENS], "type": "int64", "below": 2},
}
WORD_INPUT = {"input_ids": {"shape": [2, PLACES_OF_DECODER], "type": "int64", "below": WORDS}}
STEP_INPUTS = {
    "input_ids": {"shape": [2, 1], "type": "int64", "below": WORDS},
    "attention_mask": {"shape": [2, PLACES_OF_DECODER], "type": "int64", "mask": True},
} | {
    f"past.{index}.{part}": {"shape": [2, SHARED, PLACES_OF_DECODER - 1, SIZE], "type": "float32"}
    for index in range(LAYERS)
    for part in ("key", "value")
}
HALF = {"tolerance": 2e-2}
INTEGERS = {"tolerance": 0.2}  # where a number is rounded to one of 255 depends on the order of the sums before it


# ------------------------------------------------------------------------------------------------------------ networks


class ClassicAttention(nn.Module):
    """Attention as BERT's first implementations wrote it, which onnxruntime's optimiser knows."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.size()[:-1], HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Post-norm attention over ``(batch, tokens, width)``; ``mask`` is added to the scores."""
        query, key, value = self._heads(self.query(x)), self._heads(self.key(x)), self._heads(self.value(x))
        scores = torch.matmul(query, key.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5 + mask
        mixed = torch.matmul(scores.softmax(-1), value).permute(0, 2, 1, 3).contiguous()
        return self.norm(self.out(mixed.view(*mixed.size()[:-2], WIDTH)) + x)


class ClassicLayer(nn.Module):
    """Attention and a feed-forward network, each followed by a norm."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.attention, self.activation = ClassicAttention(), activation
        self.first, self.second, self.norm = nn.Linear(WIDTH, FFN), nn.Linear(FFN, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """One block."""
        x = self.attention(x, mask)
        return self.norm(self.second(self.activation(self.first(x))) + x)


class ClassicBert(nn.Module):
    """Three embeddings, post-norm blocks, a pooler and a classifier."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.words, self.places, self.types = (nn.Embedding(count, WIDTH) for count in (WORDS, PLACES, 2))
        self.norm = nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList([ClassicLayer(activation) for _ in range(DEPTH)])
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("order", torch.arange(PLACES)[None])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> torch.Tensor:
        """Logits of a batch of sequences."""
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -10000.0
        x = self.words(input_ids) + self.types(token_type_ids)
        x = self.norm(x + self.places(self.order[:, : input_ids.shape[1]]))
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


@cache
def _bert(dynamic: bool, activation: str = "gelu", opset: int = 14) -> bytes:
    torch.manual_seed(0)
    model = ClassicBert({"gelu": nn.GELU(), "tanh": nn.GELU(approximate="tanh")}[activation]).eval()
    randomise(model, torch.Generator().manual_seed(1))
    arrays = [torch.from_numpy(array) for array in _inputs(TEXT_INPUTS, np.random.default_rng(0)).values()]
    names = list(TEXT_INPUTS)
    axes = {name: {0: "batch", 1: "sequence"} for name in names} | {"logits": {0: "batch"}}
    with quiet(), torch.no_grad():
        buffer = io.BytesIO()
        torch.onnx.export(
            model, tuple(arrays), buffer, dynamo=False, dynamic_axes=axes if dynamic else None, input_names=names,
            output_names=["logits"], opset_version=opset,
        )  # fmt: skip
        wanted = model(*arrays).numpy()
    exported = onnx.load_from_string(buffer.getvalue())
    feeds = {name: array.numpy() for name, array in zip(names, arrays, strict=True)}
    if not np.allclose(_run(exported, feeds)[0], wanted, atol=1e-5):
        raise ValueError("the export differs from torch")
    strip(exported)
    return exported.SerializeToString()


def bert(dynamic: bool = True, activation: str = "gelu", opset: int = 14) -> onnx.ModelProto:
    """The classic BERT."""
    return onnx.load_from_string(_bert(dynamic, activation, opset))


@cache
def _vit(exporter: str, opset: int, sdpa: bool) -> bytes:
    name = "timm_deit_sdpa" if sdpa else "timm_deit_eager"
    example = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    exported = export_onnx(build(name, RECIPES[name]), example, exporter=exporter, opset=opset, dynamic=True)
    strip(exported)
    return exported.SerializeToString()


def vit(exporter: str = "torchscript", opset: int = 17, sdpa: bool = False) -> onnx.ModelProto:
    """timm's DeiT with the small sizes of ``export_tiny``."""
    return onnx.load_from_string(_vit(exporter, opset, sdpa))


@cache
def _decoder() -> bytes:
    torch.manual_seed(0)
    model = Decoder().eval()
    randomise(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.norm.weight.add_(1.0)
    made = as_onnx(model)
    feeds = _inputs(WORD_INPUT, np.random.default_rng(0))
    with torch.no_grad():
        wanted = model(torch.from_numpy(feeds["input_ids"])).numpy()
    if not np.allclose(_run(made, feeds)[0], wanted, atol=1e-4 * np.abs(wanted).max()):
        raise ValueError("the decoder differs from torch")
    return made.SerializeToString()


@cache
def _step() -> bytes:
    torch.manual_seed(0)
    model = Decoder().eval()
    randomise(model, torch.Generator().manual_seed(1))
    made = step_as_onnx(model)
    ids = _inputs(WORD_INPUT, np.random.default_rng(0))["input_ids"]
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).numpy()[:, -1:]
    feeds = {"input_ids": ids[:, -1:], "attention_mask": np.ones_like(ids)}
    for index, layer in enumerate(model.layers):
        for part, tensor in zip(("key", "value"), layer.kept, strict=True):
            feeds[f"past.{index}.{part}"] = tensor[:, :, :-1].numpy()
    if not np.allclose(_run(made, feeds)[0], wanted, atol=1e-4 * np.abs(wanted).max()):
        raise ValueError("the step differs from torch")
    return made.SerializeToString()


def step() -> onnx.ModelProto:
    """One step of it with a cache."""
    return onnx.load_from_string(_step())


def decoder() -> onnx.ModelProto:
    """The decoder of ``onnx_decoder``."""
    return onnx.load_from_string(_decoder())


# ------------------------------------------------------------------------------------------------- programs and forms


@contextmanager
def _files() -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"{folder}/in.onnx", f"{folder}/out.onnx"


def at_level(model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    """What onnxruntime writes when it optimises a model for its CPU."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.log_severity_level = 3
    with _files() as (_, target):
        options.optimized_model_filepath = target
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(target)


def fused(model: onnx.ModelProto, kind: str, *, separate: bool = False) -> onnx.ModelProto:
    """What onnxruntime.transformers' optimiser makes of a model."""
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions(kind)
    options.use_multi_head_attention = separate
    with _files() as (source, target):
        onnx.save(model, source)
        made = optimizer.optimize_model(
            source, model_type=kind, num_heads=HEADS, hidden_size=WIDTH, opt_level=0, optimization_options=options
        )
        made.save_model_to_file(target)
        return onnx.load(target)


def quantised(model: onnx.ModelProto, inputs: dict[str, Any], static: bool) -> onnx.ModelProto:
    """QDQ with calibrated ranges, or integers with ranges found at run time."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = [_inputs(inputs, np.random.default_rng(seed)) for seed in range(4)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self._left.pop() if self._left else None

    with _files() as (source, target):
        onnx.save(model, source)
        if static:
            quantize_static(source, target, Reader(), quant_format=QuantFormat.QDQ)
        else:
            quantize_dynamic(source, target)
        return onnx.load(target)


def simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxsim makes of a model."""
    import onnxsim

    made, good = onnxsim.simplify(model)
    assert good
    return made


def slimmed(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxslim makes of a model."""
    import onnxslim

    return onnxslim.slim(model)


def in_type(model: onnx.ModelProto, *, kind: int, ends: bool) -> onnx.ModelProto:
    """Every floating-point value in another type; ``ends`` says whether inputs and outputs too."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    held = list(model.graph.initializer)
    for node in model.graph.node:
        held.extend(entry.t for entry in node.attribute if entry.type == onnx.AttributeProto.TENSOR)
        for entry in node.attribute:
            if node.op_type == "Cast" and entry.name == "to" and entry.i == TensorProto.FLOAT:
                entry.i = kind
    for tensor in held:
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor)
            limit = float(np.finfo(np.float16).max)
            array = np.clip(array, -limit, limit) if kind == TensorProto.FLOAT16 else array
            tensor.CopyFrom(numpy_helper.from_array(array.astype(dtype), tensor.name))
    del model.graph.value_info[:]
    for value in [*model.graph.input, *model.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            if ends:
                value.type.tensor_type.elem_type = kind
            else:
                _cast_end(model, value.name, kind, value in model.graph.input)
    return model


def _cast_end(model: onnx.ModelProto, name: str, kind: int, first: bool) -> None:
    """Leave an input or output in single precision, with a Cast beside it."""
    inner = f"{name}.cast"
    for node in model.graph.node:
        for names in (node.input, node.output):
            for slot, other in enumerate(names):
                if other == name:
                    names[slot] = inner
    if first:
        model.graph.node.insert(0, helper.make_node("Cast", [name], [inner], to=kind))
    else:
        model.graph.node.append(helper.make_node("Cast", [inner], [name], to=TensorProto.FLOAT))


def fused_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """What onnxruntime.transformers makes for a GPU: fused, in half precision."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(fused(model, "bert"), keep_io_types=True, disable_shape_infer=True)


def mixed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Projections in half precision, norms and softmax in single, with Casts between."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    return convert_float_to_float16(
        model, keep_io_types=True, op_block_list=["LayerNormalization", "Softmax"], disable_shape_infer=False
    )


def constants_as_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Initializers as Constant nodes."""
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    del model.graph.initializer[:]
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + rest)
    return model


def in_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Each run of nodes of one block as a call of a local function, weights and all."""
    outside: list[onnx.NodeProto] = []
    blocks: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        parts = [part for part in node.name.split("/") if part.startswith("blocks.")]
        if parts and node.op_type != "Constant":
            if parts[0] not in blocks:
                outside.append(onnx.NodeProto(name=parts[0]))
            blocks.setdefault(parts[0], []).append(node)
        else:
            outside.append(node)
    outside.sort(key=lambda node: node.op_type != "Constant")
    del model.graph.node[:]
    for node in outside:
        model.graph.node.append(_called(model, node.name, blocks.pop(node.name)) if node.name in blocks else node)
    model.opset_import.append(helper.make_opsetid("local", 1))
    del model.graph.value_info[:]
    return model


def _called(model: onnx.ModelProto, name: str, nodes: list[onnx.NodeProto]) -> onnx.NodeProto:
    """Make a function of nodes, and the call of it."""
    made = {output for node in nodes for output in node.output}
    inputs = list(dict.fromkeys(one for node in nodes for one in node.input if one and one not in made))
    inner = {one for node in nodes for one in node.input}
    outputs = [one for node in nodes for one in node.output if one not in inner]
    imports = [helper.make_opsetid("", model.opset_import[0].version)]
    kind = name.replace(".", "_")
    model.functions.append(helper.make_function("local", kind, inputs, outputs, nodes, imports))
    return helper.make_node(kind, inputs, outputs, name=name, domain="local")


def with_branch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The second block's feed-forward activation inside an If, whose body reads the tensor from outside."""
    graph = model.graph
    last = [node for node in graph.node if node.op_type == "Erf"][-1]
    before = last.input[0]
    body = {
        mark: helper.make_graph(
            [helper.make_node(op, [before], [f"{mark}.out"])], mark, [], [onnx.ValueInfoProto(name=f"{mark}.out")]
        )
        for mark, op in (("then_branch", "Erf"), ("else_branch", "Identity"))
    }
    for inner in body.values():
        inner.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    image = graph.input[0].name
    fresh = [
        helper.make_node("ReduceMax", [image], ["branch.max"], name="branch/max", keepdims=0),
        helper.make_node("Less", ["branch.max", "branch.limit"], ["branch.small"], name="branch/less"),
        helper.make_node("If", ["branch.small"], [last.output[0]], name="branch/if", **body),
    ]
    graph.initializer.append(numpy_helper.from_array(np.asarray(100.0, np.float32), "branch.limit"))
    nodes = [one for node in graph.node for one in (fresh if node is last else [node])]
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return model


# ------------------------------------------------------------------------------------------------------------ the files


@dataclass(frozen=True)
class Form:
    """One file: from what and how it is made, and what it must contain."""

    of: Callable[[], onnx.ModelProto]
    change: Callable[[onnx.ModelProto], onnx.ModelProto]
    exporter: str
    inputs: dict[str, Any]
    groups: dict[str, int]
    sites: int = DEPTH
    dynamic: bool = True
    close: float = 1e-4
    more: dict[str, Any] = field(default_factory=dict)


FORMS: dict[str, Form] = {
    "ort_extended_vit": Form(
        vit, partial(at_level, level="EXTENDED"), "onnxruntime optimised model, level extended", IMAGE_INPUT, VIT_GROUPS
    ),
    "ort_extended_old_vit": Form(
        partial(vit, opset=13), partial(at_level, level="EXTENDED"),
        "onnxruntime optimised model of opset 13, level extended", IMAGE_INPUT, VIT_GROUPS,
    ),
    "ort_all_bert": Form(
        partial(bert, dynamic=False), partial(at_level, level="ALL"), "onnxruntime optimised model, level all",
        TEXT_INPUTS, BERT_GROUPS, dynamic=False,
    ),
    "ort_transformers_vit": Form(
        vit, partial(fused, kind="vit"), "onnxruntime.transformers optimizer, vit", IMAGE_INPUT, VIT_GROUPS
    ),
    "ort_transformers_bert": Form(
        bert, partial(fused, kind="bert"), "onnxruntime.transformers optimizer, bert", TEXT_INPUTS, BERT_GROUPS
    ),
    "ort_separate_bert": Form(
        partial(bert, activation="tanh"), partial(fused, kind="bert", separate=True),
        "onnxruntime.transformers optimizer, bert, use_multi_head_attention", TEXT_INPUTS, BERT_GROUPS,
    ),
    "half_vit": Form(
        partial(vit, sdpa=True), partial(in_type, kind=TensorProto.FLOAT16, ends=True), "torchscript, float16",
        {"image": {"shape": [2, 3, 16, 16], "type": "float16"}}, VIT_GROUPS, close=1e-2, more=HALF,
    ),
    "mixed_bert": Form(
        partial(bert, opset=17), mixed, "torchscript, float16 but for norms and softmax", TEXT_INPUTS, BERT_GROUPS,
        close=1e-2, more=HALF,
    ),
    "bfloat_vit": Form(
        partial(vit, "dynamo", 23, sdpa=True), partial(in_type, kind=TensorProto.BFLOAT16, ends=False),
        "dynamo, bfloat16", IMAGE_INPUT, VIT_GROUPS, close=0.1,
    ),
    "ort_half_bert": Form(
        bert, fused_half, "onnxruntime.transformers optimizer, bert, float16", TEXT_INPUTS, BERT_GROUPS, close=1e-2,
        more=HALF,
    ),
    "constants_vit": Form(
        vit, constants_as_nodes, "torchscript, initializers as Constant nodes", IMAGE_INPUT, VIT_GROUPS
    ),
    "functions_vit": Form(vit, in_functions, "torchscript, blocks as local functions", IMAGE_INPUT, VIT_GROUPS),
    "branch_vit": Form(
        vit, with_branch, "torchscript, an activation inside an If", IMAGE_INPUT, VIT_GROUPS | {"ffn": DEPTH - 1},
        more={"fixed": {"ffn": "operator If"}},
    ),
    "static_quantised_vit": Form(
        vit, partial(quantised, inputs=IMAGE_INPUT, static=True), "onnxruntime quantize_static, QDQ", IMAGE_INPUT, {},
        sites=0, close=0.5, more=INTEGERS | {"skipped": ["prune the floating-point model, then quantise"]},
    ),
    "dynamic_quantised_bert": Form(
        partial(bert, opset=17), partial(quantised, inputs=TEXT_INPUTS, static=False), "onnxruntime quantize_dynamic",
        TEXT_INPUTS, {}, close=0.5, more=INTEGERS | {"skipped": ["prune the floating-point model, then quantise"]},
    ),
    "onnx24_decoder": Form(
        decoder, lambda model: model, "onnx.helper, operators of ONNX 23 and 24", WORD_INPUT,
        {"qk": DEPTH, "v": DEPTH, "ffn": DEPTH, "residual": 1},
        more={"source": "own decoder", "fixed": {"head": "query heads share key heads"}},
    ),
    "ort_cache_decoder": Form(
        step, lambda model: model, "onnx.helper, GroupQueryAttention of onnxruntime", STEP_INPUTS,
        {"ffn": DEPTH, "residual": 1}, sites=0,
        more={"source": "own decoder, one step with a cache", "skipped": ["keeps a key/value cache"] * 3 * LAYERS},
    ),
    "onnxsim_vit": Form(partial(vit, sdpa=True), simplified, "onnxsim", IMAGE_INPUT, VIT_GROUPS),
    "onnxslim_vit": Form(partial(vit, "dynamo", 18), slimmed, "onnxslim", IMAGE_INPUT, VIT_GROUPS),
    "onnxslim_bert": Form(bert, slimmed, "onnxslim", TEXT_INPUTS, BERT_GROUPS),
}  # fmt: skip


def _inputs(specs: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
    feeds = {}
    for name, spec in specs.items():
        shape = spec["shape"]
        if spec.get("mask"):
            array = np.ones(shape)
            array[0, shape[-1] - 3 :] = 0
        else:
            array = rng.integers(0, spec["below"], shape) if "below" in spec else rng.standard_normal(shape)
        feeds[name] = array.astype(spec["type"])
    return feeds


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _gap(model: onnx.ModelProto, form: Form) -> float:
    """How far a file's outputs are from those of what it was made from, relative to the largest."""
    feeds = _inputs(form.inputs, np.random.default_rng(7))
    single = {name: array.astype("f4") if array.dtype == "f2" else array for name, array in feeds.items()}
    wanted = _run(form.of(), single)
    if any(tensor.data_type == TensorProto.BFLOAT16 for tensor in model.graph.initializer):
        return _bfloat_gap(model, feeds, wanted)
    got = _run(model, feeds)
    return max(float(np.abs(a - b.astype("f4")).max() / np.abs(a).max()) for a, b in zip(wanted, got, strict=True))


def _bfloat_gap(model: onnx.ModelProto, feeds: dict[str, np.ndarray], wanted: list[np.ndarray]) -> float:
    """The same for what onnxruntime does not run: ONNX's reference implementation runs it."""
    from onnx.reference import ReferenceEvaluator

    got = ReferenceEvaluator(model).run(None, feeds)
    return max(float(np.abs(a - b.astype("f4")).max() / np.abs(a).max()) for a, b in zip(wanted, got, strict=True))


def write(name: str, form: Form, folder: Path) -> None:
    """Make, check and write one file and its description."""
    model = form.change(form.of())
    strip(model)
    gap = _gap(model, form)
    data = model.SerializeToString()
    if not gap < form.close:
        raise ValueError(f"differs from what it was made of by {gap:.1e}")
    if len(data) > LIMIT:
        raise ValueError(f"is too large: {len(data)} bytes")
    stem = f"format_{name}"
    (folder / f"{stem}.onnx").write_bytes(data)
    described = {
        "source": "timm VisionTransformer" if form.inputs is not TEXT_INPUTS else "own BERT",
        "exporter": form.exporter,
        "inputs": form.inputs,
        "dynamic_batch": form.dynamic,
        "sites": form.sites,
        "groups": form.groups,
        **form.more,
    }
    (folder / f"{stem}.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(f"{stem:36} {len(data) / 1000:6.1f} kB  {len(model.graph.node):4} nodes  {gap:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write small networks as other tools write them.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports/families)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose name contains TEXT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, form in FORMS.items():
        if options.only in name:
            try:
                write(name, form, options.output)
            except Exception as error:  # one program that fails must not hide the others
                failed = 1
                print(f"export_formats: {name}: {type(error).__name__}: {str(error).strip()[:300]}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
