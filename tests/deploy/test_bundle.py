"""What a bundle holds, what it refuses to hold, and what it refuses to replace."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxsnp.deploy.bundle import BundleModel, write_bundle
from onnxsnp.deploy.manifest import MANIFEST, damaged_files, read_manifest
from onnxsnp.deploy.targets import BUILT_IN, get_target
from onnxsnp.errors import ModelError, PlanError

NANO = get_target("jetson-nano")
FILES = Path(__file__).parents[2] / "onnxsnp" / "deploy" / "files"


def test_the_manifest_lists_every_file_with_its_hash_and_nothing_is_called_built(
    pair: list[BundleModel], tmp_path: Path
) -> None:
    manifest = write_bundle(tmp_path / "nano", pair, NANO)
    assert manifest == read_manifest(tmp_path / "nano")
    files = {str(one.relative_to(tmp_path / "nano")) for one in (tmp_path / "nano").rglob("*") if one.is_file()}
    assert {entry["name"] for entry in manifest["files"]} == files - {MANIFEST}
    for entry in manifest["files"]:
        content = (tmp_path / "nano" / entry["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"])
    assert manifest["built"] is False
    assert (manifest["target"]["name"], manifest["precision"]) == ("jetson-nano", "fp32")
    readme = (tmp_path / "nano" / "README.md").read_text()
    assert "No engine built here: TensorRT engines are built on the device." in readme
    assert "sh build.sh" in readme and "{" not in readme
    assert [one.name for one in tmp_path.iterdir()] == ["nano"]


def test_inputs_and_reference_are_raw_little_endian_values(pair: list[BundleModel], tmp_path: Path) -> None:
    manifest = write_bundle(tmp_path / "nano", pair, NANO)
    for model, entry in zip(pair, manifest["models"], strict=True):
        for kind, arrays in (("inputs", model.feeds), ("outputs", model.reference)):
            assert [one["name"] for one in entry[kind]] == list(arrays)
            for one, array in zip(entry[kind], arrays.values(), strict=True):
                dtype = np.dtype(one["dtype"]).newbyteorder("<")
                found = np.fromfile(tmp_path / "nano" / one["file"], dtype).reshape(one["shape"])
                np.testing.assert_array_equal(found, array)


def test_integers_have_32_bits_for_the_importers_that_narrow_them(pair: list[BundleModel], tmp_path: Path) -> None:
    write_bundle(tmp_path / "nano", pair[:1], NANO)
    ids = pair[0].feeds["ids:0"]
    assert (tmp_path / "nano/pruned/inputs32.txt").read_text() == (
        "ids:0:pruned/inputs/0.int32.bin,x:pruned/inputs/1.bin\n"
    )
    assert (tmp_path / "nano/pruned/inputs.txt").read_text() == "ids:0:pruned/inputs/0.bin,x:pruned/inputs/1.bin\n"
    narrow = np.fromfile(tmp_path / "nano/pruned/inputs/0.int32.bin", "<i4")
    np.testing.assert_array_equal(narrow, ids.reshape(-1))


def test_numbers_beyond_32_bits_are_refused(pair: list[BundleModel], tmp_path: Path) -> None:
    model = replace(pair[0], feeds={**pair[0].feeds, "ids:0": pair[0].feeds["ids:0"] + 2**40})
    with pytest.raises(ModelError, match="beyond 32 bits"):
        write_bundle(tmp_path / "nano", [model], NANO)
    assert not any(tmp_path.iterdir())


def test_an_input_that_does_not_fit_the_model_is_refused(pair: list[BundleModel], tmp_path: Path) -> None:
    for feeds in (
        {"x": pair[0].feeds["x"]},
        {**pair[0].feeds, "x": np.zeros((1, 4, 9), np.float32)},
        {**pair[0].feeds, "x": np.zeros((1, 4, 8), np.float64)},
    ):
        with pytest.raises(ModelError, match="of the pruned model takes"):
            write_bundle(tmp_path / "nano", [replace(pair[0], feeds=feeds)], NANO)


def test_names_that_trtexec_would_split_and_free_shapes_are_refused(pair: list[BundleModel], tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(pair[0].proto)
    proto.graph.input[1].name = "x,y"
    with pytest.raises(ModelError, match="comma"):
        write_bundle(tmp_path / "nano", [replace(pair[0], proto=proto)], NANO)
    proto.CopyFrom(pair[0].proto)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(ModelError, match="no fixed shape"):
        write_bundle(tmp_path / "nano", [replace(pair[0], proto=proto)], NANO)


def test_a_precision_that_the_target_lacks_is_refused(pair: list[BundleModel], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has no fp16"):
        write_bundle(tmp_path / "nano", pair, replace(NANO, precisions=("fp32",)), "fp16")


def test_tensorrt_11_takes_fp16_only_from_the_model(pair: list[BundleModel], tmp_path: Path) -> None:
    target = replace(BUILT_IN["tensorrt-10"], tensorrt=(11, 0, 0))
    with pytest.raises(ModelError, match="no fp16 in it"):
        write_bundle(tmp_path / "eleven", pair, target, "fp16")
    write_bundle(tmp_path / "eleven", pair, target, "fp32")


def test_an_earlier_bundle_and_its_results_are_replaced(pair: list[BundleModel], tmp_path: Path) -> None:
    write_bundle(tmp_path / "nano", pair, NANO)
    (tmp_path / "nano/results").mkdir()
    (tmp_path / "nano/results/old").touch()
    write_bundle(tmp_path / "nano", pair[:1], NANO)
    assert not (tmp_path / "nano/results").exists() and not (tmp_path / "nano/original").exists()
    assert damaged_files(tmp_path / "nano") == []


@pytest.mark.parametrize("there", ["file", "folder", "bundle with notes", "link"])
def test_nothing_but_an_earlier_bundle_is_replaced(pair: list[BundleModel], tmp_path: Path, there: str) -> None:
    place, kept = tmp_path / "nano", tmp_path / "nano" / "notes.txt"
    if there == "file":
        kept = place
    elif there == "folder":
        place.mkdir()
    elif there == "link":
        (tmp_path / "other").mkdir()
        place.symlink_to(tmp_path / "other")
    else:
        write_bundle(place, pair, NANO)
    kept.write_text("mine")
    with pytest.raises(PlanError, match="nano"):
        write_bundle(place, pair, NANO)
    assert kept.read_text() == "mine"


def test_a_write_that_fails_leaves_what_was_there(
    pair: list[BundleModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "nano", pair, NANO)
    before = read_manifest(tmp_path / "nano")

    def full(path: Path, *rest: object, **options: object) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelError, match="No space left"):
        write_bundle(tmp_path / "nano", pair[:1], NANO)
    monkeypatch.undo()
    assert read_manifest(tmp_path / "nano") == before and damaged_files(tmp_path / "nano") == []
    assert [one.name for one in tmp_path.iterdir()] == ["nano"]


def test_damage_is_found_by_name(pair: list[BundleModel], tmp_path: Path) -> None:
    write_bundle(tmp_path / "nano", pair, NANO)
    with open(tmp_path / "nano/original/model.onnx", "ab") as stream:
        stream.write(b"x")
    (tmp_path / "nano/settings.sh").unlink()
    assert damaged_files(tmp_path / "nano") == ["original/model.onnx", "settings.sh"]
    with pytest.raises(ModelError, match="no bundle"):
        read_manifest(tmp_path)


def test_build_sh_is_clean_and_check_py_is_python_3_6() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program is not None
    checked = subprocess.run([program, str(FILES / "build.sh")], capture_output=True, text=True, check=False)
    assert checked.stdout == "" and checked.returncode == 0
    source = (FILES / "check.py").read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    compile(source, "check.py", "exec")
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported == {"hashlib", "json", "math", "os", "re", "struct", "sys", "typing"}


def test_a_name_of_the_users_cannot_run_a_command_on_the_device(pair: list[BundleModel], tmp_path: Path) -> None:
    write_bundle(tmp_path / "nano", pair, replace(NANO, name="x'; touch hacked; '$(touch hacked)"))
    subprocess.run(["sh", "-c", ". ./settings.sh"], cwd=tmp_path / "nano", check=True)
    assert not (tmp_path / "nano/hacked").exists()
    assert json.loads((tmp_path / "nano" / MANIFEST).read_text())["target"]["name"].startswith("x'")
