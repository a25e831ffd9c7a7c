"""Write small real exports of the ViT / DeiT / BEiT family to ``tests/exports``, for the tests.

Every file comes from a real exporter (TorchScript or dynamo) run on a real implementation (timm, transformers,
torchvision, or one of the small models below), is checked against torch in onnxruntime, and is described in
``expected.json`` from the hyper-parameters it was built with, never from its graph.

Needs torch, timm, transformers, torchvision, onnx, onnxscript and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
import torch
from export_timm import check_inputs, export_onnx, largest_difference
from torch import nn

TOLERANCE = 1e-4
FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports"
IMAGE, PATCH, CLASSES, DEPTH = 16, 4, 10, 2
PATCHES = (IMAGE // PATCH) ** 2
PROTOBUF_LIMIT = 200_000


@dataclass(frozen=True)
class Arch:
    """Sizes of one model; ``ffn`` is the hidden width of every block."""

    width: int
    heads: int
    ffn: int
    qk_size: int
    v_size: int
    packed: bool = True
    depth: int = DEPTH


@dataclass(frozen=True)
class Recipe:
    """How to build one model, and the exports wanted of it.

    Each export is written as ``<exporter><opset>`` with the optional marks ``_noopt`` (the dynamo exporter without its
    optimisation step), ``_b<N>`` (a fixed batch other than 1) and ``_dyn`` (a free batch).
    """

    build: Callable[[Arch], nn.Module]
    arch: Arch
    source: str
    exports: str
    input_name: str = "image"
    fused: bool = False
    randomise: bool = True


@dataclass(frozen=True)
class Export:
    """One export, parsed from its mark."""

    exporter: str
    opset: int
    optimize: bool
    batch: int | None

    @classmethod
    def parse(cls, mark: str) -> Export:
        """Read e.g. ``ts17_dyn`` or ``dynamo18_noopt_b2``."""
        match = re.fullmatch(r"(ts|dynamo)(\d+)(_noopt)?(_dyn|_b(\d+))?", mark)
        if match is None:
            raise ValueError(f"cannot read the export {mark!r}")
        batch = None if match[4] == "_dyn" else int(match[5] or 1)
        exporter = "torchscript" if match[1] == "ts" else "dynamo"
        return cls(exporter, int(match[2]), match[3] is None, batch)


# ---------------------------------------------------------------------------------------------- small models of our own


class FlatAttention(nn.Module):
    """Packed projection cut on its flat last axis, before the heads are split; V may have its own head size."""

    def __init__(self, arch: Arch, cut: str) -> None:
        super().__init__()
        self.heads, self.qk_size, self.v_size, self.cut = arch.heads, arch.qk_size, arch.v_size, cut
        self.sizes = [arch.heads * arch.qk_size, arch.heads * arch.qk_size, arch.heads * arch.v_size]
        self.qkv = nn.Linear(arch.width, sum(self.sizes))
        self.proj = nn.Linear(self.sizes[2], arch.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over ``(batch, tokens, width)``."""
        batch, tokens, _ = x.shape
        packed = self.qkv(x)
        query, key, value = packed.chunk(3, dim=-1) if self.cut == "chunk" else packed.split(self.sizes, dim=-1)
        query = query.reshape(batch, tokens, self.heads, self.qk_size).transpose(1, 2)
        key = key.reshape(batch, tokens, self.heads, self.qk_size).permute(0, 2, 3, 1)
        value = value.reshape(batch, tokens, self.heads, self.v_size).transpose(1, 2)
        weights = ((query @ key) * self.qk_size**-0.5).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, self.heads * self.v_size))


class FlatTokenAttention(nn.Module):
    """Separate projections of tokens flattened to two dimensions, so that exporters write Gemm."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.heads, self.qk_size, self.v_size = arch.heads, arch.qk_size, arch.v_size
        self.query = nn.Linear(arch.width, arch.heads * arch.qk_size)
        self.key = nn.Linear(arch.width, arch.heads * arch.qk_size)
        self.value = nn.Linear(arch.width, arch.heads * arch.v_size)
        self.proj = nn.Linear(arch.heads * arch.v_size, arch.width)

    def _heads(self, x: torch.Tensor, batch: int, size: int) -> torch.Tensor:
        return x.reshape(batch, -1, self.heads, size).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over ``(batch, tokens, width)``."""
        batch, tokens, width = x.shape
        flat = x.reshape(batch * tokens, width)
        query = self._heads(self.query(flat), batch, self.qk_size)
        key = self._heads(self.key(flat), batch, self.qk_size)
        value = self._heads(self.value(flat), batch, self.v_size)
        weights = (query @ key.transpose(-2, -1) / self.qk_size**0.5).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch * tokens, self.heads * self.v_size)
        return self.proj(mixed).reshape(batch, tokens, width)


class OwnBlock(nn.Module):
    """One pre-norm block around a given attention."""

    def __init__(self, arch: Arch, attention: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(arch.width), attention
        self.norm2 = nn.LayerNorm(arch.width)
        self.mlp = nn.Sequential(nn.Linear(arch.width, arch.ffn), activation, nn.Linear(arch.ffn, arch.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual attention, residual feed-forward."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class OwnViT(nn.Module):
    """A plain vision transformer with a class token, written out by hand."""

    def __init__(self, arch: Arch, attention: str = "split", activation: str = "gelu") -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, arch.width, PATCH, PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, arch.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, PATCHES + 1, arch.width))
        blocks = [OwnBlock(arch, _own_attention(arch, attention), _activation(activation)) for _ in range(arch.depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(arch.width)
        self.head = nn.Linear(arch.width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of images."""
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def _own_attention(arch: Arch, kind: str) -> nn.Module:
    return FlatTokenAttention(arch) if kind == "gemm" else FlatAttention(arch, kind)


def _activation(kind: str) -> nn.Module:
    return {"gelu": nn.GELU(), "tanh": nn.GELU(approximate="tanh"), "relu": nn.ReLU()}[kind]


# ------------------------------------------------------------------------------------------------- models of libraries


class Logits(nn.Module):
    """A transformers model that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of images."""
        return self.model(pixel_values=pixel_values).logits


def _timm_sizes(arch: Arch) -> dict[str, object]:
    return {
        "img_size": IMAGE, "patch_size": PATCH, "num_classes": CLASSES, "embed_dim": arch.width,
        "depth": arch.depth, "num_heads": arch.heads, "mlp_ratio": (arch.ffn + 0.5) / arch.width,
    }  # fmt: skip


def build_timm(arch: Arch, **extra: object) -> nn.Module:
    """timm's VisionTransformer, which is also its DeiT."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**_timm_sizes(arch), **extra)


def build_distilled(arch: Arch) -> nn.Module:
    """timm's DeiT with a distillation token; its output is the average of the two heads."""
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**_timm_sizes(arch))


def build_beit(arch: Arch, **extra: object) -> nn.Module:
    """timm's BEiT: relative position bias, layer scale, no absolute position embedding."""
    from timm.models.beit import Beit

    return Beit(**_timm_sizes(arch), use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, **extra)


def build_transformers(arch: Arch, *, name: str, attention: str) -> nn.Module:
    """A transformers image classifier of the given class."""
    import transformers

    config = getattr(transformers, "DeiTConfig" if name.startswith("DeiT") else "ViTConfig")(
        image_size=IMAGE, patch_size=PATCH, num_labels=CLASSES, hidden_size=arch.width, num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads, intermediate_size=arch.ffn, attn_implementation=attention,
    )  # fmt: skip
    return Logits(getattr(transformers, name)(config))


def build_torchvision(arch: Arch) -> nn.Module:
    """torchvision's VisionTransformer, which uses nn.MultiheadAttention."""
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        image_size=IMAGE, patch_size=PATCH, num_layers=arch.depth, num_heads=arch.heads,
        hidden_dim=arch.width, mlp_dim=arch.ffn, num_classes=CLASSES,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- the files

SMALL = Arch(width=24, heads=3, ffn=40, qk_size=8, v_size=8)
PAIR = Arch(width=24, heads=2, ffn=44, qk_size=12, v_size=12)
LITTLE = Arch(width=16, heads=2, ffn=36, qk_size=8, v_size=8)
APART = Arch(width=24, heads=2, ffn=44, qk_size=12, v_size=12, packed=False)
UNEVEN = Arch(width=16, heads=2, ffn=36, qk_size=8, v_size=12)
NARROW = Arch(width=20, heads=2, ffn=36, qk_size=8, v_size=12, packed=False)

RECIPES: dict[str, Recipe] = {
    "timm_deit_eager": Recipe(
        build_timm, SMALL, "timm VisionTransformer, eager attention",
        "ts11 ts13 ts13_dyn ts17 ts17_dyn dynamo18 dynamo18_dyn dynamo18_noopt_dyn dynamo20_dyn",
    ),
    "timm_deit_sdpa": Recipe(
        build_timm, SMALL, "timm VisionTransformer, SDPA",
        "ts14 ts17 ts17_dyn dynamo18_b2 dynamo18_dyn dynamo20 dynamo20_noopt dynamo23_dyn", fused=True,
    ),
    "timm_fresh_eager": Recipe(
        build_timm, SMALL, "timm VisionTransformer at fresh initialisation: equal tensors are shared",
        "ts17_dyn", randomise=False,
    ),
    "timm_distilled_eager": Recipe(
        build_distilled, PAIR, "timm VisionTransformerDistilled: two tokens, averaged heads", "ts17_dyn"
    ),
    "timm_distilled_sdpa": Recipe(
        build_distilled, PAIR, "timm VisionTransformerDistilled: two tokens, averaged heads, SDPA", "dynamo18_dyn",
        fused=True,
    ),
    "timm_avgpool_eager": Recipe(
        partial(build_timm, class_token=False, global_pool="avg"), LITTLE,
        "timm VisionTransformer without class token, average pooling", "ts17_dyn dynamo20",
    ),
    "timm_layerscale_eager": Recipe(
        partial(build_timm, init_values=0.1), LITTLE, "timm VisionTransformer with LayerScale", "ts17_dyn dynamo18"
    ),
    "timm_nobias_eager": Recipe(
        partial(build_timm, qkv_bias=False), LITTLE, "timm VisionTransformer without QKV bias", "ts17_dyn dynamo18"
    ),
    "timm_beit_eager": Recipe(
        partial(build_beit, qkv_bias=True, global_pool="token"), LITTLE,
        "timm Beit: relative position bias, LayerScale, class token", "ts13 ts17_dyn dynamo18_dyn",
    ),
    "timm_beit_sdpa": Recipe(
        partial(build_beit, qkv_bias=True), LITTLE,
        "timm Beit: relative position bias, LayerScale, average over the patches, SDPA", "ts17 dynamo18",
        fused=True,
    ),
    "hf_vit_eager": Recipe(
        partial(build_transformers, name="ViTForImageClassification", attention="eager"), APART,
        "transformers ViTForImageClassification, eager attention", "ts17_dyn dynamo18", input_name="pixel_values",
    ),
    "hf_vit_sdpa": Recipe(
        partial(build_transformers, name="ViTForImageClassification", attention="sdpa"), APART,
        "transformers ViTForImageClassification, SDPA", "ts17 dynamo18 dynamo20_dyn dynamo23_dyn",
        input_name="pixel_values",
    ),
    "hf_deit_eager": Recipe(
        partial(build_transformers, name="DeiTForImageClassification", attention="eager"), APART,
        "transformers DeiTForImageClassification, eager attention", "ts17_dyn", input_name="pixel_values",
    ),
    "hf_deitteacher_sdpa": Recipe(
        partial(build_transformers, name="DeiTForImageClassificationWithTeacher", attention="sdpa"), APART,
        "transformers DeiTForImageClassificationWithTeacher, SDPA", "dynamo18_dyn", input_name="pixel_values",
    ),
    "torchvision_vit_mha": Recipe(
        build_torchvision, LITTLE, "torchvision VisionTransformer (nn.MultiheadAttention)",
        "ts17 ts17_dyn dynamo18 dynamo18_dyn",
    ),
    "own_flat_split": Recipe(
        partial(OwnViT, attention="split"), LITTLE, "own ViT: packed QKV, torch.split on the flat axis",
        "ts17_dyn dynamo18",
    ),
    "own_flat_chunk": Recipe(
        partial(OwnViT, attention="chunk"), LITTLE, "own ViT: packed QKV, torch.chunk on the flat axis",
        "ts17 dynamo18_dyn",
    ),
    "own_gemm": Recipe(
        partial(OwnViT, attention="gemm"), NARROW,
        "own ViT: separate Q, K, V on tokens flattened to 2-D, V heads larger than Q and K heads, heads x size unequal "
        "to the width", "ts17_dyn dynamo18",
    ),
    "own_tanh": Recipe(
        partial(OwnViT, activation="tanh"), LITTLE, "own ViT: packed QKV, tanh GELU", "ts17 dynamo20"
    ),
    "own_relu": Recipe(
        partial(OwnViT, activation="relu"), LITTLE, "own ViT: packed QKV, ReLU feed-forward", "ts17_dyn"
    ),
    "own_dv": Recipe(
        partial(OwnViT, attention="split"), UNEVEN, "own ViT: packed QKV with V heads larger than Q and K heads",
        "ts17_dyn dynamo18_dyn",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the work


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter random values at which errors of pruning show and attention is not uniform."""
    for owner in model.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(_rescaled(owner, name, noise))


def _rescaled(owner: nn.Module, name: str, noise: torch.Tensor) -> torch.Tensor:
    """Unit noise brought to the scale that suits the parameter."""
    if isinstance(owner, nn.LayerNorm) and name == "weight":
        return 1 + 0.2 * noise
    if name.startswith("gamma"):
        return 0.8 + 0.2 * noise
    if noise.ndim == 1:
        return 0.2 * noise
    if isinstance(owner, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
        return noise * noise[0].numel() ** -0.5
    return 0.5 * noise


def build(name: str, recipe: Recipe) -> nn.Module:
    """The recipe's model in evaluation mode; the same for every export of the recipe."""
    if name.startswith("timm"):
        from timm.layers import set_fused_attn

        set_fused_attn(recipe.fused)
    torch.manual_seed(0)
    model = recipe.build(recipe.arch).eval()
    if recipe.randomise:
        randomise(model, torch.Generator().manual_seed(1))
    return model


def strip(model: onnx.ModelProto) -> None:
    """Drop notes for people (stack traces, module names); nodes, values and their names stay."""
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    parts = [model.graph.node, model.graph.value_info, model.graph.input, model.graph.output, model.graph.initializer]
    for item in (item for part in parts for item in part):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")


def versions() -> dict[str, str]:
    """Versions of the libraries that made the files."""
    import timm
    import torchvision
    import transformers

    modules = {"torch": torch, "timm": timm, "transformers": transformers, "torchvision": torchvision}
    return {name: str(module.__version__).split("+")[0] for name, module in modules.items()}


def describe(name: str, recipe: Recipe, export: Export) -> dict[str, object]:
    """What the file must contain, from the hyper-parameters."""
    arch = recipe.arch
    library = {"hf": "transformers", "own": "torch"}.get(name.split("_")[0], name.split("_")[0])
    return {
        "source": f"{recipe.source} ({library} {versions()[library]})",
        "exporter": export.exporter,
        "opset": export.opset,
        "sites": arch.depth,
        "heads": arch.heads,
        "qk_size": arch.qk_size,
        "v_size": arch.v_size,
        "ffn": [arch.ffn] * arch.depth,
        "width": arch.width,
        "input": {"name": recipe.input_name, "shape": [export.batch or 2, 3, IMAGE, IMAGE]},
        "dynamic_batch": export.batch is None,
        "packed": arch.packed,
    }


def write_export(name: str, recipe: Recipe, mark: str, folder: Path) -> tuple[str, dict[str, object]]:
    """Export, check and write one file; returns its name and its entry of ``expected.json``."""
    export, model = Export.parse(mark), build(name, recipe)
    example = torch.randn(export.batch or 2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2))
    exported = export_onnx(
        model, example, exporter=export.exporter, opset=export.opset, dynamic=export.batch is None,
        optimize=export.optimize, input_name=recipe.input_name,
    )  # fmt: skip
    strip(exported)
    onnx.checker.check_model(exported)
    difference = largest_difference(exported, model, check_inputs(export.batch, (3, IMAGE, IMAGE)))
    data = exported.SerializeToString()
    file = f"{name}_{mark}.onnx"
    if not difference < TOLERANCE:
        raise ValueError(f"{file} differs from torch by {difference:.2g}")
    opset = next(entry.version for entry in exported.opset_import if entry.domain == "")
    if opset != export.opset:
        raise ValueError(f"{file} has opset {opset}")
    if len(data) > PROTOBUF_LIMIT:
        raise ValueError(f"{file} is too large: {len(data)} bytes")
    (folder / file).write_bytes(data)
    print(f"{file:48} {len(data) / 1000:6.1f} kB  {len(exported.graph.node):4} nodes  {difference:.1e}")
    return file, describe(name, recipe, export)


def write_readme(expected: dict[str, dict[str, object]], folder: Path) -> None:
    """A paragraph and a table of the files."""
    made = ", ".join(f"{name} {version}" for name, version in versions().items())
    lines = [
        "# Small real exports",
        "",
        f"Written by `tools/export_tiny.py` with {made} and checked against torch in onnxruntime. Images are "
        f"{IMAGE}x{IMAGE} with patch {PATCH} ({PATCHES} patches), {CLASSES} classes, {DEPTH} blocks. The weights are "
        "random and not trained; except in `timm_fresh_*`, which keeps its initial values, every parameter is "
        "randomised so that attention is far from uniform and no two parameters are equal. Notes for people (stack "
        "traces, module names) are removed from the nodes, nothing else. Marks: `ts` TorchScript, `dynamo` "
        "torch.export, then the opset; `dyn` free batch, `b2` a fixed batch of 2 (otherwise 1), `noopt` without the "
        "exporter's optimisation. `expected.json` holds the sizes each model was built with; the input shape there "
        "has a batch of 2 where the batch is free.",
        "",
        "| file | source | heads x qk / v | FFN | width | packed QKV |",
        "|---|---|---|---|---|---|",
    ]
    for file, entry in sorted(expected.items()):
        sizes = f"{entry['heads']} x {entry['qk_size']} / {entry['v_size']}"
        packed = "yes" if entry["packed"] else "no"
        hidden = entry["ffn"][0]  # type: ignore[index]
        lines.append(f"| `{file}` | {entry['source']} | {sizes} | {hidden} | {entry['width']} | {packed} |")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_all(folder: Path, only: str) -> list[str]:
    """Write the wanted files and the two lists; returns the errors."""
    listing = folder / "expected.json"
    expected = json.loads(listing.read_text(encoding="utf-8")) if only and listing.exists() else {}
    errors = []
    for name, recipe in RECIPES.items():
        for mark in recipe.exports.split():
            if only not in f"{name}_{mark}":
                continue
            try:
                file, entry = write_export(name, recipe, mark, folder)
                expected[file] = entry
            except Exception as error:  # one failing exporter must not hide the others
                errors.append(f"{name}_{mark}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    listing.write_text(json.dumps(dict(sorted(expected.items())), indent=1) + "\n", encoding="utf-8")
    write_readme(expected, folder)
    return errors


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the small real exports that the tests use.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose name contains TEXT")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    errors = write_all(options.output, options.only)
    size = sum(path.stat().st_size for path in options.output.iterdir() if path.is_file())
    print(f"{options.output}: {size / 1e6:.2f} MB")
    for error in errors:
        print(f"export_tiny: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
