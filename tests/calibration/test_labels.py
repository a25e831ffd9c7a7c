"""Label maps in the forms that are around, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from onnxsnp.calibration.data import open_dataset
from onnxsnp.calibration.images import mapped_labels
from onnxsnp.calibration.labels import read_label_map
from onnxsnp.errors import DataError
from onnxsnp.runtime import InputSpec


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"cat": 3, "dog": 0}', {"cat": 3, "dog": 0}),
        ('{"cat": "3"}', {"cat": 3}),
        ('{"3": "cat", "0": "dog"}', {"cat": 3, "dog": 0}),
        ('{"281": ["n02123045", "tabby"]}', {"n02123045": 281, "tabby": 281}),
        ('{"7": 2}', {"7": 2}),
        ('["dog", "cat"]', {"dog": 0, "cat": 1}),
        ('[["n01", "tench"], ["n02"]]', {"n01": 0, "tench": 0, "n02": 1}),
        ("cat 3\ndog 0\n", {"cat": 3, "dog": 0}),
        ("# classes\ntabby cat,3\n\nx.JPEG\t5\n", {"tabby cat": 3, "x.JPEG": 5}),
        ("3 tabby cat\n0 dog", {"tabby cat": 3, "dog": 0}),
        ("\ufefftench, Tinca\n\ngold fish\n", {"tench, Tinca": 0, "gold fish": 2}),
    ],
)
def test_the_forms_that_are_around(text: str, found: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_text(text, encoding="utf-8")
    assert read_label_map(path) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("{}", "is empty"),
        ("{", "no JSON"),
        ('{"cat": true}', "cannot be read at"),
        ('{"cat": 1.5}', "cannot be read at"),
        ('{"cat": "dog"}', "cannot be read at"),
        ("[1, 2]", "cannot be read at"),
        ('{"cat": -1}', "the class -1"),
        ("cat 1\ncat 2", "classes 1 and 2"),
        ("\ud800", "no text"),
    ],
)
def test_what_is_no_map_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(DataError, match=says):
        read_label_map(path)
    with pytest.raises(DataError, match="cannot read the label map"):
        read_label_map(tmp_path / "absent")


def test_a_file_of_its_own_goes_before_its_folder() -> None:
    labels = {"cats": 3, "b.png": 5, "c": 6, "cats/d.png": 7}
    found = mapped_labels(["cats/a.png", "cats/b.png", "dogs/c.png", "cats/d.png"], labels)
    assert found.values is not None and found.values.tolist() == [3, 5, 6, 7]
    with pytest.raises(DataError, match=r"no entry for image birds/e\.png"):
        mapped_labels(["cats/a.png", "birds/e.png"], labels)


def test_a_map_decides_the_labels_of_images_and_fits_no_arrays(tmp_path: Path) -> None:
    for name in ("zebra", "ant"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    spec = InputSpec("x", ("N", 3, 8, 8), np.dtype(np.float32))
    (batch,) = open_dataset(tmp_path, [spec], shuffle=False, labels={"zebra": 0, "ant": 9})
    assert batch.labels is not None and batch.labels.tolist() == [9, 0]  # folders in alphabetical order
    with pytest.raises(DataError, match="is for images"):
        open_dataset(np.zeros((2, 3, 8, 8), np.float32), [spec], labels={"zebra": 0})
