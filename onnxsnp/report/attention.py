"""Attention maps of a run record as coloured pictures for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from onnxsnp.evaluation.rollout import from_png
from onnxsnp.report.extra import needed


def pictures(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page shows of `attention_maps`.

    Returns:
        images: data addresses; what; skipped; sites and rollout: name, distance, heads, grid, before and after as data
            addresses of one row per sample.

    Raises:
        ValueError, KeyError, TypeError: the record holds something else.
    """
    if not found:
        return None
    count = max(len(found["images"]), 1)
    rolled = found.get("rollout")
    return {
        "images": [address(_checked(one)) for one in found["images"]],
        "what": str(found["what"]),
        "sites": [{**site, **_rows(site, count), "kept": _kept(site)} for site in found["sites"]],
        "rollout": None if not rolled else {**rolled, **_rows(rolled, count), "kept": [0]},
        "skipped": found.get("skipped", []),
    }


def _kept(site: Mapping[str, Any]) -> list[int]:
    """Beside which head of the original each head of the pruned model is shown."""
    kept = site.get("kept")
    return [int(head) for head in (range(site["heads"][1]) if kept is None else kept)]


def _rows(site: Mapping[str, Any], count: int) -> dict[str, list[list[str]]]:
    """Per sample, one picture per head."""
    rows, columns = (int(size) for size in site["grid"])
    found = {}
    for name in ("before", "after"):
        strip = from_png(site[name])
        high, wide = strip.shape[0] // rows, strip.shape[1] // columns
        if strip.shape != (high * rows, wide * columns) or high < 1 or wide < 1:
            raise ValueError(f"a map of {strip.shape[0]} x {strip.shape[1]} is not a grid of {rows} x {columns}")
        found[name] = [
            _coloured(
                [strip[row * rows : (row + 1) * rows, head * columns : (head + 1) * columns] for head in range(wide)]
            )
            for row in range(min(high, count))
        ]
    return found


def _coloured(maps: list[np.ndarray]) -> list[str]:
    table = needed("matplotlib").colormaps["viridis"]
    found = []
    for one in maps:
        pixels = (table(one / 255.0)[..., :3] * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels).quantize(64)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", optimize=True)
        found.append(address(base64.b64encode(buffer.getvalue()).decode()))
    return found


def _checked(text: Any) -> str:
    """A thumbnail, once it is known to be a picture and nothing else."""
    from_png(text)
    return str(text)


def address(png: str) -> str:
    return f"data:image/png;base64,{png}"
