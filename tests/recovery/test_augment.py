"""Variants of images: of images only, the same numbers for the same seed, in the range that the picture has."""

from __future__ import annotations

import numpy as np
import pytest

from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.recovery.augment import Augmentation, augmentation, resized_crop
from onnxsnp.runtime import InputSpec

FLOAT, BYTE = np.dtype(np.float32), np.dtype(np.uint8)


def made(shape: tuple[int | str, ...], dtype: np.dtype = FLOAT, preprocess: Preprocess | None = None) -> Augmentation:
    found = augmentation([InputSpec("ids", ("N", 7), np.dtype(np.int64)), InputSpec("x", shape, dtype)], preprocess)
    assert found is not None
    return found


def test_only_images_are_varied() -> None:
    assert augmentation([InputSpec("ids", ("N", 7), np.dtype(np.int64))], None) is None
    assert augmentation([InputSpec("features", ("N", 7, 12), FLOAT)], None) is None


def test_other_inputs_and_the_given_arrays_stay_as_they_are() -> None:
    rng = np.random.default_rng(0)
    given = {"ids": rng.integers(0, 9, (4, 7)), "x": rng.standard_normal((4, 3, 16, 12)).astype(np.float32)}
    before = {name: array.copy() for name, array in given.items()}
    varied = made(("N", 3, 16, 12), preprocess=Preprocess())(given, np.random.default_rng(1))
    assert varied["ids"] is given["ids"] and all(np.array_equal(given[name], before[name]) for name in given)
    assert varied["x"].shape == (4, 3, 16, 12) and varied["x"].dtype == np.float32
    assert all(not np.array_equal(one, other) for one, other in zip(varied["x"], given["x"], strict=True))


def test_a_seed_gives_one_variant() -> None:
    given = {"x": np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32)}
    vary = made(("N", 3, 8, 8))
    first, same, other = (vary(given, np.random.default_rng(seed))["x"] for seed in (5, 5, 6))
    assert np.array_equal(first, same) and not np.array_equal(first, other)


@pytest.mark.parametrize("shape", [(2, 3, 8, 10), (2, 8, 10, 3), (2, 1, 8, 10)])
def test_layouts_and_the_range_of_values(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).uniform(-2, 2, shape).astype(np.float32)
    vary = made(("N", *shape[1:]), preprocess=Preprocess())
    for seed in range(8):
        varied = vary({"x": images}, np.random.default_rng(seed))["x"]
        assert varied.shape == shape and varied.flags.c_contiguous
        assert varied.min() >= images.min() - 1e-5 and varied.max() <= images.max() + 1e-5


def test_bytes_stay_bytes() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    varied = made(("N", 8, 8, 3), BYTE)({"x": images}, np.random.default_rng(0))["x"]
    assert varied.dtype == np.uint8 and varied.std() > 10


def test_colour_is_varied_as_pixels_are() -> None:
    """A grey picture is only lighter or darker: in pixels its channels stay equal, whatever mean and std."""
    preprocess = Preprocess()
    mean, std = (np.asarray(values, np.float32).reshape(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    ramp = np.broadcast_to(np.linspace(0.1, 0.9, 16, dtype=np.float32), (3, 16, 16))
    images = ((ramp - mean) / std)[None].astype(np.float32)
    vary = made(("N", 3, 16, 16), preprocess=preprocess)
    for seed in range(6):
        pixels = vary({"x": images}, np.random.default_rng(seed))["x"][0] * std + mean
        assert np.ptp(pixels, axis=0).max() < 1e-5


def test_a_crop_of_the_whole_is_the_whole_and_a_half_is_stretched() -> None:
    image = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float32)
    assert np.allclose(resized_crop(image, 0, 0, 8, 8), image, atol=1e-6)
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (1, 8, 8))
    half = resized_crop(ramp, 0, 4, 8, 4)
    assert np.allclose(half[0, 0, 1:-1], np.clip(4 + (np.arange(8) + 0.5) / 2 - 0.5, 0, 7)[1:-1])
