"""Write small real exports of text and speech transformers to ``tests/exports/families``, for the tests.

Every file comes from a real exporter (TorchScript or dynamo) run on a transformers model with random weights (or on
one of the small modules below), is checked against torch in onnxruntime at two batch sizes, and has a ``.json`` beside
it that says what the architecture holds, never what its graph was found to hold.

Needs torch, transformers, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from export_timm import quiet
from export_tiny import PROTOBUF_LIMIT, TOLERANCE, Export, strip
from torch import nn
from torch.nn import functional

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports" / "families"
WIDTH, HEADS, FFN, DEPTH = 24, 3, 40, 2
NARROW = 16  # of models with many layers, so that their files stay small
VOCABULARY, POSITIONS, TOKENS, CLASSES = 60, 32, 9, 5
FEATURES = ("batch", "length")


@dataclass(frozen=True)
class Input:
    """A model input: its shape in the tests, element type, and the symbols of its free axes.

    ``below`` is the exclusive bound of ids, ``mask`` marks a padding mask, ``axes`` names the axes that are free where
    the export leaves sizes free.
    """

    shape: tuple[int, ...]
    type: str = "int64"
    below: int | None = None
    mask: bool = False
    axes: tuple[str, ...] = FEATURES

    def tensor(self, generator: torch.Generator, batch: int, length: int | None = None) -> torch.Tensor:
        """Random values that fit, with another batch and length (None keeps the length)."""
        shape = [batch, *self.shape[1:]]
        if length is not None and len(self.axes) > 1:
            shape[1] = length
        if self.mask:
            mask = torch.ones(shape, dtype=getattr(torch, self.type))
            mask[0, shape[1] - 2 :] = 0
            return mask
        if self.below is not None:
            return torch.randint(0, self.below, shape, generator=generator, dtype=getattr(torch, self.type))
        return torch.randn(shape, generator=generator)

    def describe(self, batch: int | None) -> dict[str, Any]:
        """What the tests need to make it up; sizes of an export of no fixed batch may be tried larger."""
        free = batch is None
        found: dict[str, Any] = {"shape": [batch or self.shape[0], *self.shape[1:]], "type": self.type}
        found |= {"below": self.below} if self.below else {}
        found |= {"mask": True} if self.mask else {}
        return found | ({"length": 1} if free and len(self.axes) > 1 else {})


IDS = Input((2, TOKENS), below=VOCABULARY)
MASK = Input((2, TOKENS), mask=True)
TYPES = Input((2, TOKENS), below=2)


@dataclass(frozen=True)
class Recipe:
    """How to build one model, its inputs, the exports wanted of it, and what the architecture holds."""

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Input]
    source: str
    exports: str
    sites: int
    groups: Mapping[str, int]
    fixed: Mapping[str, str] = field(default_factory=dict)
    skipped: Sequence[str] = ()


class Named(nn.Module):
    """A transformers model called by input names, that returns some of its outputs."""

    def __init__(self, model: nn.Module, names: Sequence[str], outputs: Sequence[str], **options: Any) -> None:
        super().__init__()
        self.model, self.names, self.outputs, self.options = model, tuple(names), tuple(outputs), options

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The wanted outputs in order."""
        found = self.model(**dict(zip(self.names, inputs, strict=True)), **self.options)
        return tuple(getattr(found, name) for name in self.outputs)


class Sentence(nn.Module):
    """A sentence encoder: the mean of the hidden states that are no padding, at unit length."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, width]."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).expand(hidden.size()).float()
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, p=2, dim=1)


class KeywordSpotter(nn.Module):
    """Waveform → strided convolutions → encoder → mean → classes, as in small keyword-spotting networks."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(1, 12, 16, stride=8), nn.GELU(), nn.Conv1d(12, WIDTH, 4, stride=4), nn.GELU()
        )
        self.place = nn.Parameter(torch.zeros(1, 7, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, FFN, activation="gelu", batch_first=True, norm_first=norm_first, dropout=0.0
        )
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """Logits of waveforms [batch, 1, samples]."""
        x = self.front(waveform).transpose(1, 2) + self.place
        return self.head(self.encoder(x).mean(dim=1))


def transformers_model(kind: str, inputs: Sequence[str], outputs: Sequence[str], **config: Any) -> nn.Module:
    """A model of transformers with a tiny configuration, called by its input names."""
    return Named(_bare(kind, **config), inputs, outputs)


def _bare(kind: str, attention: str = "eager", options: Mapping[str, Any] | None = None, **config: Any) -> nn.Module:
    """The model alone. The configuration's class follows from the model's."""
    import transformers

    made = getattr(transformers, kind)
    settings = made.config_class(**config)
    settings._attn_implementation = attention
    return made(settings, **(options or {}))


BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": POSITIONS,
    "num_labels": CLASSES,
}
ROBERTA = BERT | {"pad_token_id": 1, "type_vocab_size": 1}
ALBERT = BERT | {"embedding_size": 12, "num_hidden_layers": 3}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": WIDTH,
    "n_layers": DEPTH,
    "n_heads": HEADS,
    "hidden_dim": FFN,
    "max_position_embeddings": POSITIONS,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 4,
    "d_ff": FFN,
    "num_layers": DEPTH,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "use_cache": False,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": NARROW,
    "n_layer": DEPTH,
    "n_head": 2,
    "n_inner": FFN,
    "n_positions": POSITIONS,
    "use_cache": False,
}
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": NARROW,
    "intermediate_size": FFN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "use_cache": False,
}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": NARROW,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": 28,
    "max_position_embeddings": POSITIONS,
    "use_cache": False,
}
WHISPER = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": 10,
    "d_model": NARROW,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": FFN,
    "decoder_ffn_dim": 28,
    "max_source_positions": 8,
    "max_target_positions": POSITIONS,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

NEOX = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": FFN,
    "max_position_embeddings": POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    "use_cache": False,
}
MODERNBERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": POSITIONS,
    "layer_types": ["full_attention", "sliding_attention"],
    "local_attention": 4,
    "num_labels": CLASSES,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

BLOCKS = {"qk": DEPTH, "v": DEPTH, "ffn": DEPTH, "head": DEPTH}

RECIPES = {
    "bert": Recipe(
        partial(transformers_model, "BertForSequenceClassification", ("input_ids", "attention_mask", "token_type_ids"),
                ("logits",), **BERT),
        {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES},
        "BertForSequenceClassification", "ts17_dyn dynamo18_dyn", DEPTH, BLOCKS | {"ffn": DEPTH + 1, "residual": 1},
    ),
    "minilm": Recipe(
        lambda: Sentence(_bare("BertModel", "sdpa", {"add_pooling_layer": False}, **BERT)),
        {"input_ids": IDS, "attention_mask": MASK},
        "BertModel with SDPA, mean pooling and L2 norm (a sentence encoder)", "ts17_dyn dynamo18_dyn", DEPTH, BLOCKS,
        {"residual": "size of the model's output"},
    ),
    "distilbert": Recipe(
        partial(transformers_model, "DistilBertForMaskedLM", ("input_ids", "attention_mask"), ("logits",),
                **DISTILBERT),
        {"input_ids": IDS, "attention_mask": MASK},
        "DistilBertForMaskedLM (its head normalises a width of its own)", "ts17_dyn dynamo18_dyn", DEPTH,
        BLOCKS | {"residual": 1}, {"ffn": "a normalisation runs over it"},
    ),
    "roberta": Recipe(
        partial(transformers_model, "RobertaForSequenceClassification", ("input_ids", "attention_mask"), ("logits",),
                **ROBERTA),
        {"input_ids": IDS, "attention_mask": MASK},
        "RobertaForSequenceClassification (positions counted from the ids)", "ts17_dyn dynamo18_dyn", DEPTH,
        BLOCKS | {"ffn": DEPTH + 1, "residual": 1},
    ),
    "albert": Recipe(
        partial(transformers_model, "AlbertForSequenceClassification",
                ("input_ids", "attention_mask", "token_type_ids"), ("logits",), **ALBERT),
        {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES},
        "AlbertForSequenceClassification (three layers with the same weights, factorised embedding)",
        "ts17_dyn dynamo18_dyn", 3, {"qk": 1, "v": 1, "ffn": 2, "head": 1, "residual": 2},
    ),
    "t5": Recipe(
        partial(transformers_model, "T5EncoderModel", ("input_ids", "attention_mask"), ("last_hidden_state",), **T5),
        {"input_ids": IDS, "attention_mask": MASK},
        "T5EncoderModel (relative position bias that all layers share, no scale, RMS norm)", "ts17_dyn dynamo18_dyn",
        DEPTH, BLOCKS | {"head": 1},
        {"residual": "size of the model's output"},
    ),
    "gpt2": Recipe(
        partial(transformers_model, "GPT2LMHeadModel", ("input_ids", "attention_mask"), ("logits",), **GPT2),
        {"input_ids": IDS, "attention_mask": MASK},
        "GPT2LMHeadModel (packed Conv1D projections, causal mask)", "ts17_dyn dynamo18_dyn", DEPTH,
        BLOCKS | {"residual": 1},
    ),
    "llama": Recipe(
        partial(transformers_model, "LlamaForCausalLM", ("input_ids", "attention_mask"), ("logits",), **LLAMA),
        {"input_ids": IDS, "attention_mask": MASK},
        "LlamaForCausalLM (rotary positions, four query heads on two key heads, RMS norm, SwiGLU)",
        "ts17_dyn dynamo18_dyn", DEPTH, BLOCKS | {"residual": 1}, {"head": "share keys and values"},
    ),
    # with a free batch this exporter writes a RotaryEmbedding that onnxruntime takes at batch 1 alone
    "llama_sdpa": Recipe(
        partial(transformers_model, "LlamaForCausalLM", ("input_ids", "attention_mask"), ("logits",), attention="sdpa",
                **LLAMA),
        {"input_ids": IDS, "attention_mask": MASK},
        "LlamaForCausalLM with SDPA (rotary positions, four query heads on two key heads)", "dynamo23", DEPTH,
        BLOCKS | {"residual": 1}, {"head": "share keys and values"},
    ),
    "neox": Recipe(
        partial(transformers_model, "GPTNeoXForCausalLM", ("input_ids", "attention_mask"), ("logits",), **NEOX),
        {"input_ids": IDS, "attention_mask": MASK},
        "GPTNeoXForCausalLM (rotary positions on a quarter of each head, attention and FFN side by side)",
        "ts17_dyn dynamo18_dyn", 1, {"qk": 1, "v": 1, "ffn": 1, "head": 1, "residual": 1},
    ),
    "modernbert": Recipe(
        partial(transformers_model, "ModernBertForSequenceClassification", ("input_ids", "attention_mask"),
                ("logits",), **MODERNBERT),
        {"input_ids": IDS, "attention_mask": MASK},
        "ModernBertForSequenceClassification (rotary positions, GeGLU, local attention, a head that normalises)",
        "ts17_dyn dynamo18_dyn", DEPTH, BLOCKS | {"residual": 1}, {"ffn": "a normalisation runs over it"},
    ),
    "bart": Recipe(
        partial(transformers_model, "BartForConditionalGeneration",
                ("input_ids", "attention_mask", "decoder_input_ids"), ("logits",), **BART),
        {"input_ids": IDS, "attention_mask": MASK,
         "decoder_input_ids": Input((2, 7), below=VOCABULARY, axes=("batch", "target"))},
        "BartForConditionalGeneration (encoder, decoder with cross attention)", "ts17_dyn dynamo18_dyn", 3,
        {"qk": 3, "v": 3, "ffn": 2, "head": 3, "residual": 1},
    ),
    "whisper": Recipe(
        partial(transformers_model, "WhisperForConditionalGeneration",
                ("input_features", "decoder_input_ids", "decoder_attention_mask"), ("logits",), **WHISPER),
        {"input_features": Input((2, 10, 16), "float32", axes=("batch",)),
         "decoder_input_ids": Input((2, 7), below=VOCABULARY, axes=("batch", "target")),
         "decoder_attention_mask": Input((2, 7), mask=True, axes=("batch", "target"))},
        "WhisperForConditionalGeneration (spectrogram front end, cross attention)", "ts17_dyn dynamo18_dyn", 3,
        {"qk": 3, "v": 3, "ffn": 2, "head": 3, "channel": 1, "residual": 2},
    ),
    "keyword": Recipe(
        partial(KeywordSpotter, norm_first=True),
        {"waveform": Input((2, 1, 240), "float32", axes=("batch",))},
        "own keyword spotter: strided convolutions on the waveform, nn.TransformerEncoder", "ts17_dyn dynamo18_dyn",
        DEPTH, BLOCKS | {"channel": 1, "residual": 1},
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the work


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter random values at which errors of pruning show and attention is not uniform."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight"):
            value = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            value = 0.2 * noise
        elif "embed" in name or "bias" in name or name.endswith(("wte.weight", "wpe.weight", "shared.weight", "place")):
            value = 0.7 * noise
        else:
            fan = parameter.shape[0] if "c_attn" in name or "c_proj" in name or "c_fc" in name else noise[0].numel()
            value = noise * fan**-0.5
        parameter.data.copy_(value)


def build(recipe: Recipe) -> nn.Module:
    """The recipe's model in evaluation mode; the same for every export of the recipe."""
    torch.manual_seed(0)
    model = recipe.build().eval()
    randomise(model, torch.Generator().manual_seed(1))
    return model


def sample(recipe: Recipe, batch: int, length: int | None = None, seed: int = 2) -> dict[str, torch.Tensor]:
    """Inputs by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: entry.tensor(generator, batch, length) for name, entry in recipe.inputs.items()}


def export_named(model: nn.Module, recipe: Recipe, export: Export) -> onnx.ModelProto:
    """Export a model of several inputs, with all weights inside; batch and lengths are free where the mark says so."""
    example = sample(recipe, export.batch or 2)
    free = export.batch is None
    names = {"input_names": list(example), "output_names": ["output"], "opset_version": export.opset}
    with quiet(), torch.no_grad():
        if export.exporter == "torchscript":
            axes: dict[str, dict[int, str]] = {
                name: dict(enumerate(entry.axes)) for name, entry in recipe.inputs.items()
            }
            axes["output"] = {0: "batch"}
            buffer = io.BytesIO()
            torch.onnx.export(
                model, tuple(example.values()), buffer, dynamo=False, dynamic_axes=axes if free else None, **names
            )
            return onnx.load_from_string(buffer.getvalue())
        symbols = {axis: torch.export.Dim(axis) for entry in recipe.inputs.values() for axis in entry.axes}
        shapes = tuple(
            {index: symbols[axis] for index, axis in enumerate(entry.axes)} for entry in recipe.inputs.values()
        )
        if isinstance(model, Named):  # its inputs are one variadic argument
            shapes = (shapes,)
        program = torch.onnx.export(
            model, tuple(example.values()), dynamo=True, dynamic_shapes=shapes if free else None,
            optimize=export.optimize, verbose=False, **names,
        )  # fmt: skip
        return program.model_proto


def largest_difference(exported: onnx.ModelProto, model: nn.Module, inputs: Sequence[dict[str, torch.Tensor]]) -> float:
    """Largest difference between onnxruntime and torch over the inputs, divided by the largest output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exported.SerializeToString(), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for feed in inputs:
        with torch.no_grad():
            wanted = model(*feed.values())
        for want, got in zip(
            wanted if isinstance(wanted, tuple) else (wanted,),
            session.run(None, {name: value.numpy() for name, value in feed.items()}),
            strict=True,
        ):
            if got.shape != tuple(want.shape):
                raise ValueError(f"the exported model returns shape {got.shape}, torch returns {tuple(want.shape)}")
            gap = float(np.abs(got - want.numpy()).max() / np.abs(want.numpy()).max())
            worst = max(worst, gap if np.isfinite(gap) else float("inf"))
    return worst


def describe(recipe: Recipe, export: Export) -> dict[str, Any]:
    """What the file must hold, from the architecture."""
    import transformers

    library = f"torch {torch.__version__.split('+')[0]}"
    if not recipe.source.startswith("own"):
        library = f"transformers {transformers.__version__}, {library}"
    found = {
        "source": f"{recipe.source} ({library})",
        "exporter": f"{export.exporter}, opset {export.opset}",
        "inputs": {name: entry.describe(export.batch) for name, entry in recipe.inputs.items()},
        "dynamic_batch": export.batch is None,
        "sites": recipe.sites,
        "groups": dict(recipe.groups),
    }
    if recipe.fixed:
        found["fixed"] = dict(recipe.fixed)
    if recipe.skipped:
        found["skipped"] = list(recipe.skipped)
    return found


def write_export(name: str, recipe: Recipe, mark: str, folder: Path) -> None:
    """Export, check and write one file and its description."""
    export, model = Export.parse(mark), build(recipe)
    exported = export_named(model, recipe, export)
    strip(exported)
    onnx.checker.check_model(exported)
    free = export.batch is None
    feeds = [sample(recipe, 1), sample(recipe, 3, TOKENS + 2, seed=3)] if free else [sample(recipe, export.batch or 2)]
    difference = largest_difference(exported, model, feeds)
    if not difference < TOLERANCE:
        raise ValueError(f"differs from torch by {difference:.2g}")
    data = exported.SerializeToString()
    if len(data) > PROTOBUF_LIMIT:
        raise ValueError(f"is too large: {len(data)} bytes")
    file = f"text_{name}_{mark}"
    (folder / f"{file}.onnx").write_bytes(data)
    (folder / f"{file}.json").write_text(json.dumps(describe(recipe, export), indent=1) + "\n", encoding="utf-8")
    print(f"{file:32} {len(data) / 1000:6.1f} kB  {len(exported.graph.node):4} nodes  {difference:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write small real exports of text and speech transformers.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports/families)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose name contains TEXT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, recipe in RECIPES.items():
        for mark in recipe.exports.split():
            if options.only not in f"text_{name}_{mark}":
                continue
            try:
                write_export(name, recipe, mark, options.output)
            except Exception as error:  # one failing exporter must not hide the others
                failed += 1
                lines = str(error).strip().splitlines()
                print(f"text_{name}_{mark}: {type(error).__name__}: {lines[:1]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
