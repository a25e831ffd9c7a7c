"""Images in a folder or in a .zip as samples, with class labels from the names of their folders.

A zip is read in place and never extracted. Files from strangers are bounded before they are decoded: bytes per member,
the archive's expansion, pixels per picture, and only plain raster formats are opened.
"""

from __future__ import annotations

import io
import lzma
import os
import stat
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from onnxsnp.calibration.preprocess import MAX_PIXELS, ImageTarget
from onnxsnp.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
MAX_FILE_BYTES = 256 * 2**20  # one file or archive member
MAX_EXPANSION = 200  # an archive of pictures hardly shrinks; far beyond this it was made to explode
_EXPANSION_FREE = 2**30  # bytes below which the expansion does not matter
# What Pillow and zipfile raise on damaged data.
_BROKEN = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    NotImplementedError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
)


class UnreadableSampleError(Exception):
    """One sample is damaged; the reader skips and counts it. Never leaves this package's readers."""


@dataclass(frozen=True)
class Labels:
    """Class labels of image files.

    Attributes:
        values: int64 class index per file, or None when the folders do not say.
        note: where they come from, or why there are none; one clause for people.
    """

    values: np.ndarray | None
    note: str


class ImageSource:
    """Samples from image files: `names` in order, each decoded when it is asked for.

    Args:
        origin: the folder or archive, for messages.
        names: slash-separated paths below it, sorted.
        read: returns the bytes of one name; must be safe to call from several threads.
        target: what a picture becomes.
        extra: makes the other inputs of a model with more than one, from the sample's number.
        classes: the model's own class names, or None.
        labels: class numbers by file or folder name (`onnxsnp.calibration.labels`), instead of what folders say.
    """

    parallel = True
    generated = False

    def __init__(
        self,
        origin: Path,
        names: Sequence[str],
        read: Callable[[str], bytes],
        target: ImageTarget,
        extra: Callable[[int], dict[str, np.ndarray]],
        classes: Sequence[str] | None,
        labels: Mapping[str, int] | None = None,
    ) -> None:
        if not names:
            raise DataError(f"no images in {origin}", hint=f"expected files like {', '.join(sorted(SUFFIXES))}")
        self._origin, self._names, self._read, self._target, self._extra = origin, names, read, target, extra
        found = folder_labels(names, classes) if labels is None else mapped_labels(names, labels)
        self.labels = found.values
        self.description = f"images of {origin}, {found.note}"

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Path of a sample below the folder or in the archive."""
        return self._names[index]

    def load(self, index: int) -> dict[str, np.ndarray]:
        """One sample by input name, without batch axis.

        Raises:
            UnreadableSampleError: the file is damaged.
            DataError: the file is too large to decode safely.
        """
        name = self._names[index]
        try:
            image = open_image(self._read(name), f"{self._origin}/{name}")
            sample = self._target.prepare(image)
        except _BROKEN as error:
            raise UnreadableSampleError(f"{name}: {error}") from error
        return {**self._extra(index), self._target.spec.name: sample}


def open_image(data: bytes, name: str) -> Image.Image:
    """A decoded picture.

    Raises:
        DataError: more than `MAX_PIXELS` pixels; nothing was decoded.
        OSError and others of Pillow: the bytes are damaged.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise OSError("not an image of a known format") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name} is too large to decode safely: {error}", hint="remove it") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"image {name} has {image.width}×{image.height} pixels, more than the {MAX_PIXELS} that are decoded",
            hint="remove it or make it smaller",
        )
    image.load()
    return image


def folder_names(folder: Path) -> list[str]:
    """Image files below a folder, as slash-separated relative paths, sorted; hidden files are left out."""
    names = []
    for parent, _, files in os.walk(folder):
        below = Path(parent).relative_to(folder)
        names += [(below / file).as_posix() for file in files]
    return sorted(name for name in names if _is_image(name))


def folder_reader(folder: Path) -> Callable[[str], bytes]:
    """Reads files below a folder, up to `MAX_FILE_BYTES` each."""

    def read(name: str) -> bytes:
        path = folder / name
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe or a device has no end
            raise OSError("not a regular file")
        _check_size(about.st_size, f"{path}")
        return path.read_bytes()

    return read


def open_archive(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """Sorted image names of a zip, and a thread-safe reader of their bytes.

    Raises:
        DataError: not a zip, encrypted, a member too large, or an archive made to expand without end.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise DataError(f"cannot read {path} as a zip archive: {error}") from error
    members = {info.filename: info for info in archive.infolist() if _is_image(info.filename)}
    for info in members.values():
        if info.flag_bits & 1:
            raise DataError(f"{info.filename} in {path} is encrypted", hint="give an archive without a password")
        _check_size(info.file_size, f"{info.filename} in {path}")
    total, packed = sum(info.file_size for info in members.values()), path.stat().st_size
    if total > _EXPANSION_FREE and total > MAX_EXPANSION * packed:
        raise DataError(f"{path} holds {packed} bytes that unpack to {total}: this looks like a zip bomb")
    lock = threading.Lock()

    def read(name: str) -> bytes:
        # zipfile stops at the size in the directory, so a header that lies cannot go past the limit checked above.
        with lock, archive.open(members[name]) as member:
            return member.read()

    return sorted(members), read


def parse_classes(text: str) -> list[str]:
    """Class names of a model's metadata: separated by commas if there are any, else by white space."""
    parts = text.split(",") if "," in text else text.split()
    return [part.strip() for part in parts if part.strip()]


def folder_labels(names: Sequence[str], classes: Sequence[str] | None = None) -> Labels:
    """Class indices from the name of each file's immediate parent folder.

    Integer names are the class index; other names are looked up in `classes` (the model's own list) when it holds them
    all, else numbered in alphabetical order. There are no labels when a file lies outside any folder, when there is
    just one folder and its name says nothing, or when `classes` holds some of the names but not all: a guess there
    would be a wrong accuracy.
    """
    parents = [PurePosixPath(name).parent.name for name in names]
    folders = sorted(set(parents))
    if "" in folders:
        return Labels(None, "no labels (not every image is in a class folder)")
    if all(folder.isascii() and folder.isdigit() for folder in folders):
        return Labels(np.array([int(parent) for parent in parents], np.int64), "labels: folder names are class numbers")
    known = {name: index for index, name in enumerate(classes or ())}
    missing = [folder for folder in folders if folder not in known]
    if not missing:
        return Labels(_look_up(parents, known), "labels: folder names are in the model's class list")
    if known and len(missing) < len(folders):
        return Labels(None, f"no labels (folder {missing[0]!r} is not among the model's classes)")
    if len(folders) == 1:
        return Labels(None, "no labels (a single folder)")
    alphabetical = {folder: index for index, folder in enumerate(folders)}
    return Labels(_look_up(parents, alphabetical), f"labels: {len(folders)} folders in alphabetical order")


def mapped_labels(names: Sequence[str], labels: Mapping[str, int]) -> Labels:
    """Class numbers from a label map: by the path of a file, its name, its name without suffix, or its folder.

    Raises:
        DataError: an image is not in the map.
    """
    values = []
    for name in names:
        path = PurePosixPath(name)
        found = [labels[key] for key in (name, path.name, path.stem, path.parent.name) if key in labels]
        if not found:
            raise DataError(
                f"the label map has no entry for image {name}",
                hint=f"give one for its folder '{path.parent.name}' or for '{path.name}'",
            )
        values.append(found[0])
    return Labels(np.array(values, np.int64), "labels: by the label map")


def _look_up(parents: Sequence[str], index: Mapping[str, int]) -> np.ndarray:
    return np.array([index[parent] for parent in parents], np.int64)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _check_size(size: int, what: str) -> None:
    if size > MAX_FILE_BYTES:
        raise DataError(f"{what} has {size} bytes, more than the {MAX_FILE_BYTES} read as one image", hint="remove it")
