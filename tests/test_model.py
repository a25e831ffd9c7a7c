"""Reading refuses what is broken or reaches outside; writing leaves a whole file or none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import graphs
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxsnp import model as files
from onnxsnp.errors import ModelError
from onnxsnp.model import load, save, whole_file


@pytest.fixture
def model() -> onnx.ModelProto:
    return graphs.mlp(40, 50, 3)


def external(model: onnx.ModelProto, folder: Path, location: str = "weights.bin") -> Path:
    """Write the model with its large weights in another file."""
    path = folder / "model.onnx"
    clone = onnx.ModelProto()
    clone.CopyFrom(model)
    onnx.save(clone, str(path), save_as_external_data=True, location=location, size_threshold=100)
    return path


def rewritten(path: Path, **entries: str) -> Path:
    """Change the external-data entries of the file's first external weight."""
    proto = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.data_location == TensorProto.EXTERNAL)
    held = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in held.items():
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def same_weights(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_weights_stand_beside_the_graph(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    for source in (path, str(path), model):
        found = load(source)
        assert same_weights(found.weights, graphs.initializers(model)) and not found.proto.graph.initializer
        assert found.bytes == path.stat().st_size
    assert load(found) is found


def test_metadata_is_read(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="classes", value="cat, dog")
    assert load(model).metadata == {"classes": "cat, dog"}


def test_the_given_message_is_not_changed(model: onnx.ModelProto) -> None:
    before = model.SerializeToString()
    load(model)
    assert model.SerializeToString() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such model file"),
        (b"", "is empty or is not an ONNX model"),
        (b"hello world\n", "not an ONNX model"),
        (b"\x00" * 100, "not an ONNX model"),
        (b"PK\x03\x04" + b"x" * 50, "not an ONNX model"),
    ],
)
def test_what_is_no_model_is_one_clear_error(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert "model.onnx" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("extension", ["json", "textproto", "onnxtxt", "txt"])
def test_text_files_are_refused_by_any_name(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"model.{extension}"
    path.write_text("hello world {")
    with pytest.raises(ModelError):
        load(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a file"):
        load(tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(model: onnx.ModelProto, tmp_path: Path, share: float) -> None:
    content = model.SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError):
        load(path)


def test_an_initializer_with_too_few_bytes_is_refused(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "fc0.w")
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(ModelError, match=r"'fc0\.w' declares \[40, 50\] but holds 7996 bytes"):
        load(model)


def test_two_initializers_of_one_name_are_refused(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(ModelError, match="two initializers share the name"):
        load(model)


@pytest.mark.parametrize("location", ["weights.bin", "inner/weights.bin"])
def test_external_data_inside_the_folder_is_read(model: onnx.ModelProto, tmp_path: Path, location: str) -> None:
    (tmp_path / "inner").mkdir()
    found = load(external(model, tmp_path, location))
    assert same_weights(found.weights, graphs.initializers(model))
    assert found.bytes > sum(array.nbytes for array in found.weights.values() if array.nbytes > 1000)


def test_external_data_is_found_from_any_working_folder(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    external(model, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert same_weights(load("model.onnx").weights, graphs.initializers(model))


@pytest.mark.parametrize("location", ["../secret.bin", "inner/../../secret.bin", "", ".", "/etc/hostname"])
def test_external_data_outside_the_folder_is_refused(model: onnx.ModelProto, tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(100000))
    with pytest.raises(ModelError, match="points outside the model's folder"):
        load(rewritten(external(model, folder), location=location))


def test_external_data_behind_an_absolute_path_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(model, tmp_path)
    with pytest.raises(ModelError, match="points outside the model's folder"):
        load(rewritten(path, location=str(tmp_path / "weights.bin")))


def test_external_data_behind_a_link_that_leaves_the_folder_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(model, folder)
    (folder / "weights.bin").rename(tmp_path / "outside.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(ModelError, match="points outside the model's folder"):
        load(path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ModelError, match="points outside the model's folder"):
        load(rewritten(path, location="../link/outside.bin"))


def test_missing_external_data_is_named(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(model, tmp_path)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"external data file is missing: .*weights.bin"):
        load(path)


def test_external_data_that_is_too_short_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = external(model, tmp_path)
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:100])
    with pytest.raises(ModelError, match=r"more than weights.bin holds; the file is truncated"):
        load(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"offset": "-4"}, "at -4, more than"), ({"offset": "x"}, "bad offset"), ({"offset": str(2**62)}, "more than")],
)
def test_impossible_offsets_are_refused(
    model: onnx.ModelProto, tmp_path: Path, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        load(rewritten(external(model, tmp_path), **entries))


def test_external_data_without_a_path_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    proto = onnx.load(str(external(model, tmp_path)), load_external_data=False)
    with pytest.raises(ModelError, match="but the model has no path"):
        load(proto)


def test_what_was_written_is_what_was_given(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    assert save(model, path) == len(model.SerializeToString()) == path.stat().st_size
    assert onnx.load(str(path)) == model and os.listdir(tmp_path) == ["out.onnx"]


def test_weights_that_are_written_one_by_one_come_out_as_initializers(model: onnx.ModelProto, tmp_path: Path) -> None:
    bare, path = onnx.ModelProto(), tmp_path / "out.onnx"
    bare.CopyFrom(model)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    del bare.graph.initializer[:]
    weights["large"] = np.arange(100_000, dtype=np.float32).reshape(100, 1000)
    save(bare, path, weights=weights)
    read = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
    assert list(read) == list(weights)
    for name, array in weights.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), whole_file(path) as part:
        part.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.onnx"]


def test_a_model_that_fails_to_be_written_leaves_the_old_file(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.onnx"
    path.write_text("old")

    def full(proto: object, weights: object, stream: BinaryIO) -> None:
        stream.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr("onnxsnp.model._write_message", full)
    with pytest.raises(ModelError, match="no space left"):
        save(model, path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.onnx"]


def test_a_model_that_fails_its_check_is_not_left_behind(model: onnx.ModelProto, tmp_path: Path) -> None:
    def check(path: Path) -> None:
        assert onnx.load(str(path)).graph.node
        raise ModelError("does not run")

    path = tmp_path / "out.onnx"
    path.write_text("old")
    with pytest.raises(ModelError, match="does not run"):
        save(model, path, check)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.onnx"]


def test_models_over_the_limit_get_their_weights_beside_them(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PROTO_LIMIT", 100)
    weights, path = graphs.initializers(model), tmp_path / "big.onnx"
    written = save(model, path)
    assert sorted(os.listdir(tmp_path)) == ["big.onnx", "big.onnx.data"]
    assert written == sum((tmp_path / name).stat().st_size for name in os.listdir(tmp_path))
    assert same_weights(load(path).weights, weights)
    assert same_weights(graphs.initializers(onnx.load(str(path))), weights)


def test_models_over_the_limit_are_checked_too(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PROTO_LIMIT", 100)
    checked: list[Path] = []
    save(model, tmp_path / "big.onnx", checked.append)
    assert checked


def test_a_missing_output_folder_is_named(model: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"output folder does not exist: .*nowhere"):
        save(model, tmp_path / "nowhere" / "out.onnx")


def test_an_output_that_is_a_folder_is_refused(model: onnx.ModelProto, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        save(model, tmp_path)


def test_scalars_empty_tensors_and_packed_types_are_read() -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, [1])],
        [helper.make_tensor_value_info("y", 1, [1])],
        [
            helper.make_tensor("scalar", 1, [], [2.5]),
            helper.make_tensor("none", 1, [0, 3], []),
            helper.make_tensor("nibbles", TensorProto.INT4, [4], [1, -2, 3, -4]),
            helper.make_tensor("brain", TensorProto.BFLOAT16, [2], [1.5, -2.0]),
        ],
    )
    found = load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)).weights
    assert found["scalar"] == 2.5 and found["none"].shape == (0, 3)
    assert found["nibbles"].astype(int).tolist() == [1, -2, 3, -4]
    assert found["brain"].astype(float).tolist() == [1.5, -2.0]
