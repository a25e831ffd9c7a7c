"""Variants of images that need no label: mirrored, cropped and resized, lighter or darker; never of anything else.

They are made of the numbers a model is fed, after preprocessing, so that arrays can be varied as pictures can. Original
and pruned model see the same variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt

import numpy as np

from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.runtime import InputSpec, channel_axis, image_spec

_AREA = (0.7, 1.0)  # share of the picture that a crop keeps
_RATIO = (4 / 5, 5 / 4)  # width to height of a crop, relative to the picture's
_JITTER = 0.2  # brightness, contrast and saturation are multiplied by 1 ± this
_GREY = np.asarray((0.299, 0.587, 0.114), np.float32)  # ITU-R BT.601 luma of R, G, B


@dataclass(frozen=True)
class Augmentation:
    """Varies the image input of a model.

    Attributes:
        name: of the input.
        last: whether the channels are the last axis.
        mean, std: per channel, or one for all: pixels are `x · std + mean`.
        order: slots of red, green and blue; empty for grey pictures.
    """

    name: str
    last: bool
    mean: np.ndarray
    std: np.ndarray
    order: tuple[int, ...]

    def __call__(self, inputs: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The same inputs with other images; nothing is changed in place."""
        images = inputs[self.name]
        varied = np.stack([self._vary(image, rng) for image in images])
        return {**inputs, self.name: varied}

    def _vary(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        planes = np.moveaxis(image, -1, 0) if self.last else image
        x = planes.astype(np.float32)
        if rng.random() < 0.5:
            x = x[:, :, ::-1]
        x = self._jitter(resized_crop(x, *_window(x.shape[1], x.shape[2], rng)), rng)
        if image.dtype.kind == "u":
            x = np.rint(x)
        x = x.astype(image.dtype)
        return np.ascontiguousarray(np.moveaxis(x, 0, -1) if self.last else x)

    def _jitter(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Brightness, contrast and saturation, within the range that each channel has."""
        bright, contrast, saturation = rng.uniform(1 - _JITTER, 1 + _JITTER, 3)
        low, high = (bound(x, axis=(1, 2), keepdims=True) for bound in (np.min, np.max))
        pixels = (x * self.std + self.mean) * np.float32(bright)
        grey = np.tensordot(_GREY, pixels[list(self.order)], 1) if self.order else pixels[0]
        pixels = grey.mean() + (pixels - grey.mean()) * np.float32(contrast)
        if self.order:
            grey = np.tensordot(_GREY, pixels[list(self.order)], 1)
            pixels = grey + (pixels - grey) * np.float32(saturation)
        varied: np.ndarray = np.clip((pixels - self.mean) / self.std, low, high)
        return varied


def augmentation(specs: Sequence[InputSpec], preprocess: Preprocess | None) -> Augmentation | None:
    """How the images of a model are varied; None if it takes none.

    Args:
        preprocess: how pictures become inputs; None: they are pixels.
    """
    spec = image_spec(specs)
    if spec is None:
        return None
    last = channel_axis(spec) == 3
    grey = spec.shape[3 if last else 1] == 1
    given = preprocess or Preprocess(mean=(0.0,), std=(1.0,), scale=1.0)
    if spec.dtype.kind == "u":  # such a model normalises by itself
        given = Preprocess(mean=(0.0,), std=(1.0,), scale=1.0)
    mean, std = (_planes(values, grey) for values in (given.mean, given.std))
    order = () if grey else ((0, 1, 2) if given.color == "RGB" else (2, 1, 0))
    return Augmentation(spec.name, last, mean, std, order)


def resized_crop(x: np.ndarray, top: float, left: float, height: float, width: float) -> np.ndarray:
    """A window of planes [channels, height, width], brought to their size by bilinear interpolation.

    Args:
        top, left, height, width: of the window, in pixels.
    """
    rows, columns = x.shape[1:]
    low, high, share = _places(rows, top, height)
    x = x[:, low] * (1 - share)[:, None] + x[:, high] * share[:, None]
    low, high, share = _places(columns, left, width)
    found: np.ndarray = x[:, :, low] * (1 - share) + x[:, :, high] * share
    return found


def _places(size: int, start: float, length: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` pixel centres, the two pixels of the window it lies between, and how far along."""
    at = np.clip(start + (np.arange(size) + 0.5) * length / size - 0.5, 0, size - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)


def _window(rows: int, columns: int, rng: np.random.Generator) -> tuple[float, float, float, float]:
    area, ratio = rng.uniform(*_AREA), exp(rng.uniform(log(_RATIO[0]), log(_RATIO[1])))
    height, width = min(sqrt(area / ratio), 1.0) * rows, min(sqrt(area * ratio), 1.0) * columns
    return rng.uniform(0, rows - height), rng.uniform(0, columns - width), height, width


def _planes(values: Sequence[float], grey: bool) -> np.ndarray:
    array = np.asarray(values, np.float32)
    return (array.mean(keepdims=True) if grey else array).reshape(-1, 1, 1)
