"""From a picture to the numbers a model expects: resize, crop, scale, normalise.

The resize rule, for a model of size S: a picture that is exactly S is used as it is; any other is resized so that its
short side is S·256/224 (for S below 100: S itself) and then cropped to S around its centre. A 256×256 picture for a
224 model is therefore only cropped.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsnp.errors import DataError
from onnxsnp.runtime import InputSpec, channel_axis

if TYPE_CHECKING:
    from PIL import Image

DEFAULT_IMAGE_SIZE = 224
MAX_PIXELS = 89_478_485  # of one picture, decoded or resized: Pillow's own threshold for a decompression bomb
MAX_SIDE = 2**15
_DIRECT_BELOW = 100
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
_COLORS = ("RGB", "BGR")


def _require(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown {name} {value!r} in preprocessing", hint=f"{guess}use one of {', '.join(allowed)}")


@dataclass(frozen=True)
class Preprocess:
    """How pixels become model inputs: `(pixel · scale − mean) / std`, per channel, pixels 0..255.

    Attributes:
        mean, std: one number for all channels, or one per channel in the order of `color`.
        scale: applied to the pixels first.
        resize: short side in pixels before the crop; None: the rule of this module. Never below the model's size.
        crop: side in pixels for a model whose image size is dynamic; a fixed model size always wins.
        interpolation: nearest, bilinear, bicubic, lanczos, box or hamming (all antialiased as Pillow does it).
        color: RGB or BGR. A model with one channel gets grey pictures and the average of `mean` and of `std`.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    scale: float = 1 / 255
    resize: int | None = None
    crop: int | None = None
    interpolation: str = "bicubic"
    color: str = "RGB"

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) not in (1, 3):
            raise DataError(
                f"preprocessing needs 1 or 3 numbers for mean and std, got {len(self.mean)} and {len(self.std)}"
            )
        if not all(math.isfinite(value) for value in (*self.mean, *self.std, self.scale)):
            raise DataError("preprocessing mean, std and scale must be finite numbers")
        if min(self.std) <= 0:
            raise DataError(f"preprocessing std must be above 0, got {min(self.std)}")
        for name, value in (("resize", self.resize), ("crop", self.crop)):
            if value is not None and not 1 <= value <= MAX_SIDE:
                raise DataError(f"preprocessing {name} must be 1 to {MAX_SIDE} pixels, got {value}")
        _require("interpolation", self.interpolation, _INTERPOLATIONS)
        _require("color", self.color, _COLORS)


# name: the numbers, and whether the picture is resized straight to the model's size (as CLIP's own transform does).
# raw feeds the pixels unchanged, 0..255: for models that normalise inside the graph.
_PRESETS: dict[str, tuple[Preprocess, bool]] = {
    "imagenet": (Preprocess(), False),
    "half": (Preprocess(mean=(0.5,), std=(0.5,)), False),
    "clip": (
        Preprocess(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
        True,
    ),
    "raw": (Preprocess(mean=(0.0,), std=(1.0,), scale=1.0), False),
}
PRESETS = tuple(_PRESETS)


def default_resize(size: int) -> int:
    """Short side in pixels before the crop to `size`: size·256/224 rounded, or `size` itself below 100."""
    return size if size < _DIRECT_BELOW else round(size * 256 / 224)


def resolve_preprocess(
    name_or_path: str | Path | None, metadata: Mapping[str, str], size: int | tuple[int, int]
) -> Preprocess:
    """The preprocessing asked for, with resize and crop filled in for a model of this image size.

    Args:
        name_or_path: `imagenet`, `half`, `clip`, `raw` (pixels 0..255 unchanged) or a TOML file with the fields of
            `Preprocess`. None takes `mean` and `std` from the model's metadata (numbers separated by spaces or
            commas, for pixels scaled to 0..1) when both are there, else imagenet.
        metadata: the model's own key-value metadata.
        size: image size of the model in pixels, one side or (height, width).

    Raises:
        DataError: an unknown preset (with the nearest name), or a file or metadata that makes no sense.
    """
    short = size if isinstance(size, int) else min(size)
    direct = False
    if name_or_path is None:
        chosen = _from_metadata(metadata)
    elif str(name_or_path) in _PRESETS:
        chosen, direct = _PRESETS[str(name_or_path)]
    elif str(name_or_path).endswith(".toml"):
        chosen = _from_toml(Path(name_or_path))
    else:
        near = difflib.get_close_matches(str(name_or_path).lower(), PRESETS, n=1, cutoff=0.5)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(
            f"unknown preprocessing {str(name_or_path)!r}", hint=f"{guess}use {', '.join(PRESETS)} or a .toml file"
        )
    if chosen.resize is None:
        chosen = replace(chosen, resize=short if direct else default_resize(short))
    return chosen if chosen.crop is not None else replace(chosen, crop=short)


@dataclass(frozen=True)
class ImageTarget:
    """The one place where a picture becomes a sample of a model's image input.

    Attributes:
        spec: the image input.
        preprocess: how.
        height, width: in pixels.
        channels: 1 or 3.
        axis: where the channels are, 1 (NCHW) or 3 (NHWC).
    """

    spec: InputSpec
    preprocess: Preprocess
    height: int
    width: int
    channels: int
    axis: int

    def prepare(self, image: Image.Image) -> np.ndarray:
        """A picture as one sample without batch axis, in the layout and type of the input."""
        return self.normalise(np.asarray(self.fit(image)))

    def fit(self, image: Image.Image) -> Image.Image:
        """The picture in grey or RGB, resized and cropped to (height, width) by the rule of this module.

        Raises:
            DataError: a sliver so thin that the resized picture would not fit in memory.
        """
        from PIL import Image

        image = image.convert("L" if self.channels == 1 else "RGB")
        width, height = image.size
        if (height, width) == (self.height, self.width):
            return image
        short = min(self.height, self.width)
        resize = max(self.preprocess.resize or default_resize(short), short)
        # The smallest picture of the same proportions that covers the target enlarged by resize / short.
        ratio = max(self.height / height, self.width / width) * resize / short
        new = (max(round(width * ratio), self.width), max(round(height * ratio), self.height))
        if new[0] * new[1] > MAX_PIXELS:
            raise DataError(f"a picture of {width}×{height} pixels is too long and thin to be resized")
        if new != image.size:
            image = image.resize(new, Image.Resampling[self.preprocess.interpolation.upper()])
        left, top = (new[0] - self.width) // 2, (new[1] - self.height) // 2
        return image.crop((left, top, left + self.width, top + self.height))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (height, width[, 3]) uint8 as one sample. A uint8 input gets the pixels themselves."""
        pixels = pixels.reshape(self.height, self.width, self.channels)
        if self.preprocess.color == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.spec.dtype != np.uint8:
            mean, std = (_per_channel(values, self.channels) for values in (self.preprocess.mean, self.preprocess.std))
            pixels = (pixels.astype(np.float32) * np.float32(self.preprocess.scale) - mean) / std
        layout = pixels.transpose(2, 0, 1) if self.axis == 1 else pixels
        return np.ascontiguousarray(layout, dtype=self.spec.dtype)


def image_target(
    spec: InputSpec, preprocess: Preprocess | None = None, sizes: Mapping[str, int] | None = None
) -> ImageTarget:
    """Fix the size of an image input; dynamic sizes come from `sizes`, then `preprocess.crop`, then 224.

    Raises:
        DataError: the input is not an image (see `onnxsnp.runtime.channel_axis`).
    """
    axis = channel_axis(spec)
    if axis is None:
        raise DataError(f"input {spec} does not take images", hint="give an .npz with one array per input")
    fallback = preprocess.crop if preprocess is not None and preprocess.crop else DEFAULT_IMAGE_SIZE
    spatial = (2, 3) if axis == 1 else (1, 2)
    height, width = (axis_size(spec, place, sizes, fallback) for place in spatial)
    channels = axis_size(spec, axis, sizes, 3)
    if preprocess is None:
        preprocess = resolve_preprocess(None, {}, (height, width))
    return ImageTarget(spec, preprocess, height, width, channels, axis)


def axis_size(spec: InputSpec, axis: int, sizes: Mapping[str, int] | None, default: int) -> int:
    """The size of one axis: fixed in the model, else `sizes["input:axis"]` or `sizes[symbol]`, else `default`."""
    size = spec.shape[axis]
    if isinstance(size, int):
        return size
    given = sizes or {}
    value = given.get(f"{spec.name}:{axis}", given.get(size, default) if size else default)
    if value < 1:
        raise DataError(f"size of axis {axis} of input {spec.name!r} must be 1 or more, got {value}")
    return value


def parse_numbers(text: str, what: str) -> tuple[float, ...]:
    """Numbers separated by spaces and/or commas.

    Raises:
        DataError: something else is in the text; the message names `what`.
    """
    try:
        return tuple(float(part) for part in re.split(r"[\s,]+", text.strip(" []()\t\n,")))
    except ValueError as error:
        raise DataError(f"{what} is not a list of numbers: {text!r}") from error


def _from_metadata(metadata: Mapping[str, str]) -> Preprocess:
    if "mean" not in metadata or "std" not in metadata:
        return Preprocess()
    mean, std = (parse_numbers(metadata[key], f"model metadata {key!r}") for key in ("mean", "std"))
    return Preprocess(mean=mean, std=std)


def _from_toml(path: Path) -> Preprocess:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read preprocessing file {path}: {error}") from error
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        raise DataError(f"preprocessing file {path} is not valid TOML: {error}") from error
    known = [field.name for field in fields(Preprocess)]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
            raise DataError(f"unknown field {key!r} in preprocessing file {path}", hint=hint)
    return Preprocess(**{key: _toml_value(key, value, path) for key, value in table.items()})


_TOML_FIELDS: dict[str, tuple[str, Callable[[Any], bool], Callable[[Any], Any]]] = {
    "numbers": ("a number or a list of numbers", lambda v: _are_numbers(v), lambda v: _numbers(v)),
    "number": ("a number", lambda v: _is_number(v), float),
    "pixels": ("a whole number of pixels", lambda v: _is_number(v) and isinstance(v, int), int),
    "text": ("text", lambda v: isinstance(v, str), str),
}
_TOML_KINDS = {"mean": "numbers", "std": "numbers", "scale": "number", "resize": "pixels", "crop": "pixels"}


def _toml_value(key: str, value: Any, path: Path) -> Any:
    expected, accepts, convert = _TOML_FIELDS[_TOML_KINDS.get(key, "text")]
    if not accepts(value):
        raise DataError(f"{key!r} in preprocessing file {path} must be {expected}, got {value!r}")
    try:
        return convert(value)
    except OverflowError as error:
        raise DataError(f"{key!r} in preprocessing file {path} is too large a number") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_numbers(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(_is_number(item) for item in items)


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(item) for item in (value if isinstance(value, list) else [value]))


def _per_channel(values: Sequence[float], channels: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float32)
    return np.full(1, array.mean(), np.float32) if channels == 1 else array
