"""Attention maps of the original and of the pruned model on a few samples: per head, and rolled out over the depth.

Rollout follows Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020, arXiv 2005.00928), eq. 1: with
the residual connection as half of every layer, Ã = (W + I) / 2, and what reaches the last layer is Ã_L · … · Ã_1.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from onnxsnp.analysis import Analysis
from onnxsnp.calibration.data import Batch
from onnxsnp.graph.attention import Site
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.ir import Graph
from onnxsnp.planning.plan import Plan
from onnxsnp.runtime import channel_axis, image_spec

_PREFIX = 8  # tokens before those of the picture, at most: class, distillation, registers
_TOKENS = 64  # a model without pictures shows whole maps of at most this many tokens
_ELEMENTS = 1 << 27  # probabilities that are held at once
_SIDE = 128  # of a thumbnail, pixels


def attention_maps(
    analysis: Analysis,
    cut: Graph,
    batch: Batch,
    plan: Plan,
    *,
    images: int = 3,
    threads: int | None = None,
    provider: str = "cpu",
) -> dict[str, Any]:
    """What both models attend to, as plain data for the run record.

    Args:
        cut: the pruned graph of the same analysis.
        batch: inputs; its first samples are shown.
        plan: what was cut, for which heads are left.
        images: how many samples.

    Returns:
        images: thumbnails (PNG, base64) as the model sees them, empty where no input is a picture.
        what: which row of the attention the maps show.
        sites: name, heads [original, pruned], kept (which of the original's heads the pruned ones are; None where that
            is not known), distance (total variation per kept head, mean over samples and queries, 0..1), before, after
            (grey PNG, base64: one row per sample, one column per head), grid [height, width] of one map.
        rollout: before, after, distance, grid; None where tokens change on the way, a sequence reads
            another, or a site has no map.
        skipped: name and reason of sites without maps.
    """
    shape = _picture(analysis)
    count = min(images, batch.count)
    skipped: list[dict[str, str]] = []
    found: list[tuple[Site, np.ndarray, np.ndarray]] = []
    for site, pair in _probabilities(analysis, cut, batch, threads, provider, skipped):
        before, after = (by_head(one, len(next(iter(batch.inputs.values())))) for one in pair)
        if before is None or after is None:
            skipped.append({"name": site.name, "reason": "not one map per sample and head (windows, or merged axes)"})
        else:
            found.append((site, before[:count], after[:count]))
    sites = []
    for site, before, after in found:
        shown = drawn(before, after, shape)
        if isinstance(shown, str):
            skipped.append({"name": site.name, "reason": shown})
            continue
        kept = _kept(analysis, plan, site, before.shape[1], after.shape[1])
        same = kept is not None and before.shape[2:] == after.shape[2:]
        distance = 0.5 * np.abs(before[:, kept] - after).sum(-1).mean(axis=(0, 2)) if same else None
        sites.append(
            {
                "name": site.name,
                "heads": [before.shape[1], after.shape[1]],
                "kept": kept,
                "distance": None if distance is None else [round(float(value), 4) for value in distance],
                **shown,
            }
        )
    return {
        "images": _thumbnails(analysis, batch, count) if shape is not None else [],
        "what": "from the first token (the class token) to the patches; where there is none, the mean over all tokens"
        if shape is not None
        else "from every token (rows) to every token (columns)",
        "sites": sites,
        "rollout": _rolled([pair[1:] for pair in found], shape) if _one_sequence(analysis) and not skipped else None,
        "skipped": skipped,
    }


def _kept(analysis: Analysis, plan: Plan, site: Site, before: int, after: int) -> list[int] | None:
    """Which of the original's heads a site still has, in order."""
    index = analysis.structure.sites.index(site)
    for entry in plan.groups:
        if entry.kind == "head" and index in analysis.groups[entry.id].sites:
            whole = entry.size == before and entry.kept == after
            return list(entry.keep[0]) if whole else None  # heads that share keys are counted differently
    return list(range(before)) if before == after else None


def rollout(layers: Sequence[np.ndarray]) -> np.ndarray:
    """Attention rollout (Abnar & Zuidema 2020, eq. 1), heads averaged.

    Args:
        layers: per layer [samples, heads, tokens, tokens], rows add up to one.

    Returns:
        [samples, tokens, tokens]; rows add up to one.
    """
    joint = np.broadcast_to(np.eye(layers[0].shape[-1]), (len(layers[0]), *layers[0].shape[-2:]))
    for layer in layers:
        joint = (layer.mean(axis=1) + np.eye(layer.shape[-1])) / 2 @ joint
    return joint


def by_head(values: np.ndarray, samples: int) -> np.ndarray | None:
    """Probabilities as [samples, heads, queries, keys]: keys are the axis over which they add up to one.

    Returns:
        None where samples and heads have no such axes: attention in windows, say.
    """
    values = values.astype(np.float64)
    over = [axis for axis in range(values.ndim) if np.allclose(values.sum(axis=axis), 1, atol=1e-2)]
    if not over or values.ndim not in (3, 4) or over[-1] == 0:
        return None
    values = np.moveaxis(values, over[-1], -1)
    if values.ndim == 3:
        heads, rest = divmod(len(values), samples)
        return values.reshape(samples, heads, *values.shape[1:]) if heads and not rest else None
    return values if len(values) == samples else None


def grid_of(tokens: int, shape: tuple[int, int]) -> tuple[int, int, int] | None:
    """How tokens lie on a picture: (tokens before those of the picture, rows, columns); None if they do not.

    Args:
        shape: height and width of the picture in pixels.
    """
    for prefix in range(min(_PREFIX, tokens - 1) + 1):
        rows = round(((tokens - prefix) * shape[0] / shape[1]) ** 0.5)
        if rows and (tokens - prefix) % rows == 0 and rows * shape[1] == (tokens - prefix) // rows * shape[0]:
            return prefix, rows, (tokens - prefix) // rows
    return None


def drawn(before: np.ndarray, after: np.ndarray, shape: tuple[int, int] | None) -> dict[str, Any] | str:
    """Both models' maps on one scale per sample; the reason where they cannot be drawn.

    Args:
        before, after: [samples, heads, queries, keys].
        shape: height and width of the picture; None where there is none.
    """
    maps = []
    for values in (before, after):
        if shape is None:
            if max(values.shape[-2:]) > _TOKENS:
                return f"{values.shape[-2]} x {values.shape[-1]} tokens are too many to draw"
            maps.append(values)
            continue
        place = grid_of(values.shape[-1], shape)
        if place is None:
            return f"{values.shape[-1]} tokens do not lie on a grid over the picture"
        prefix, rows, columns = place
        # the class token comes first; without one every patch has the same say
        row = values[:, :, 0] if prefix and values.shape[-2] == values.shape[-1] else values.mean(axis=2)
        maps.append(row[..., prefix:].reshape(*row.shape[:2], rows, columns))
    top = np.maximum(*(one.max(axis=(1, 2, 3)) for one in maps))
    top = np.maximum(top, np.finfo(np.float64).tiny)[:, None, None, None]
    names = ("before", "after")
    strips = {name: _png(_strip(one / top)) for name, one in zip(names, maps, strict=True)}
    return {**strips, "grid": list(maps[0].shape[2:])}


def _strip(maps: np.ndarray) -> np.ndarray:
    """[samples, heads, h, w] in 0..1 → one grey picture, samples below each other and heads side by side.

    Brightness is the square root, since most heads look at a few places much more than at others.
    """
    samples, heads, height, width = maps.shape
    levels = np.sqrt(maps.transpose(0, 2, 1, 3).reshape(samples * height, heads * width))
    return (levels * 255).round().astype(np.uint8)


def _one_sequence(analysis: Analysis) -> bool:
    """Whether the same tokens read each other at all sites: no windows, no second sequence that reads a first."""
    sites = analysis.structure.sites
    tokens = {analysis.dependencies.atoms(*axis) for site in sites for axis in (site.query_tokens, site.key_tokens)}
    return len(tokens) == 1


def _rolled(pairs: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int] | None) -> dict[str, Any] | None:
    sizes = {one.shape[-2:] for pair in pairs for one in pair}
    if len(sizes) != 1 or len(set(*sizes)) != 1:
        return None
    before, after = (rollout([pair[which] for pair in pairs])[:, None] for which in (0, 1))
    shown = drawn(before, after, shape)
    if isinstance(shown, str):
        return None
    return {**shown, "distance": round(float(0.5 * np.abs(before - after).sum(-1).mean()), 4)}


def _probabilities(
    analysis: Analysis,
    cut: Graph,
    batch: Batch,
    threads: int | None,
    provider: str,
    skipped: list[dict[str, str]],
) -> list[tuple[Site, tuple[np.ndarray, np.ndarray]]]:
    """What multiplies the values at every site, in both graphs."""
    nodes = {node.name: node for node in analysis.graph.nodes}
    there = {name for node in cut.nodes for name in node.output}
    names: dict[str, Site] = {}
    for site in analysis.structure.sites:
        operands = [name for name in nodes[site.mix].input if name != site.value[0]]
        if len(operands) != 1 or operands[0] not in there:
            skipped.append({"name": site.name, "reason": "its probabilities are no tensor of their own in both models"})
        else:
            names[operands[0]] = site
    shapes = analysis.dependencies.facts.shapes
    size = sum(int(np.prod(shapes[name])) for name in names) * len(next(iter(batch.inputs.values())))
    if size > _ELEMENTS:
        skipped += [{"name": site.name, "reason": "its maps are too large to keep"} for site in names.values()]
        return []
    if not names:
        return []
    values = [
        graph.session(list(names), threads=threads, provider=provider).run(list(names), batch.inputs)
        for graph in (analysis.graph, cut)
    ]
    return list(zip(names.values(), zip(*values, strict=True), strict=True))


def _picture(analysis: Analysis) -> tuple[int, int] | None:
    """Height and width of the picture that the model reads, as it was analysed."""
    spec = image_spec(graph_inputs(analysis.graph))
    if spec is None:
        return None
    shape = analysis.dependencies.facts.shapes[spec.name]
    first = 1 if channel_axis(spec) == 3 else 2
    return shape[first], shape[first + 1]


def _thumbnails(analysis: Analysis, batch: Batch, count: int) -> list[str]:
    """The first samples with their contrast stretched, since what the mean and scale were is not known here."""
    spec = image_spec(graph_inputs(analysis.graph))
    if spec is None:
        return []
    found = []
    for pixels in np.asarray(batch.inputs[spec.name][:count], np.float64):
        last = pixels if channel_axis(spec) == 3 else np.moveaxis(pixels, 0, -1)
        low, high = float(last.min()), float(last.max())
        scaled = ((last - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
        picture = scaled[..., 0] if scaled.shape[-1] == 1 else scaled[..., :3]
        found.append(_png(picture, _SIDE))
    return found


def _png(pixels: np.ndarray, side: int | None = None) -> str:
    """A picture as base64 PNG, at most `side` pixels wide and high."""
    image = Image.fromarray(pixels)
    if side is not None:
        image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def from_png(text: Any) -> np.ndarray:
    """A grey picture from a record, [height, width] in 0..255.

    Raises:
        ValueError: not such a picture, or one of more than four million pixels.
    """
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.width * image.height > 4 << 20:
                raise ValueError("the picture is too large")
            return np.asarray(image.convert("L"))
    except (OSError, TypeError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a picture: {error}") from error
