"""Readers, labels, sampling, batching and generated inputs."""

from __future__ import annotations

import io
import re
import threading
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxsnp.calibration import arrays, images
from onnxsnp.calibration.data import Preprocess, open_dataset, parse_classes, spread
from onnxsnp.calibration.images import folder_labels
from onnxsnp.errors import DataError
from onnxsnp.runtime import InputSpec

RAW = Preprocess(mean=(0.0,), std=(1.0,), scale=1.0)


def spec(*shape: int | str | None, dtype: str = "float32", name: str = "x") -> InputSpec:
    return InputSpec(name, shape, np.dtype(dtype))


PIXELS = [spec("N", 3, 8, 8)]


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def seen(data) -> list[int]:
    """The grey value of every real sample, in order; `picture(v)` planted them."""
    return [int(value) for batch in data for value in batch.inputs["x"][: batch.count, 0, 0, 0]]


def label_of_value(data) -> dict[int, int]:
    pairs = {}
    for batch in data:
        values = batch.inputs["x"][:, 0, 0, 0]
        pairs |= {int(value): int(label) for value, label in zip(values, batch.labels, strict=True)}
    return pairs


# --- images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_integer_folders_are_the_labels_in_a_folder_and_in_a_zip(tmp_path: Path, kind: str) -> None:
    files = {"0007/a.png": picture(1), "12/b.PNG": picture(2), "0007/c.png": picture(3), "12/notes.txt": b"no"}
    source = write_tree(tmp_path / "d", files) if kind == "folder" else write_zip(tmp_path / "d.zip", files)
    data = open_dataset(source, PIXELS, preprocess=RAW, batch_size=2)
    assert data.labelled and data.samples == 3 and not data.generated
    assert label_of_value(data) == {1: 7, 2: 12, 3: 7}


def test_named_folders_follow_the_class_list_of_the_model_and_else_the_alphabet() -> None:
    names = ["x/dog/1.png", "x/cat/1.png", "y/dog/2.png"]
    assert folder_labels(names).values.tolist() == [1, 0, 1]
    assert folder_labels(names, ["dog", "cow", "cat"]).values.tolist() == [0, 2, 0]
    assert parse_classes("dog, polar bear ,cat") == ["dog", "polar bear", "cat"]
    assert parse_classes(" dog cat\n") == ["dog", "cat"]


def test_folders_that_do_not_say_the_class_give_no_labels() -> None:
    assert folder_labels(["1.png", "a/2.png"]).values is None
    assert folder_labels(["val/1.png", "val/2.png"]).values is None
    half = folder_labels(["dog/1.png", "yak/1.png"], ["dog", "cat"])
    assert half.values is None and "'yak' is not among" in half.note


def test_broken_images_are_skipped_counted_and_named_once_over_passes(tmp_path: Path) -> None:
    files = {f"{n:02}.png": picture(n) for n in range(5)}
    files |= {f"bad{n:02}.png": b"this is no image" for n in range(30)} | {"cut.png": picture(9)[:-30]}
    data = open_dataset(write_tree(tmp_path, files), PIXELS, preprocess=RAW, batch_size=2)
    assert sorted(seen(data)) == [0, 1, 2, 3, 4]
    assert sorted(seen(data)) == [0, 1, 2, 3, 4]
    assert data.samples == 5 and data.skipped_count == 31 and len(data.skipped) == 20
    assert set(data.skipped) <= {name for name in files if name.startswith(("bad", "cut"))}
    assert "31 unreadable and skipped" in data.description


def test_a_folder_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in"):
        open_dataset(write_tree(tmp_path / "a", {"x.txt": b""}), PIXELS)
    with pytest.raises(DataError, match="none of 2 images"):
        open_dataset(write_tree(tmp_path / "b", {"x.png": b"", "y.jpg": b"abc"}), PIXELS)
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "c", PIXELS)
    with pytest.raises(DataError, match="not a folder"):
        open_dataset(write_tree(tmp_path / "e", {"x.txt": b""}) / "x.txt", PIXELS)
    with pytest.raises(DataError, match="can only hold images, but the model takes ids"):
        open_dataset(tmp_path / "b", [spec("N", "S", dtype="int64", name="ids")])


def test_hidden_and_macos_files_are_not_samples(tmp_path: Path) -> None:
    files = {"a/1.png": picture(1), "__MACOSX/a/._1.png": b"x", "a/.2.png": b"x"}
    data = open_dataset(write_zip(tmp_path / "d.zip", files), PIXELS, preprocess=RAW)
    assert seen(data) == [1] and data.skipped_count == 0


def test_bombs_are_refused_with_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = write_zip(tmp_path / "big.zip", {"a.png": b"\0" * 5000})
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 4999)
    with pytest.raises(DataError, match=r"a\.png in .*big\.zip has 5000 bytes"):
        open_dataset(big, PIXELS)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10**9)
    monkeypatch.setattr(images, "_EXPANSION_FREE", 1000)
    monkeypatch.setattr(images, "MAX_EXPANSION", 10)
    with pytest.raises(DataError, match="zip bomb"):
        open_dataset(big, PIXELS)
    monkeypatch.setattr(images, "MAX_PIXELS", 63)
    with pytest.raises(DataError, match="8×8 pixels, more than the 63"):
        open_dataset(write_zip(tmp_path / "p.zip", {"a.png": picture(1)}), PIXELS)


def test_a_picture_of_billions_of_pixels_is_never_decoded(tmp_path: Path) -> None:
    header = bytearray(picture(1))
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    with pytest.raises(DataError, match="too large to decode safely"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_dataset(write_tree(tmp_path, {"a.png": bytes(header)}), PIXELS)


def test_a_broken_or_encrypted_zip_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="as a zip archive"):
        open_dataset(tmp_path / "no.zip", PIXELS)
    locked = bytearray(write_zip(tmp_path / "e.zip", {"a.png": picture(1)}).read_bytes())
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "e.zip").write_bytes(bytes(locked))
    with pytest.raises(DataError, match="is encrypted"):
        open_dataset(tmp_path / "e.zip", PIXELS)


def test_a_damaged_zip_member_is_skipped_like_a_broken_file(tmp_path: Path) -> None:
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a.png", picture(1))
        archive.writestr("b.png", picture(2))
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PNG") + 30] ^= 0xFF  # the checksum of the first member no longer holds
    path.write_bytes(bytes(raw))
    data = open_dataset(path, PIXELS, preprocess=RAW)
    assert seen(data) == [2] and data.skipped == ["a.png"]


# --- sampling and batches ---------------------------------------------------------------------------------------


def test_a_subset_touches_every_class_of_sorted_folders_and_follows_the_seed(tmp_path: Path) -> None:
    files = {f"{label}/{n}.png": picture(10 * label + n) for label in range(10) for n in range(5)}
    source = write_tree(tmp_path, files)
    data = open_dataset(source, PIXELS, samples=10, preprocess=RAW)
    values = seen(data)
    assert sorted(value // 10 for value in values) == list(range(10))
    assert seen(data) == values and seen(open_dataset(source, PIXELS, samples=10, preprocess=RAW)) == values
    assert seen(open_dataset(source, PIXELS, samples=10, preprocess=RAW, seed=1)) != values
    assert "spread over 50" in data.description


def test_spread_never_repeats_and_takes_one_of_each_stretch() -> None:
    for total, samples in [(10, 7), (650, 64), (5, 5), (3, 8), (1000, 999)]:
        chosen = spread(total, samples, np.random.default_rng(0))
        assert len(set(chosen.tolist())) == len(chosen) == min(total, samples)
        assert (np.diff(chosen) > 0).all() and chosen[-1] < total
    assert (spread(100, 10, np.random.default_rng(3)) // 10).tolist() == list(range(10))


def test_a_fixed_batch_drops_the_remainder_for_calibration_and_pads_for_evaluation() -> None:
    values = np.arange(7, dtype=np.float32)[:, None]
    dropped = open_dataset({"x": values}, [spec(3, 1)], batch_size=8, shuffle=False)
    assert [batch.inputs["x"].ravel().tolist() for batch in dropped] == [[0, 1, 2], [3, 4, 5]]
    assert dropped.samples == 6 and len(dropped) == 2
    assert "1 dropped to fill batches of exactly 3" in dropped.description
    padded = list(open_dataset({"x": values[:5]}, [spec(3, 1)], shuffle=False, pad_last=True))
    assert padded[-1].inputs["x"].ravel().tolist() == [3, 4, 4]
    assert [batch.count for batch in padded] == [3, 2]
    with pytest.raises(DataError, match="exactly 8, but there are only 7"):
        open_dataset({"x": values}, [spec(8, 1)])


def test_a_dynamic_batch_ends_with_a_smaller_one_and_shuffle_only_changes_the_order() -> None:
    values = np.arange(7, dtype=np.float32)[:, None]
    plain = open_dataset(values, [spec("N", 1)], batch_size=4, shuffle=False)
    assert [batch.inputs["x"].ravel().tolist() for batch in plain] == [[0, 1, 2, 3], [4, 5, 6]]
    mixed = np.concatenate([batch.inputs["x"] for batch in open_dataset(values, [spec("N", 1)])]).ravel()
    assert sorted(mixed) == list(range(7)) and mixed.tolist() != list(range(7))


def test_stopping_early_ends_the_readers_and_leaves_the_dataset_usable(tmp_path: Path) -> None:
    data = open_dataset(write_tree(tmp_path, {f"{n}.png": picture(n) for n in range(9)}), PIXELS, batch_size=2)
    batches = iter(data)
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("onnxsnp-data")]
    assert sum(batch.count for batch in data) == 9


@pytest.mark.parametrize("bad", [{"samples": 0}, {"batch_size": 0}])
def test_impossible_counts_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(DataError, match="must be 1 or more, got 0"):
        open_dataset(None, PIXELS, **bad)


def test_inputs_without_a_common_batch_are_refused() -> None:
    with pytest.raises(DataError, match="different batch sizes"):
        open_dataset(None, [spec(2, 4), spec(3, 4, name="y")])
    with pytest.raises(DataError, match="scalar"):
        open_dataset(None, [spec()])


# --- arrays -----------------------------------------------------------------------------------------------------

TWO = [spec("N", "S", dtype="int64", name="ids"), spec("N", 4, name="extra")]


def test_npz_goes_by_input_name_and_carries_labels(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, ids=np.arange(6, dtype=np.int32).reshape(3, 2), extra=np.ones((3, 4)), labels=[5, 6, 7])
    data = open_dataset(path, TWO, shuffle=False)
    (batch,) = data
    assert batch.inputs["ids"].dtype == np.int64 and batch.inputs["ids"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch.inputs["extra"].dtype == np.float32 and data.labelled and batch.labels.tolist() == [5, 6, 7]


def test_one_array_serves_a_single_input_whatever_its_name(tmp_path: Path) -> None:
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", values)
    for path in (tmp_path / "a.npy", tmp_path / "a.npz"):
        (batch,) = open_dataset(path, [spec("N", 4)], shuffle=False)
        assert np.array_equal(batch.inputs["x"], values) and batch.labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": np.zeros((2, 3, 8), np.float32)}, r"expected x: \(N, 3, 8, 8\) float32, got float32\[2, 3, 8\]"),
        ({"x": np.zeros((2, 3, 8, 9), np.float32)}, r"got float32\[2, 3, 8, 9\]"),
        ({"x": np.zeros((2, 3, 8, 8), np.uint8)}, r"got uint8\[2, 3, 8, 8\]"),
        ({"x": np.zeros((2, 3, 8, 8), np.float32), "z": np.zeros(2)}, "expected x: .*; got x, z"),
        ({"x": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(3, int)}, "different numbers of samples"),
        ({"x": np.zeros((2, 3, 8, 8), np.float32), "labels": np.zeros(2)}, "one integer per sample"),
    ],
)
def test_arrays_that_do_not_fit_say_what_was_expected_and_what_came(tmp_path: Path, content, message: str) -> None:
    np.savez(tmp_path / "d.npz", **content)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "d.npz", PIXELS)


TEXT = [
    InputSpec("input_ids", ("N", "S"), np.dtype(np.int64), 30),
    InputSpec("attention_mask", ("N", "S"), np.dtype(np.int64)),
]
IDS, MASK = np.arange(24).reshape(4, 6), np.ones((4, 6), np.int64)


def test_a_folder_of_arrays_goes_by_file_name(tmp_path: Path) -> None:
    np.save(tmp_path / "input_ids.npy", IDS.astype(np.int32))
    np.save(tmp_path / "attention_mask.npy", MASK.astype(bool))
    np.save(tmp_path / "labels.npy", [3, 2, 1, 0])
    (batch,) = open_dataset(tmp_path, TEXT, shuffle=False)
    assert np.array_equal(batch.inputs["input_ids"], IDS) and batch.inputs["input_ids"].dtype == np.int64
    assert np.array_equal(batch.inputs["attention_mask"], MASK) and batch.inputs["attention_mask"].dtype == np.int64
    assert batch.labels is not None and batch.labels.tolist() == [3, 2, 1, 0]
    specs = [InputSpec("model/ids:0", ("N", "S"), np.dtype(np.int64))]
    (tmp_path / "other").mkdir()
    np.save(tmp_path / "other" / "model_ids_0.npy", IDS)
    (batch,) = open_dataset(tmp_path / "other", specs, shuffle=False)
    assert np.array_equal(batch.inputs["model/ids:0"], IDS)
    (tmp_path / "other" / "model_ids_0.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"cannot read an array from .*model_ids_0\.npy"):
        open_dataset(tmp_path / "other", specs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"input_ids": IDS}, r"got input_ids \(missing: attention_mask\)"),
        ({"input_ids": IDS, "attention_mask": MASK, "x": MASK}, "got attention_mask, input_ids, x$"),
        ({"input_ids": IDS * 1.0, "attention_mask": MASK}, r"input 'input_ids': expected .*, got float64\[4, 6\]"),
        ({"input_ids": IDS + 10, "attention_mask": MASK}, "'input_ids' holds the id 33, but its table .* ends at 29"),
        ({"input_ids": IDS - 100, "attention_mask": MASK}, "'input_ids' holds the id -100"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :5]},
            "'S' the size 6 in input 'input_ids' and 5 in 'attention_m",
        ),
        ({"input_ids": IDS, "attention_mask": MASK[:3]}, "different numbers of samples: input_ids 4, attention_mask 3"),
        ({"input_ids": IDS[0], "attention_mask": MASK}, r"does not fit input 'input_ids': .* got int64\[6\]"),
    ],
)
def test_what_is_wrong_with_a_text_names_the_input(content: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(content, TEXT)
    assert re.search(message, caught.value.message)


def test_texts_come_from_an_iterator_of_dicts() -> None:
    batches = ({"input_ids": IDS[[row]], "attention_mask": MASK[[row]]} for row in range(4))
    (batch,) = open_dataset(batches, TEXT, samples=3, shuffle=False)
    assert np.array_equal(batch.inputs["input_ids"], IDS[:3])
    assert np.array_equal(batch.inputs["attention_mask"], MASK[:3])


def test_integers_that_do_not_fit_the_input_type_are_refused() -> None:
    with pytest.raises(DataError, match="do not fit int32"):
        open_dataset({"ids": np.array([[2**40]])}, [spec("N", "S", dtype="int32", name="ids")])


def test_pickled_objects_broken_files_and_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "o.npz", x=np.array([{"a": 1}], dtype=object))
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "c.npy").write_bytes(b"nothing")
    for name in ("o.npz", "b.npz", "c.npy"):
        with pytest.raises(DataError, match="cannot read arrays"):
            open_dataset(tmp_path / name, PIXELS)
    np.savez_compressed(tmp_path / "z.npz", x=np.zeros((50, 3, 8, 8), np.float32))
    monkeypatch.setattr(arrays, "_EXPANSION_FREE", 1000)
    monkeypatch.setattr(arrays, "MAX_EXPANSION", 10)
    with pytest.raises(DataError, match="zip bomb"):
        open_dataset(tmp_path / "z.npz", PIXELS)


def test_iterables_give_batches_or_single_samples_and_can_be_read_twice() -> None:
    one = spec("N", 2)
    elements = [np.zeros(2, np.float32), np.ones((3, 2), np.float32), {"x": np.full(2, 2, np.float32)}]
    data = open_dataset((element for element in elements), [one], shuffle=False)
    for _ in range(2):
        values = np.concatenate([batch.inputs["x"] for batch in data])
        assert values[:, 0].tolist() == [0, 1, 1, 1, 2]
    with pytest.raises(DataError, match="the data is empty"):
        open_dataset([], [one])
    with pytest.raises(DataError, match="element 1 of the data does not fit"):
        open_dataset([np.zeros(2, np.float32), np.zeros(3, np.float32)], [one])
    with pytest.raises(DataError, match="differ in shape"):
        open_dataset([{"ids": np.zeros((1, n), int)} for n in (2, 3)], [spec("N", "S", dtype="int64", name="ids")])


def test_an_endless_generator_is_read_only_as_far_as_needed_and_a_list_is_spread() -> None:
    def endless():
        number = 0
        while True:
            yield np.full(2, number, np.float32)
            number += 1

    assert open_dataset(endless(), [spec("N", 2)], samples=5).samples == 5
    rows = [np.full(2, number, np.float32) for number in range(100)]
    data = open_dataset(rows, [spec("N", 2)], samples=4, shuffle=False)
    (batch,) = data
    assert (batch.inputs["x"][:, 0] // 25).tolist() == [0, 1, 2, 3]


# --- generated --------------------------------------------------------------------------------------------------


def test_generated_images_follow_the_seed_and_the_preprocessing() -> None:

    def pictures(preprocess: Preprocess, seed: int) -> np.ndarray:
        (batch,) = open_dataset(None, PIXELS, samples=5, preprocess=preprocess, seed=seed, shuffle=False)
        return batch.inputs["x"]

    first = pictures(RAW, 0)
    assert np.array_equal(first, pictures(RAW, 0))
    assert len({picture.tobytes() for picture in (*first, *pictures(RAW, 1))}) == 10
    assert first.shape == (5, 3, 8, 8) and 0 <= first.min() < first.max() <= 255
    scaled = Preprocess(mean=(10.0,), std=(2.0,), scale=1.0)
    assert np.allclose(pictures(scaled, 0), (first - 10) / 2)
    assert open_dataset(None, PIXELS).samples == 256 and open_dataset(None, PIXELS).generated


def test_dead_leaves_have_the_spectrum_of_natural_images() -> None:
    """The amplitude of photographs falls like 1/f (slope −1, ±0.5); white noise is flat (0)."""
    (batch,) = open_dataset(None, [spec("N", 3, 128, 128)], samples=12, batch_size=12, preprocess=RAW)
    grey = batch.inputs["x"].mean(axis=1)
    window = np.hanning(128)[:, None] * np.hanning(128)[None, :]
    amplitude = np.abs(np.fft.fft2((grey - grey.mean(axis=(1, 2), keepdims=True)) * window)).mean(axis=0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128) * 128, np.fft.fftfreq(128) * 128))
    band = (frequency >= 3) & (frequency <= 40)
    slope = np.polyfit(np.log(frequency[band]), np.log(amplitude[band]), 1)[0]
    assert -1.6 < slope < -0.6


def test_radii_follow_the_inverse_cube() -> None:
    """With density r⁻³ the share of discs above 2·r_min is one quarter (less what lies beyond the largest)."""
    from onnxsnp.calibration.generated import _MIN_RADIUS, _radii

    radii = np.concatenate([_radii(512, 512, np.random.default_rng(seed)) for seed in range(4)])
    assert radii.min() >= _MIN_RADIUS and radii.max() <= 256
    assert (radii > 2 * _MIN_RADIUS).mean() == pytest.approx(0.25, abs=0.02)
    assert (radii > 4 * _MIN_RADIUS).mean() == pytest.approx(1 / 16, abs=0.01)


def test_other_generated_inputs_follow_type_and_name() -> None:
    specs = [
        spec("N", "seq", dtype="int64", name="input_ids"),
        spec("N", "seq", dtype="int64", name="attention_mask"),
        spec("N", "seq", dtype="int64", name="token_type_ids"),
        spec("N", "seq", dtype="int64", name="position_ids"),
        spec("N", None, 5, name="features"),
        spec("N", 2, dtype="bool", name="flag"),
    ]
    data = open_dataset(None, specs, samples=4, sizes={"features:1": 6}, token_bounds={"input_ids": 50})
    (batch,) = data
    ids, features = batch.inputs["input_ids"], batch.inputs["features"]
    assert ids.shape == (4, 128) and ids.min() >= 0 and 40 < ids.max() < 50
    assert (batch.inputs["token_type_ids"] == 0).all()
    assert batch.inputs["position_ids"][2].tolist() == list(range(128)) and batch.inputs["flag"].all()
    assert features.shape == (4, 6, 5) and abs(features.mean()) < 0.4 and 0.7 < features.std() < 1.3
    (short,) = open_dataset(None, specs, samples=4, sizes={"seq": 7})
    assert short.inputs["input_ids"].shape == (4, 7) and 100 < short.inputs["input_ids"].max() < 1000


def test_generated_masks_are_whole_or_end_early_together_in_all_inputs_of_a_sample() -> None:
    specs = [
        spec("N", "seq", dtype="int64", name="attention_mask"),
        spec("N", "seq", dtype="bool", name="src_key_padding_mask"),
        spec("N", 1, "seq", "seq", dtype="int64", name="pair_mask"),
        spec("N", "seq", dtype="float32", name="additive_mask"),
    ]
    (batch,) = open_dataset(None, specs, samples=8, batch_size=8, sizes={"seq": 40}, shuffle=False)
    kept = batch.inputs["attention_mask"]
    lengths = kept.sum(axis=1)
    assert (kept == (np.arange(40) < lengths[:, None])).all()
    assert (lengths[::2] == 40).all() and (lengths[1::2] >= 10).all() and len(set(lengths[1::2])) > 2
    assert (batch.inputs["src_key_padding_mask"] == (kept == 0)).all()
    assert (batch.inputs["pair_mask"] == 1).all() and (batch.inputs["additive_mask"] == 1).all()


def test_generated_ids_lie_in_the_tables_that_the_inputs_index() -> None:
    specs = [
        InputSpec("input_ids", ("N", 30), np.dtype(np.int64), 7),
        InputSpec("token_type_ids", ("N", 30), np.dtype(np.int64), 2),
        InputSpec("segment_ids", ("N", 30), np.dtype(np.int64), 1),
        InputSpec("position_ids", ("N", 30), np.dtype(np.int64), 20),
    ]
    (batch,) = open_dataset(None, specs, samples=4)
    assert set(batch.inputs["input_ids"].ravel()) == set(range(7))
    assert batch.inputs["token_type_ids"][0].tolist() == [0] * 20 + [1] * 10
    assert (batch.inputs["segment_ids"] == 0).all()
    assert batch.inputs["position_ids"][0].tolist() == [*range(20), *[19] * 10]


def test_images_for_one_input_come_with_generated_values_for_the_others(tmp_path: Path) -> None:
    source = write_tree(tmp_path, {"1/a.png": picture(1)})
    specs = [spec("N", 7, dtype="int64", name="ids"), *PIXELS]
    (batch,) = open_dataset(source, specs, preprocess=RAW)
    assert batch.inputs["ids"].shape == (1, 7) and (batch.inputs["x"] == 1).all()
