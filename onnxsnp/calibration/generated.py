"""Inputs made up when there is no data: dead-leaves pictures, token ids, masks, noise. Everything follows the seed.

Dead leaves (Lee, Mumford, Huang, "Occlusion models for natural images", IJCV 2001): discs that hide one another, with
radii drawn from a density ~ r⁻³, have the scale invariance, edges and occlusions of photographs. Networks trained on
them learn useful features (Baradad et al., "Learning to See by Looking at Noise", NeurIPS 2021), so activations on them
are closer to those on real pictures than on noise. Real data is still better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxsnp.calibration.preprocess import ImageTarget, Preprocess, axis_size, image_target
from onnxsnp.runtime import InputSpec, channel_axis, is_inverted

DEFAULT_SAMPLES = 256
DEFAULT_SEQUENCE = 128
DEFAULT_TOKENS = 1000

_SHORTEST = 0.25  # of the full length; every other sample is shorter
_OVERSAMPLING = 2  # discs are drawn at twice the size and averaged down: smooth edges, as a lens makes them
_MIN_RADIUS = 1.5  # pixels of the final picture
_COVERAGE = 3.0  # summed area of the discs over that of the picture: about exp(−3) = 5 % of the background is left


class GeneratedSource:
    """Made-up samples for any set of inputs; sample i depends on the seed and i alone.

    Args:
        specs: the inputs. The first axis is the batch and is left out of a sample.
        count: how many samples there are.
        seed: of everything.
        preprocess: for image inputs; None is the imagenet preset.
        sizes: dynamic sizes by symbol or by `input:axis`; else 224 (images) and 128 (sequences).
        token_bounds: exclusive upper bound of the ids of an integer input, by input name; else what the input says, or
            1000 where it says nothing.
    """

    parallel = True
    generated = True
    labels: np.ndarray | None = None

    def __init__(
        self,
        specs: Sequence[InputSpec],
        count: int,
        *,
        seed: int = 0,
        preprocess: Preprocess | None = None,
        sizes: Mapping[str, int] | None = None,
        token_bounds: Mapping[str, int] | None = None,
    ) -> None:
        self._specs, self._count, self._seed = specs, count, seed
        self._sizes, self._bounds = sizes, token_bounds or {}
        self._targets: dict[str, ImageTarget] = {
            spec.name: image_target(spec, preprocess, sizes) for spec in specs if channel_axis(spec) is not None
        }
        kind = "dead-leaves images" if self._targets else "random inputs"
        self.description = f"generated {kind} (real data would do better)"

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """The sample's number, as text."""
        return f"generated sample {index}"

    def load(self, index: int) -> dict[str, np.ndarray]:
        """One sample by input name, without batch axis."""
        rng = np.random.default_rng((self._seed, index))
        share = 1.0 if index % 2 == 0 else float(np.random.default_rng((self._seed, index, 1)).uniform(_SHORTEST, 1))
        return {spec.name: self._input(spec, rng, share) for spec in self._specs}

    def _input(self, spec: InputSpec, rng: np.random.Generator, share: float) -> np.ndarray:
        target = self._targets.get(spec.name)
        if target is not None:
            return target.normalise(dead_leaves(target.height, target.width, target.channels, rng))
        shape = tuple(axis_size(spec, axis, self._sizes, DEFAULT_SEQUENCE) for axis in range(1, len(spec.shape)))
        return generic_input(spec, shape, rng, self._bounds.get(spec.name), share)


def generic_input(
    spec: InputSpec,
    shape: tuple[int, ...],
    rng: np.random.Generator,
    token_bound: int | None = None,
    share: float = 1.0,
) -> np.ndarray:
    """One sample of an input that is not a picture, by its type, its name and the table it is looked up in.

    Masks (by name) let the first `share` of a sequence through, and everything where they are no list. Booleans: true.
    Integers: positions count up, of token types and segments the last third is 1, everything else is taken for token
    ids, uniform below `token_bound`, the input's own bound, or 1000. Floating point: standard normal.
    """
    name = spec.name.lower()
    if "mask" in name:
        return _mask(spec, shape, share)
    if spec.dtype.kind == "b":
        return np.ones(shape, spec.dtype)
    if spec.dtype.kind == "f":
        return rng.standard_normal(shape).astype(spec.dtype)
    bound = min(max(token_bound or spec.below or DEFAULT_TOKENS, 1), int(np.iinfo(spec.dtype).max))
    if "position" in name and shape:
        counted = np.minimum(np.arange(shape[-1]), (token_bound or spec.below or shape[-1]) - 1)
        return np.broadcast_to(counted.astype(spec.dtype), shape).copy()
    if "type" in name or "segment" in name:
        second = bool(shape) and spec.below is not None and spec.below > 1
        place = np.arange(shape[-1]) >= 2 * shape[-1] // 3 if second else np.zeros(())
        return np.broadcast_to(place, shape).astype(spec.dtype)
    return rng.integers(0, bound, shape).astype(spec.dtype)


def _mask(spec: InputSpec, shape: tuple[int, ...], share: float) -> np.ndarray:
    """1 (or 0 in what is called a padding mask) for what is there; a floating-point one hides nothing."""
    there = np.ones(shape, bool)
    if len(shape) == 1 and spec.dtype.kind in "iub":
        there = np.arange(shape[0]) < max(1, round(share * shape[0]))
    return (there != is_inverted(spec.name)).astype(spec.dtype)


def dead_leaves(height: int, width: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """One dead-leaves picture, uint8 (height, width, channels), channels 1 or 3."""
    from PIL import Image, ImageDraw

    palette = _palette(rng)
    size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    image = Image.new("RGB", size, tuple(palette[0].tolist()))
    draw = ImageDraw.Draw(image)
    radius = _radii(height, width, rng) * _OVERSAMPLING
    centre = rng.random((len(radius), 2)) * size
    colours = _disc_colours(palette, len(radius), rng)
    boxes = np.concatenate([centre - radius[:, None], centre + radius[:, None]], axis=1)
    for box, colour in zip(boxes.tolist(), colours.tolist(), strict=True):
        draw.ellipse(box, fill=tuple(colour))
    pixels = np.asarray(image.reduce(_OVERSAMPLING), dtype=np.float32)
    lit = np.clip(pixels * _light(height, width, rng)[:, :, None], 0, 255).astype(np.uint8)
    return lit if channels == 3 else lit.mean(axis=2, keepdims=True).astype(np.uint8)


def _radii(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Disc radii in pixels from the density r⁻³ between `_MIN_RADIUS` and half the short side, by inversion."""
    low = _MIN_RADIUS
    high = max(min(height, width) / 2, 2 * low)
    mean_area = 2 * np.pi * np.log(high / low) / (low**-2 - high**-2)
    count = max(int(_COVERAGE * height * width / mean_area), 1)
    uniform = rng.random(count)
    return (low**-2 - uniform * (low**-2 - high**-2)) ** -0.5


def _palette(rng: np.random.Generator) -> np.ndarray:
    """Sixty-four RGB colours along a smooth path through four random, muted ones (as photographs are), uint8."""
    anchors = 255 * (0.6 * rng.random((4, 3)) + 0.4 * rng.random((4, 1)))
    place = np.linspace(0, 3, 64)
    return np.stack([np.interp(place, np.arange(4), anchors[:, channel]) for channel in range(3)], axis=1).astype(
        np.uint8
    )


def _disc_colours(palette: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """One colour per disc, uint8 (count, 3): from the palette, with its own brightness."""
    brightness = np.exp(0.35 * rng.standard_normal((count, 1)))
    return np.clip(palette[rng.integers(0, len(palette), count)] * brightness, 0, 255).astype(np.uint8)


def _light(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Illumination (height, width) around 1 that changes linearly across the picture in a random direction."""
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4)
    rows, columns = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    return (1 + strength * (np.sin(angle) * rows + np.cos(angle) * columns)).astype(np.float32)
