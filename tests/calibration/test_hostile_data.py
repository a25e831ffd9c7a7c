"""Data is from strangers too: pictures, archives, arrays and preprocessing files that are damaged or made to harm."""

from __future__ import annotations

import io
import os
import random
import struct
import threading
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxsnp.calibration.data import Preprocess, open_dataset, resolve_preprocess
from onnxsnp.errors import DataError, OnnxSnpError
from onnxsnp.runtime import InputSpec

RAW = Preprocess(mean=(0.0,), std=(1.0,), scale=1.0)
PIXELS = [InputSpec("x", ("N", 3, 8, 8), np.dtype("float32"))]
NUMBERS = [InputSpec("x", ("N", 4), np.dtype("float32"))]


def picture(kind: str = "PNG", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def read(source: Path, specs: list[InputSpec] = PIXELS) -> tuple[int, int]:
    """How many samples could be read, and how many could not."""
    data = open_dataset(source, specs, preprocess=RAW)
    count = sum(batch.count for batch in data)
    return count, data.skipped_count


def archive(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in files.items():
            target.writestr(name, data)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def mutated(data: bytes, seed: int) -> bytes:
    rng = random.Random(seed)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed[: rng.randrange(len(data))]) if seed % 5 == 0 else bytes(changed)


# --- pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF"])
def test_damaged_pictures_are_read_skipped_or_too_large(tmp_path: Path, kind: str) -> None:
    whole = picture(kind)
    (tmp_path / "whole.png").write_bytes(picture())
    seen: Counter[str] = Counter()
    for seed in range(40):
        (tmp_path / f"a.{'jpg' if kind == 'JPEG' else kind.lower()}").write_bytes(mutated(whole, seed))
        try:
            good, bad = read(tmp_path)
            assert (good, bad) in ((2, 0), (1, 1))
            seen["skipped" if bad else "read"] += 1
        except DataError as error:
            assert "too large" in str(error) or "pixels" in str(error)
            seen["too large"] += 1
    assert seen["skipped"]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_text_in_a_picture_that_unpacks_without_end_is_not_unpacked(tmp_path: Path, kind: bytes) -> None:
    whole = picture()
    start = {b"zTXt": b"k\0\0", b"iCCP": b"k\0\0", b"iTXt": b"k\0\1\0\0\0"}[kind]
    bomb = whole[:33] + chunk(kind, start + zlib.compress(bytes(50_000_000))) + whole[33:]
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "whole.png").write_bytes(whole)
    assert len(bomb) < 100_000 and read(tmp_path) == (1, 1)


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_that_declares_billions_of_pixels_is_one_error(tmp_path: Path, size: tuple[int, int]) -> None:
    whole = bytearray(picture())
    whole[16:24] = struct.pack(">II", *size)
    whole[29:33] = struct.pack(">I", zlib.crc32(bytes(whole[12:29])))
    (tmp_path / "big.png").write_bytes(bytes(whole))
    with pytest.raises(DataError, match=r"big.png is too large to decode safely"):
        read(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_devices_and_links_that_lead_nowhere_are_skipped(tmp_path: Path) -> None:
    """Opening a pipe waits for whoever writes to it; a device never ends."""
    os.mkfifo(tmp_path / "pipe.png")
    for name, target in (("zero", "/dev/zero"), ("dead", "nowhere.png"), ("circle", "circle.png")):
        (tmp_path / f"{name}.png").symlink_to(target)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "whole.png").write_bytes(picture())
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(read(tmp_path)), daemon=True)
    thread.start()
    thread.join(20)
    assert found == [(1, 4)]


def test_a_folder_of_nothing_and_of_empty_files_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in"):
        read(tmp_path)
    (tmp_path / "empty.png").touch()
    with pytest.raises(DataError, match=r"the last: empty.png: not an image of a known format$"):
        read(tmp_path)


# --- archives ---------------------------------------------------------------------------------------------------


def test_names_in_an_archive_lead_nowhere(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    names = ["../evil.png", "/tmp/onnxsnp-evil.png", "a/../../evil.png", "ok/a.png", "C:\\evil.png"]
    before = set(tmp_path.rglob("*"))
    source = archive(inner / "a.zip", dict.fromkeys(names, picture()))
    assert read(source) == (3, 0)  # parts that begin with a dot are hidden
    assert set(tmp_path.rglob("*")) - before == {source} and not Path("/tmp/onnxsnp-evil.png").exists()


def test_an_archive_that_lies_about_sizes_is_bounded_by_what_it_says(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", {"a.png": bytes(30_000_000), "b.png": picture()})
    data = bytearray(source.read_bytes())
    entry = data.find(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = struct.pack("<I", 100)
    source.write_bytes(bytes(data))
    assert read(source) == (1, 1)


def test_a_small_archive_of_gigabytes_is_refused_before_anything_is_unpacked(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", {f"{index}.png": b"x" for index in range(8)})
    data = bytearray(source.read_bytes())
    at = -1
    while (at := data.find(b"PK\x01\x02", at + 1)) >= 0:
        data[at + 24 : at + 28] = struct.pack("<I", 2**28)
    source.write_bytes(bytes(data))
    with pytest.raises(DataError, match="looks like a zip bomb"):
        read(source)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damaged_archives_are_read_in_part_or_refused(tmp_path: Path, method: int) -> None:
    whole = archive(tmp_path / "whole.zip", {"0/a.png": picture(), "1/b.png": picture()}, method).read_bytes()
    seen: Counter[str] = Counter()
    for seed in range(60):
        path = tmp_path / "a.zip"
        path.write_bytes(mutated(whole, seed))
        try:
            good, bad = read(path)
            seen["skipped" if bad else "read"] += good > 0
        except OnnxSnpError as error:
            assert str(error).isprintable()
            seen["refused"] += 1
    assert seen["refused"] and seen["read"] + seen["skipped"]


def test_a_member_of_damaged_lzma_is_skipped(tmp_path: Path) -> None:
    source = archive(tmp_path / "a.zip", {"a.png": picture(), "b.png": picture()}, zipfile.ZIP_LZMA)
    data = bytearray(source.read_bytes())
    data[60:70] = b"\xff" * 10
    source.write_bytes(bytes(data))
    assert read(source) == (1, 1)


# --- arrays -----------------------------------------------------------------------------------------------------


def array_file(header: str, body: bytes = bytes(64)) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + body


def shaped(shape: str, kind: str = "<f4") -> str:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n"


class Harm:
    """Unpickling this would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_pickles_are_refused_and_never_opened(tmp_path: Path, suffix: str) -> None:
    path, trace = tmp_path / f"a.{suffix}", tmp_path / "harm"
    held = np.array([Harm(trace)], object)
    np.save(path, held, allow_pickle=True) if suffix == "npy" else np.savez(path, x=held)
    with pytest.raises(DataError, match="cannot read arrays"):
        read(path, NUMBERS)
    assert not trace.exists()


@pytest.mark.parametrize(
    "header",
    [
        shaped("(1099511627776, 4)"),
        shaped("(4611686018427387904, 4)"),
        shaped(f"({'9' * 30}, 4)"),
        shaped("(-4, 4)"),
        shaped(f"({'1,' * 100})"),
        shaped("[4]"),
        shaped("(4, 5)"),
        shaped("(4,)"),
        shaped("(0, 4)"),
        shaped("(2, 4)", "|O"),
        shaped("(2, 4)", "<U99999"),
        shaped("(2, 4)", "<M8[ns]"),
        shaped("(2, 4)", "nonsense"),
        "{'descr': '<f4', 'fort",
        "(" * 5000,
        "__import__('os').mkdir('harm')\n",
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_not_what_they_declare_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        path.write_bytes(array_file(header))
    else:
        archive(path, {"x.npy": array_file(header)})
    with pytest.raises(DataError) as caught:
        read(path, NUMBERS)
    assert str(path) in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert os.listdir(tmp_path) == [path.name]


# --- preprocessing files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean = nan", "must be finite"),
        ("scale = inf", "must be finite"),
        ("scale = true", "must be a number"),
        ("std = []", "must be a number or a list"),
        ("mean = [[1]]", "must be a number or a list"),
        ("scale = 1" + "0" * 400, "too large a number"),
        ("mean = [1" + "0" * 400 + "]", "too large a number"),
        ("scale = 1" + "0" * 5000, "not valid TOML"),
        ("mean = " + "[" * 3000 + "]" * 3000, "not valid TOML"),
        ("resize = 99999999999999999999", "must be 1 to 32768 pixels"),
        ("crop = 1000000000", "must be 1 to 32768 pixels"),
        ("resize = 1.5", "whole number"),
        ("[mean]\na = 1", "must be a number or a list"),
        ("mena = 1", "unknown field"),
        ("\0", "not valid TOML"),
    ],
)
def test_preprocessing_that_makes_no_sense_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.toml"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        resolve_preprocess(path, {}, 8)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
