"""Target profiles: the built-in ones, a user's own in TOML, and every message about a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxsnp.deploy.targets import BUILT_IN, PRECISIONS, get_target
from onnxsnp.errors import PlanError

# release, opset, compute capability, dialect, whether attention is fused; from NVIDIA's JetPack and TensorRT notes
EXPECTED = {
    "jetson-nano": ((8, 2, 1), 13, (5, 3), "8.2", False),
    "jetson-xavier": ((8, 5, 2), 17, (7, 2), "8.4", False),
    "jetson-orin-5.1": ((8, 5, 2), 17, (8, 7), "8.4", True),
    "jetson-orin-6.0": ((8, 6, 2), 17, (8, 7), "8.6", True),
    "jetson-orin": ((10, 3, 0), 20, (8, 7), "10", True),
    "tensorrt-8.6": ((8, 6, 1), 17, None, "8.6", True),
    "tensorrt-10": ((10, 0, 0), 20, None, "10", True),
    "rtx": ((10, 12, 0), 20, None, "10", True),
}


def own(folder: Path, text: str, name: str = "own") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_the_built_in_profiles_are_those_of_the_release_notes() -> None:
    assert BUILT_IN.keys() == EXPECTED.keys()
    for name, (version, opset, capability, dialect, fuses) in EXPECTED.items():
        target = get_target(name)
        assert target.name == name and target.about
        assert (target.tensorrt, target.opset, target.compute_capability) == (version, opset, capability)
        assert (target.dialect, target.fuses_attention) == (dialect, fuses)
        assert target.precisions == PRECISIONS
        assert target.runtime == ("tensorrt-rtx" if name == "rtx" else "tensorrt")


def test_tensor_cores_pad_half_precision_and_the_nano_has_none() -> None:
    assert get_target("jetson-orin").step("fp16") == 8 and get_target("jetson-orin").step("fp32") == 1
    assert get_target("jetson-nano").step("fp16") == get_target("jetson-nano").step() == 1


def test_a_profile_is_plain_data_with_versions_as_text() -> None:
    data = get_target("jetson-nano").to_dict()
    assert data["tensorrt"] == "8.2.1" and data["compute_capability"] == "5.3"
    assert data["dialect"] == "8.2" and data["fuses_attention"] is False
    assert get_target("tensorrt-10").to_dict()["compute_capability"] is None


def test_a_profile_of_ones_own_starts_from_a_built_in_one(tmp_path: Path) -> None:
    text = 'base = "jetson-orin"\ntensorrt = "8.5.2"\nopset = 17\nprecisions = ["fp16", "fp32"]\nmultiple_of = 16\n'
    target = get_target(own(tmp_path, text, "my-orin"))
    assert (target.name, target.about) == ("my-orin", "from my-orin.toml")
    assert (target.tensorrt, target.opset, target.compute_capability) == ((8, 5, 2), 17, (8, 7))
    assert target.precisions == ("fp32", "fp16") and target.step("fp32") == target.step("fp16") == 16
    assert get_target(target) is target


def test_a_profile_of_ones_own_from_nothing(tmp_path: Path) -> None:
    text = (
        'name = "lab"\nabout = "the lab\'s board"\ntensorrt = "11.0"\nopset = 22\ncompute_capability = "12.0"\n'
        'multiple_of = {fp16 = 8}\nruntime = "tensorrt-rtx"\n'
    )
    target = get_target(str(own(tmp_path, text)))
    assert (target.name, target.about, target.dialect) == ("lab", "the lab's board", "11")
    assert target.step("fp16") == 8 and target.step("fp32") == 1
    assert target.runtime == "tensorrt-rtx" and target.compute_capability == (12, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tensorrt = ", "is no TOML file"),
        ('base = "jetson-none"', "has the unknown base 'jetson-none'"),
        ('base = "rtx"\nopsets = 3', "has the unknown key 'opsets'"),
        ('tensorrt = "8.6"', "lacks 'opset'"),
        ("opset = 17", "lacks 'tensorrt'"),
        ('tensorrt = "8.6.x"\nopset = 17', "'tensorrt' of the target .* is not a version"),
        ("tensorrt = 8.6\nopset = 17", "'tensorrt' of the target .* is not a version"),
        ('tensorrt = "8.0"\nopset = 11', "is older than 8.2"),
        ('tensorrt = "8.6"\nopset = 0', "'opset' of the target .* is not a whole number"),
        ('tensorrt = "8.6"\nopset = true', "'opset' of the target .* is not a whole number"),
        ('tensorrt = "8.6"\nopset = "17"', "'opset' of the target .* is not a whole number"),
        ('base = "rtx"\ncompute_capability = 8.9', "'compute_capability' of the target .* is not a version"),
        ('base = "rtx"\nprecisions = []', "is not a list of fp32, fp16"),
        ('base = "rtx"\nprecisions = ["int8"]', "is not a list of fp32, fp16"),
        ('base = "rtx"\nprecisions = "fp16"', "is not a list of fp32, fp16"),
        ('base = "rtx"\nmultiple_of = "8"', "is not a number, or one per precision"),
        ('base = "rtx"\nmultiple_of = {int8 = 16}', "is not a number, or one per precision"),
        ('base = "rtx"\nmultiple_of = {fp16 = 0}', "is not a whole number"),
        ('base = "rtx"\nruntime = "openvino"', "is not one of tensorrt, tensorrt-rtx"),
        ('base = "rtx"\nname = ""', "'name' of the target .* is not a text"),
        ('base = "rtx"\nabout = 3', "'about' of the target .* is not a text"),
    ],
)
def test_a_wrong_profile_is_one_line_that_says_what_and_where(tmp_path: Path, text: str, said: str) -> None:
    path = own(tmp_path, text)
    with pytest.raises(PlanError, match=said) as caught:
        get_target(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_name_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file or directory; check"):
        get_target(tmp_path / "none.toml")
    with pytest.raises(PlanError, match="unknown target 'jetson-nan'; did you mean jetson-nano"):
        get_target("jetson-nan")
    with pytest.raises(PlanError, match=r"unknown target 'zzz'; use one of jetson-nano, .*, or a TOML file"):
        get_target("zzz")


def test_bytes_that_are_no_text_are_no_profile(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(PlanError, match="is no TOML file"):
        get_target(path)
