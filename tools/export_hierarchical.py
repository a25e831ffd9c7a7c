"""Write small real exports of hierarchical, windowed and convolutional vision transformers for the tests.

They go to ``tests/exports/families``.  Every file comes from a real exporter (TorchScript or dynamo) run on a real
implementation (timm, torchvision, transformers) with random weights and tiny sizes, and is checked against torch in
onnxruntime.  What each must contain stands beside it, written by hand from the architecture (see
``tests/test_families.py``); this script writes no expectations.

Needs torch, timm, transformers, torchvision, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import torch
from export_timm import check_inputs, export_onnx, largest_difference
from export_tiny import Export, Logits, strip
from torch import nn

TOLERANCE = 1e-4
FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports" / "families"
CLASSES = 6


@dataclass(frozen=True)
class Recipe:
    """How to build one model, its image size, and the exports wanted of it (see ``export_tiny.Recipe``)."""

    build: Callable[[], nn.Module]
    image: int
    exports: str
    fused: bool = False


def build_swin(depths: tuple[int, ...], image: int, window: int) -> nn.Module:
    """timm's Swin, whose windows are shifted in the second block of a stage.

    Twelve places in a row are four windows of three, but six pairs to be merged.
    """
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=image, patch_size=2, window_size=window, embed_dim=8, depths=depths,
        num_heads=(2, 2)[: len(depths)], mlp_ratio=2, num_classes=CLASSES,
    )  # fmt: skip


def build_swin_torchvision(depths: list[int]) -> nn.Module:
    """torchvision's Swin, which merges patches with strided slices and a concatenation."""
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=depths, num_heads=[2, 2], window_size=[4, 4], mlp_ratio=2,
        num_classes=CLASSES,
    )  # fmt: skip


def small_bias_networks(model: nn.Module) -> nn.Module:
    """Narrow the networks that make Swin V2's position bias: they are folded into constants, and 512 wide."""
    for module in model.modules():
        if hasattr(module, "cpb_mlp"):
            hidden, heads = 16, module.num_heads
            module.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads, bias=False))
    return model


def build_swin_v2() -> nn.Module:
    """timm's Swin V2: cosine attention with a learned temperature, norms behind the branches."""
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    return small_bias_networks(SwinTransformerV2(
        img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(2, 1), num_heads=(2, 2), mlp_ratio=2,
        num_classes=CLASSES,
    ))  # fmt: skip


def build_swin_v2_torchvision() -> nn.Module:
    """torchvision's Swin V2."""
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    return small_bias_networks(SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4], mlp_ratio=2,
        num_classes=CLASSES, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    ))  # fmt: skip


def build_pvt() -> nn.Module:
    """timm's PVT v2: keys and values from a sequence reduced by a strided convolution in the first stage."""
    from timm.models.pvt_v2 import PyramidVisionTransformerV2

    return PyramidVisionTransformerV2(
        depths=(1, 1), embed_dims=(8, 16), num_heads=(2, 2), sr_ratios=(2, 1), mlp_ratios=(2, 2), num_classes=CLASSES
    )


def build_segformer(attention: str = "eager") -> nn.Module:
    """transformers' Segformer with its segmentation head, which joins the stages' channels."""
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=20, num_labels=CLASSES,
        attn_implementation=attention,
    )  # fmt: skip
    return Logits(transformers.SegformerForSemanticSegmentation(config))


def build_segformer_classifier() -> nn.Module:
    """transformers' Segformer as a classifier."""
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[2, 2], mlp_ratios=[2, 2], num_labels=CLASSES,
    )  # fmt: skip
    return Logits(transformers.SegformerForImageClassification(config))


def build_levit() -> nn.Module:
    """timm's LeViT: BatchNorm behind every projection, values twice as wide as keys, attention that downsamples."""
    from timm.models.levit import Levit

    return Levit(
        img_size=32, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3), stem_type="s8", num_classes=CLASSES
    )


def build_levit_conv() -> nn.Module:
    """timm's LeViT with 1x1 convolutions for projections."""
    from timm.models.levit import Levit

    return Levit(
        img_size=32, embed_dim=(16, 24), key_dim=4, depth=(1, 1), num_heads=(2, 3), stem_type="s8", use_conv=True,
        num_classes=CLASSES,
    )  # fmt: skip


def build_efficientformer() -> nn.Module:
    """timm's EfficientFormer: two convolutional stages, and attention blocks at the end of the second."""
    from timm.models.efficientformer import Attention, EfficientFormer

    model = EfficientFormer(
        depths=(1, 2), embed_dims=(8, 12), num_vit=1, mlp_ratios=2, img_size=32, num_classes=CLASSES
    )
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Attention):  # the real one has 8 heads of 32, 32 and 128 whatever the width
                setattr(module, name, Attention(12, key_dim=4, num_heads=2, attn_ratio=2, resolution=4))
    return model


def build_efficientformer_v2() -> nn.Module:
    """timm's EfficientFormer V2: heads mixed on either side of the softmax, a depthwise path beside the values."""
    from timm.models.efficientformer_v2 import Attention2d, Attention2dDownsample, EfficientFormerV2

    model = EfficientFormerV2(
        depths=(1, 1, 2, 1), embed_dims=(8, 8, 12, 12), num_vit=1, mlp_ratios=2, img_size=64, num_classes=CLASSES,
        distillation=False,
    )  # fmt: skip
    # the real ones have 8 heads of 32 and 128, or 16 and 64, whatever the width
    small = {"key_dim": 4, "num_heads": 2, "attn_ratio": 2}
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Attention2d):
                stride = 2 if child.stride_conv is not None else None
                size = child.resolution[0] * (stride or 1)
                setattr(module, name, Attention2d(12, resolution=size, stride=stride, **small))
            elif isinstance(child, Attention2dDownsample):
                setattr(module, name, Attention2dDownsample(12, out_dim=12, resolution=child.resolution[0], **small))
    return model


def build_mobilevit() -> nn.Module:
    """timm's MobileViT: inverted residuals, then attention over unfolded patches beside a convolutional path."""
    from timm.models.byobnet import ByobNet, ByoModelCfg
    from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block

    blocks = (
        _inverted_residual_block(d=1, c=8, s=1, br=2.0),
        _inverted_residual_block(d=2, c=10, s=2, br=2.0),
        _mobilevit_block(d=1, c=12, s=2, transformer_dim=16, transformer_depth=2, patch_size=2, br=2.0),
    )
    config = ByoModelCfg(
        blocks=blocks, stem_chs=8, stem_type="3x3", stem_pool="", downsample="", act_layer="silu", num_features=24
    )
    return ByobNet(config, num_classes=CLASSES)


def build_cvt() -> nn.Module:
    """transformers' CvT: depthwise convolutions in front of the projections, strided for keys and values."""
    import transformers

    config = transformers.CvtConfig(
        patch_sizes=[3, 3], patch_stride=[2, 2], patch_padding=[1, 1], embed_dim=[8, 16], num_heads=[1, 2],
        depth=[1, 2], mlp_ratio=[2.0, 2.0], attention_drop_rate=[0.0, 0.0], drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0], qkv_bias=[True, True], cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2],
        padding_q=[1, 1], stride_q=[1, 1], num_labels=CLASSES,
    )  # fmt: skip
    return Logits(transformers.CvtForImageClassification(config))


def build_maxvit() -> nn.Module:
    """timm's MaxViT: MBConv with squeeze and excitation, attention in windows and on a grid."""
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    config = MaxxVitCfg(
        embed_dim=(8, 16), depths=(1, 1), block_type=("M", "M"), stem_width=8,
        conv_cfg=MaxxVitConvCfg(expand_ratio=2.0, attn_ratio=0.5),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=4, expand_ratio=2.0, window_size=(4, 4), grid_size=(4, 4)),
    )  # fmt: skip
    return MaxxVit(config, img_size=32, num_classes=CLASSES)


def build_maxvit_torchvision() -> nn.Module:
    """torchvision's MaxViT."""
    from torchvision.models.maxvit import MaxVit

    return MaxVit(
        input_size=(32, 32), stem_channels=8, partition_size=4, block_channels=[8], block_layers=[1], head_dim=4,
        stochastic_depth_prob=0.0, squeeze_ratio=0.5, expansion_ratio=2, mlp_ratio=2, num_classes=CLASSES,
    )  # fmt: skip


RECIPES: dict[str, Recipe] = {
    "swin_timm_shift": Recipe(partial(build_swin, (2,), 16, 4), 16, "ts17"),
    "swin_timm": Recipe(partial(build_swin, (2, 1), 24, 3), 24, "dynamo18_dyn"),
    "swin_torchvision_merge": Recipe(partial(build_swin_torchvision, [1, 1]), 16, "ts17"),
    "swin_torchvision": Recipe(partial(build_swin_torchvision, [2, 1]), 16, "dynamo18_dyn"),
    "swinv2_timm": Recipe(build_swin_v2, 16, "dynamo18_dyn"),
    "swinv2_torchvision": Recipe(build_swin_v2_torchvision, 16, "ts17"),
    "pvtv2_timm": Recipe(build_pvt, 32, "ts17_dyn dynamo18_dyn", fused=True),
    "segformer_hf": Recipe(build_segformer, 32, "ts17_dyn"),
    "segformer_hf_classifier": Recipe(build_segformer_classifier, 32, "dynamo18_dyn"),
    "levit_timm": Recipe(build_levit, 32, "ts17_dyn"),
    "levit_timm_conv": Recipe(build_levit_conv, 32, "dynamo18_dyn"),
    "efficientformer_timm": Recipe(build_efficientformer, 32, "ts17_dyn dynamo18_dyn"),
    "efficientformerv2_timm": Recipe(build_efficientformer_v2, 64, "ts17_dyn dynamo18_dyn"),
    "mobilevit_timm": Recipe(build_mobilevit, 32, "ts17_dyn dynamo18_dyn"),
    "cvt_hf": Recipe(build_cvt, 32, "ts17 dynamo18_dyn"),
    "maxvit_timm": Recipe(build_maxvit, 32, "dynamo18_dyn"),
    "maxvit_torchvision": Recipe(build_maxvit_torchvision, 32, "ts17"),
}


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Random values for every parameter and running statistic, at scales at which errors of pruning show."""
    for owner in model.modules():
        norm = "Norm" in type(owner).__name__ and not isinstance(owner, nn.Sequential)
        for name, parameter in owner.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if norm and name == "weight":
                value = 1 + 0.2 * noise
            elif name == "logit_scale":
                value = 1 + 0.3 * noise
            elif name.startswith("gamma"):
                value = 0.8 + 0.2 * noise
            elif name.endswith("bias") and noise.ndim == 1:
                value = 0.2 * noise
            elif name == "weight":
                value = noise * noise[0].numel() ** -0.5
            else:
                value = 0.5 * noise
            parameter.data.copy_(value)
        for name, buffer in owner.named_buffers(recurse=False):
            if name == "running_mean":
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            elif name == "running_var":
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def build(recipe: Recipe) -> nn.Module:
    """The recipe's model in evaluation mode; the same for every export of the recipe."""
    from timm.layers import set_fused_attn

    set_fused_attn(recipe.fused)
    torch.manual_seed(0)
    model = recipe.build().eval()
    randomise(model, torch.Generator().manual_seed(1))
    return model.train().eval()  # drops what some modules cached of their parameters


def write_export(name: str, mark: str, recipe: Recipe, folder: Path) -> None:
    """Export, check and write one file."""
    export, model = Export.parse(mark), build(recipe)
    image = (3, recipe.image, recipe.image)
    example = torch.randn(export.batch or 2, *image, generator=torch.Generator().manual_seed(2))
    exported = export_onnx(
        model, example, exporter=export.exporter, opset=export.opset, dynamic=export.batch is None,
        optimize=export.optimize,
    )  # fmt: skip
    strip(exported)
    onnx.checker.check_model(exported)
    difference = largest_difference(exported, build(recipe), check_inputs(export.batch, image), relative=True)
    if not difference < TOLERANCE:
        raise ValueError(f"{name}_{mark} differs from torch by {difference:.2g}")
    opset = next(entry.version for entry in exported.opset_import if entry.domain == "")
    if opset != export.opset:
        raise ValueError(f"{name}_{mark} has opset {opset}")
    data, file = exported.SerializeToString(), f"{name}_{mark}.onnx"
    (folder / file).write_bytes(data)
    print(f"{file:48} {len(data) / 1000:6.1f} kB  {len(exported.graph.node):4} nodes  {difference:.1e}")


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write small real exports of hierarchical vision transformers.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports/families)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose name contains TEXT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name, recipe in RECIPES.items():
        for mark in recipe.exports.split():
            if options.only not in f"{name}_{mark}":
                continue
            try:
                write_export(name, mark, recipe, options.output)
            except Exception as error:  # one failing exporter must not hide the others
                failed = 1
                reason = str(error).strip().splitlines()[:1]
                print(f"export_hierarchical: {name}_{mark}: {type(error).__name__}: {reason}", file=sys.stderr)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
