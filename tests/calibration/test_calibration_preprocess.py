"""Preprocessing: the resize rule, the presets, the arithmetic, and errors that name the mistake."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from onnxsnp.calibration.preprocess import Preprocess, default_resize, image_target, resolve_preprocess
from onnxsnp.errors import DataError
from onnxsnp.runtime import InputSpec, channel_axis, image_spec

RAW = Preprocess(mean=(0.0,), std=(1.0,), scale=1.0)


def spec(*shape: int | str | None, dtype: str = "float32", name: str = "x") -> InputSpec:
    return InputSpec(name, shape, np.dtype(dtype))


def gradient(height: int, width: int) -> Image.Image:
    """Red counts columns and green counts rows, so a pixel tells where it came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 7)], axis=2).astype(np.uint8))


def test_an_image_of_the_model_size_is_used_as_it_is() -> None:
    image = gradient(224, 224)
    out = image_target(spec("N", 3, 224, 224), RAW).prepare(image)
    assert np.array_equal(out, np.asarray(image).transpose(2, 0, 1))


def test_256_pixels_for_a_224_model_are_only_cropped_around_the_centre() -> None:
    image = gradient(256, 256)
    out = image_target(spec("N", 3, 224, 224), RAW).prepare(image)
    assert np.array_equal(out, np.asarray(image)[16:240, 16:240].transpose(2, 0, 1))


def test_short_side_goes_to_256_and_the_long_side_is_cropped_evenly() -> None:
    image = gradient(128, 192)  # doubled to 256×384, then cropped at (80, 16)
    fitted = np.asarray(image_target(spec("N", 3, 224, 224), RAW).fit(image))
    doubled = np.asarray(image.resize((384, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(fitted, doubled[16:240, 80:304])


def test_below_100_pixels_the_short_side_goes_straight_to_the_model_size() -> None:
    assert [default_resize(size) for size in (32, 99, 100, 224, 384)] == [32, 99, 114, 256, 439]
    image = gradient(64, 64)
    fitted = np.asarray(image_target(spec("N", 3, 32, 32), RAW).fit(image))
    assert np.array_equal(fitted, np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)))


def test_a_model_that_is_not_square_is_covered_whole() -> None:
    target = image_target(spec("N", 3, 20, 60), RAW)
    assert target.fit(gradient(30, 30)).size == (60, 20)
    assert target.fit(gradient(10, 200)).size == (60, 20)


def test_a_sliver_that_would_fill_the_memory_when_resized_is_refused() -> None:
    with pytest.raises(DataError, match="too long and thin"):
        image_target(spec("N", 3, 224, 224), RAW).fit(Image.new("RGB", (60000, 1)))


def test_pixels_are_scaled_then_shifted_and_divided_per_channel() -> None:
    image = Image.new("RGB", (4, 4), (255, 51, 0))
    chosen = Preprocess(mean=(0.5, 0.1, 0.25), std=(0.5, 0.2, 0.5))
    out = image_target(spec("N", 3, 4, 4), chosen).prepare(image)
    assert out.shape == (3, 4, 4) and out.dtype == np.float32
    assert np.allclose(out[:, 0, 0], [1.0, 0.5, -0.5], atol=1e-6)


def test_bgr_reverses_the_channels_before_mean_and_std() -> None:
    chosen = Preprocess(mean=(0.0, 0.0, 1.0), std=(1.0,), scale=1.0, color="BGR")
    out = image_target(spec("N", 3, 2, 2), chosen).prepare(Image.new("RGB", (2, 2), (10, 20, 30)))
    assert out[:, 0, 0].tolist() == [30.0, 20.0, 9.0]


def test_layout_and_type_follow_the_input() -> None:
    image = gradient(8, 8)
    nhwc = image_target(spec(1, 8, 8, 3), RAW).prepare(image)
    assert np.array_equal(nhwc, np.asarray(image))
    assert image_target(spec("N", 3, 8, 8, dtype="float16"), RAW).prepare(image).dtype == np.float16
    grey = image_target(spec("N", 1, 8, 8), Preprocess()).prepare(Image.new("L", (8, 8), 128))
    assert grey.shape == (1, 8, 8)
    assert grey[0, 0, 0] == pytest.approx((128 / 255 - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3))


def test_uint8_inputs_get_the_pixels_whatever_the_preset() -> None:
    out = image_target(spec("N", 8, 8, 3, dtype="uint8"), Preprocess()).prepare(gradient(8, 8))
    assert np.array_equal(out, np.asarray(gradient(8, 8)))


def test_image_inputs_are_told_from_other_four_dimensional_ones() -> None:
    assert channel_axis(spec("N", 3, 224, 224)) == 1
    assert channel_axis(spec("N", "H", "W", 3)) == 3
    assert channel_axis(spec("batch", "num_channels", "height", "width")) == 1
    assert channel_axis(spec("N", 12, "past", 64)) is None
    assert channel_axis(spec("N", "heads", "past", "d", name="past_key_values.0.key")) is None
    assert channel_axis(spec("N", 3, 224, 224, dtype="int64")) is None
    ids, pixels = spec("N", "S", dtype="int64", name="ids"), spec("N", 3, "H", "W", name="pixels")
    assert image_spec([ids, pixels]) is pixels and image_spec([ids]) is None


def test_dynamic_image_sizes_come_from_sizes_then_crop_then_224() -> None:
    dynamic = spec("N", 3, "H", None)
    assert (image_target(dynamic).height, image_target(dynamic).width) == (224, 224)
    chosen = image_target(dynamic, Preprocess(crop=64), {"H": 96})
    assert (chosen.height, chosen.width) == (96, 64)
    assert image_target(dynamic, None, {"x:3": 48}).width == 48


@pytest.mark.parametrize(("name", "mean"), [("imagenet", 0.485), ("half", 0.5), ("clip", 0.48145466), ("raw", 0.0)])
def test_presets_have_their_published_numbers(name: str, mean: float) -> None:
    chosen = resolve_preprocess(name, {"mean": "0.1", "std": "1"}, 224)
    assert chosen.mean[0] == mean
    assert chosen.scale == (1.0 if name == "raw" else 1 / 255)
    assert (chosen.resize, chosen.crop) == (224 if name == "clip" else 256, 224)


def test_without_a_name_the_metadata_decides_only_when_mean_and_std_are_both_there() -> None:
    both = resolve_preprocess(None, {"mean": "0.1, 0.2 ,0.3", "std": "0.4 0.5 0.6"}, 32)
    assert (both.mean, both.std, both.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 32)
    assert resolve_preprocess(None, {"mean": "0.1"}, 224).mean == Preprocess().mean
    with pytest.raises(DataError, match="'mean' is not a list of numbers"):
        resolve_preprocess(None, {"mean": "grey", "std": "1"}, 224)


def test_an_unknown_preset_names_the_nearest_one() -> None:
    with pytest.raises(DataError, match="did you mean 'imagenet'"):
        resolve_preprocess("imagnet", {}, 224)


def test_a_toml_file_gives_the_fields_and_mistakes_in_it_are_named(tmp_path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('mean = [0.1, 0.2, 0.3]\nstd = 0.5\nscale = 1\nresize = 40\ninterpolation = "bilinear"\n')
    chosen = resolve_preprocess(str(path), {}, 32)
    assert chosen == Preprocess((0.1, 0.2, 0.3), (0.5,), 1.0, 40, 32, "bilinear")
    for text, message in [
        ("means = 1", "did you mean 'mean'"),
        ('mean = "x"', "must be a number or a list"),
        ("resize = 1.5", "whole number"),
        ("std = 0", "above 0"),
        ("mean = [1, 2]", "1 or 3 numbers"),
        ('interpolation = "cubic"', "did you mean 'bicubic'"),
        ("mean =", "not valid TOML"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            resolve_preprocess(path, {}, 32)
    with pytest.raises(DataError, match="cannot read"):
        resolve_preprocess(tmp_path / "absent.toml", {}, 32)
