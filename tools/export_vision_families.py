"""Write small real exports of many families of vision models to ``tests/exports/families``, for the tests.

Every file comes from a real exporter run on a real implementation (transformers, timm, or a module of
``vision_modules``), and is checked against torch in onnxruntime. What a file must contain (`Recipe.expect`) is written
by hand from the architecture: the number of attention sites, of groups by kind, and why others are not cut.

Needs torch, timm, transformers, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from export_timm import quiet
from export_tiny import Export, randomise, strip
from torch import nn
from vision_modules import (
    ChannelsFirstNorm,
    CompactTransformer,
    FocusedLinearAttention,
    PackedAttention,
    PatchViT,
    SeparableAttention,
)

TOLERANCE = 2e-4
FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports" / "families"
CLASSES = 10
IMAGE = {"image": {"shape": [2, 3, 16, 16], "type": "float32"}}


@dataclass(frozen=True)
class Recipe:
    """One family: how to build a model, its inputs, and what each of its exports must contain.

    `expect` maps each export, in the notation of ``export_tiny``, to the entries of the JSON file that say what must
    be found; `outputs` picks fields of what the model returns, in order.
    """

    build: Callable[[], nn.Module]
    source: str
    expect: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: IMAGE)
    outputs: tuple[str, ...] = ()


class Outputs(nn.Module):
    """A model called by keyword, that returns the named fields of its output as a tuple."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The wanted outputs in order."""
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(found[name] for name in self.outputs)


# ------------------------------------------------------------------------------------------------------------- models


def build_dinov2(swiglu: bool) -> nn.Module:
    """DINOv2 with its LayerScale; the giant's feed-forward is SwiGLU with one packed projection."""
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=2, image_size=16, patch_size=4,
        layerscale_value=0.5, use_swiglu_ffn=swiglu, num_labels=CLASSES, attn_implementation="eager",
    )  # fmt: skip
    return Dinov2ForImageClassification(config)


def build_clip_vision(attention: str) -> nn.Module:
    """CLIP's image tower with its projection."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(**_CLIP_VISION, projection_dim=12, attn_implementation=attention)
    return CLIPVisionModelWithProjection(config)


def build_clip(attention: str) -> nn.Module:
    """Both towers of CLIP: images, token ids and a padding mask in, similarities out."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 1, "eos_token_id": 39,
        "num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 0, "pad_token_id": 1,
    }  # fmt: skip
    vision = {**_CLIP_VISION, "num_hidden_layers": 1}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    config._attn_implementation = attention
    return CLIPModel(config)


_CLIP_VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def build_siglip() -> nn.Module:
    """SigLIP's image tower; its head is attention of one learned probe over the tokens."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    return SiglipVisionModel(config)


def build_yolos() -> nn.Module:
    """YOLOS: a ViT with detection tokens and two small heads."""
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, image_size=[16, 16],
        patch_size=4, num_detection_tokens=5, use_mid_position_embeddings=True, num_labels=4, layer_norm_eps=1e-5,
        attn_implementation="eager",
    )  # fmt: skip
    return YolosForObjectDetection(config)


def build_detr() -> nn.Module:
    """DETR: convolutional backbone, encoder, decoder with cross attention, class and box heads."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", out_features=["stage2"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=28,
        decoder_ffn_dim=24, num_queries=5, num_labels=4, attn_implementation="eager",
    )  # fmt: skip
    return DetrForObjectDetection(config)


def build_eva02() -> nn.Module:
    """EVA-02: rotary embeddings on queries and keys, SwiGLU with a norm inside."""
    from timm.models.eva import Eva

    return Eva(
        img_size=16, patch_size=4, num_classes=CLASSES, embed_dim=16, depth=2, num_heads=2, qkv_fused=False,
        mlp_ratio=2, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
    )  # fmt: skip


def build_cait() -> nn.Module:
    """CaiT: talking heads in the first blocks, class attention in the last."""
    from timm.models.cait import Cait

    return Cait(
        img_size=16, patch_size=4, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2,
        init_values=0.5, depth_token_only=1, mlp_ratio_token_only=2.0,
    )  # fmt: skip


def build_xcit() -> nn.Module:
    """XCiT: attention between channels, local patch interaction, class attention at the end."""
    from timm.models.xcit import Xcit

    return Xcit(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2,
        cls_attn_layers=1, use_pos_embed=False, eta=0.5, tokens_norm=True,
    )  # fmt: skip


def build_mvitv2() -> nn.Module:
    """MViTv2: pooled queries, keys and values with a norm per head, relative positions, residual pooling."""
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(
        depths=(1, 1), embed_dim=(12, 24), num_heads=(1, 2), mlp_ratio=2.0, stride_q=((1, 1), (2, 2)),
        stride_kv_adaptive=(2, 2),
    )  # fmt: skip
    return MultiScaleVit(config, img_size=(32, 32), num_classes=CLASSES)


def build_batchnorm_vit() -> nn.Module:
    """A ViT with BatchNorm in place of LayerNorm."""
    return PatchViT([PackedAttention(24, 3) for _ in range(2)], 24, 40, ChannelsFirstNorm)


def build_loop_heads() -> nn.Module:
    """A compact convolutional transformer with one loop per head."""
    return CompactTransformer(16, 2, 8, 28)


def build_linear_attention() -> nn.Module:
    """Two kinds of linear attention: softmax-free products per head, and a context vector."""
    return PatchViT([FocusedLinearAttention(24, 3), SeparableAttention(24)], 24, 40, nn.LayerNorm)


PIXELS = {"pixel_values": IMAGE["image"]}
LARGER = {"shape": [2, 3, 32, 32], "type": "float32"}
TEXT = {"shape": [2, 8], "type": "int64"}


def expect(sites: int, fixed: Mapping[str, str] | None = None, skipped: tuple[str, ...] = (), **groups: int) -> Any:
    """What a file must contain, as its JSON says it: groups by kind, and parts of the reasons why others stay."""
    return {"sites": sites, "groups": groups, "fixed": dict(fixed or {}), "skipped": list(skipped)}


def both(found: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Two exports in which the same is found."""
    return {"ts17_dyn": found, "dynamo18_dyn": found}


BLOCKS = {"qk": 2, "v": 2, "head": 2, "ffn": 2}  # two plain transformer blocks
OUTPUT = {"residual": "size of the model's output"}
NORMED = "a normalisation runs over it"
TIED = "its v size is tied to its query-key size"  # the pooled query is added to what attention gives
OTHER = "product of two activations outside softmax attention"

RECIPES: dict[str, Recipe] = {
    "hf_dinov2": Recipe(  # the classifier reads class token and mean side by side
        partial(build_dinov2, False), "transformers Dinov2ForImageClassification",
        both(expect(2, residual=1, **BLOCKS)), PIXELS, ("logits",),
    ),
    "hf_dinov2_swiglu": Recipe(
        partial(build_dinov2, True), "transformers Dinov2ForImageClassification with SwiGLU",
        both(expect(2, residual=1, **BLOCKS)), PIXELS, ("logits",),
    ),
    "hf_clip_vision": Recipe(
        partial(build_clip_vision, "eager"), "transformers CLIPVisionModelWithProjection",
        {"ts17_dyn": expect(2, OUTPUT, **BLOCKS)}, PIXELS, ("image_embeds", "last_hidden_state"),
    ),
    "hf_clip": Recipe(  # one block in each tower; the width both project to is contracted by the similarities
        partial(build_clip, "sdpa"), "transformers CLIPModel, SDPA",
        both(expect(2, skipped=(OTHER,), residual=2, **BLOCKS)),
        {
            "input_ids": {**TEXT, "below": 40},
            "pixel_values": IMAGE["image"],
            "attention_mask": {**TEXT, "mask": True},
        },
        ("logits_per_image", "logits_per_text"),
    ),
    "hf_siglip_vision": Recipe(  # one block and the head, which is attention and a feed-forward network as well
        build_siglip, "transformers SiglipVisionModel",
        both(expect(2, OUTPUT, **BLOCKS)), PIXELS, ("last_hidden_state", "pooler_output"),
    ),
    "hf_yolos": Recipe(  # each of its two heads has two hidden layers
        build_yolos, "transformers YolosForObjectDetection",
        both(expect(2, residual=1, **{**BLOCKS, "ffn": 6})), PIXELS, ("logits", "pred_boxes"),
    ),
    "hf_detr": Recipe(  # the box head has two hidden layers; streams: two of the ResNet, encoder, decoder
        build_detr, "transformers DetrForObjectDetection with a ResNet",
        both(expect(3, {"residual": "put together by Concat"}, qk=3, v=3, head=3, ffn=4, channel=2, residual=3)),
        {"pixel_values": LARGER}, ("logits", "pred_boxes"),
    ),
    "timm_eva02": Recipe(  # queries and keys go in rotation pairs
        build_eva02, "timm Eva as EVA-02",
        both(expect(2, {"ffn": NORMED}, qk=2, v=2, head=2, residual=1)),
    ),
    "timm_cait": Recipe(  # two blocks with heads before, between and behind the two mixing layers, and class attention
        build_cait, "timm Cait", both(expect(3, qk=3, v=3, ffn=3, head=2 * 3 + 1, residual=1))
    ),
    "timm_xcit": Recipe(  # one block over channels, one of class attention; the patches are embedded by three layers
        build_xcit, "timm Xcit",
        both(expect(2, skipped=("attention over channels",), qk=1, v=1, head=1, ffn=2, channel=2, residual=1)),
        {"image": LARGER},
    ),
    "timm_mvitv2": Recipe(  # a block of one head, then one of two
        build_mvitv2, "timm MultiScaleVit",
        {
            "ts17": expect(2, {"qk": NORMED, "head": "ScatterND"}, (TIED,) * 2, ffn=2, residual=2),
            "dynamo18_dyn": expect(2, {"qk": NORMED}, (TIED,) * 2, ffn=2, residual=2, head=1),
        },
        {"image": LARGER},
    ),
    "own_batchnorm_vit": Recipe(
        build_batchnorm_vit, "own ViT with BatchNorm", both(expect(2, residual=1, **BLOCKS))
    ),
    "own_loop_heads": Recipe(  # two blocks of two heads; the pooling at the end has a softmax but no queries
        build_loop_heads, "own compact convolutional transformer, one loop per head",
        both(expect(4, skipped=("not attention",), qk=4, v=4, ffn=2, channel=1, residual=1)),
    ),
    "own_linear_attention": Recipe(  # keys and values of the context vector share one width, which a projection reads
        build_linear_attention, "own ViT with linear attention",
        both(expect(0, skipped=("not attention", OTHER, OTHER), ffn=3, residual=1)),
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the work


def build(recipe: Recipe) -> nn.Module:
    """The recipe's model in evaluation mode with random parameters and running statistics."""
    from timm.layers import set_fused_attn

    set_fused_attn(False)
    torch.manual_seed(0)
    model = recipe.build().eval()
    generator = torch.Generator().manual_seed(1)
    randomise(model, generator)
    for owner in model.modules():
        if hasattr(owner, "running_mean"):
            owner.running_mean.normal_(0, 0.2, generator=generator)
            owner.running_var.uniform_(0.5, 1.5, generator=generator)
        if hasattr(owner, "running_mean") and owner.weight is not None and owner.weight.ndim == 1:
            owner.weight.data.add_(1)
    return Outputs(model, tuple(recipe.inputs), recipe.outputs).eval() if recipe.outputs else model


def make_inputs(recipe: Recipe, batch: int | None, seed: int) -> tuple[torch.Tensor, ...]:
    """Random inputs that fit; `batch` replaces the leading axis."""
    rng = np.random.default_rng(seed)
    found = []
    for spec in recipe.inputs.values():
        shape = [batch or spec["shape"][0], *spec["shape"][1:]]
        if spec.get("mask"):
            array = np.ones(shape)
            array[0, shape[-1] - 1 :] = 0
        elif "below" in spec:
            array = rng.integers(0, spec["below"], shape)
        else:
            array = rng.standard_normal(shape)
        found.append(torch.from_numpy(np.asarray(array).astype(spec["type"])))
    return tuple(found)


def export_model(model: nn.Module, recipe: Recipe, export: Export) -> onnx.ModelProto:
    """The ONNX model with all weights inside."""
    example = make_inputs(recipe, export.batch or 2, 2)
    outputs = list(recipe.outputs or ("logits",))
    names = {"input_names": list(recipe.inputs), "output_names": outputs, "opset_version": export.opset}
    with quiet(), torch.no_grad():
        if export.exporter == "torchscript":
            axes = {name: {0: "batch"} for name in [*recipe.inputs, *outputs]} if export.batch is None else None
            buffer = io.BytesIO()
            torch.onnx.export(model, example, buffer, dynamo=False, dynamic_axes=axes, **names)
            return onnx.load_from_string(buffer.getvalue())
        each = tuple({0: torch.export.Dim("batch")} for _ in example)
        shapes = None if export.batch is not None else (each,) if recipe.outputs else each
        program = torch.onnx.export(
            model, example, dynamo=True, dynamic_shapes=shapes, optimize=export.optimize, verbose=False, **names
        )
        return program.model_proto


def largest_difference(exported: onnx.ModelProto, model: nn.Module, recipe: Recipe, batch: int | None) -> float:
    """Largest difference between onnxruntime and torch over outputs and batches, relative to the output's range."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(exported.SerializeToString(), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for size in [batch] if batch else [1, 3]:
        inputs = make_inputs(recipe, size, size)
        with torch.no_grad():
            wanted = model(*inputs)
        feed = {name: tensor.numpy() for name, tensor in zip(recipe.inputs, inputs, strict=True)}
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for want, got in zip(wanted, session.run(None, feed), strict=True):
            if got.shape != tuple(want.shape):
                raise ValueError(f"the export returns {got.shape}, torch {tuple(want.shape)}")
            worst = max(worst, float(np.abs(got - want.numpy()).max() / np.abs(want.numpy()).max()))
    return worst


def write_export(name: str, recipe: Recipe, mark: str, folder: Path) -> None:
    """Export, check and write one file and its expectations."""
    export, model = Export.parse(mark), build(recipe)
    exported = export_model(model, recipe, export)
    strip(exported)
    exported.graph.ClearField("value_info")  # a quarter of the file
    onnx.checker.check_model(exported)
    difference = largest_difference(exported, model, recipe, export.batch)
    if not difference < TOLERANCE:
        raise ValueError(f"the export differs from torch by {difference:.2g}")
    opset = next(entry.version for entry in exported.opset_import if entry.domain == "")
    if opset != export.opset:
        raise ValueError(f"the export has opset {opset}")
    data = exported.SerializeToString()
    (folder / f"{name}_{mark}.onnx").write_bytes(data)
    inputs = {
        tensor: {**spec, "shape": [export.batch or spec["shape"][0], *spec["shape"][1:]]}
        for tensor, spec in recipe.inputs.items()
    }
    about = {
        "source": recipe.source,
        "exporter": f"{export.exporter}, opset {export.opset}",
        "inputs": inputs,
        "dynamic_batch": export.batch is None,
        **recipe.expect[mark],
    }
    (folder / f"{name}_{mark}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"{name}_{mark:16} {len(data) / 1000:6.1f} kB  {len(exported.graph.node):4} nodes  {difference:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write small exports of many families of vision models.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports/families)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose name contains TEXT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, recipe in RECIPES.items():
        for mark in recipe.expect:
            if options.only in f"{name}_{mark}":
                try:
                    write_export(name, recipe, mark, options.output)
                except Exception as error:  # one failing exporter must not hide the others
                    failed = True
                    lines = str(error).strip().splitlines()[:1]
                    print(f"{name}_{mark}: {type(error).__name__}: {lines}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
