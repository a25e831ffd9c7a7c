"""DeiT-Tiny, lowered for every target, gives the classes that it gave, where the model and the images are present."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from one_node import TARGETS

from onnxsnp.deploy.lint import lint
from onnxsnp.deploy.lower import lower
from onnxsnp.deploy.targets import BUILT_IN
from onnxsnp.verbs import evaluate


@pytest.fixture(scope="module")
def deit_tiny(real_data: Path) -> Path:
    path = real_data / "models" / "deit_tiny.onnx"
    if not path.exists():
        pytest.skip(f"no DeiT-Tiny at {path}")
    return path


@pytest.fixture(scope="module")
def images(real_data: Path) -> Path:
    path = real_data / "data" / "imagenet" / "val.zip"
    if not path.exists():
        pytest.skip(f"no validation images at {path}")
    return path


def test_top_1_is_that_of_the_original_for_every_target(deit_tiny: Path, images: Path, tmp_path: Path) -> None:
    paths = []
    for target in TARGETS:
        lowered = lower(deit_tiny, BUILT_IN[target]).proto
        assert lint(lowered, BUILT_IN[target]) == []
        onnx.checker.check_model(lowered, full_check=True)
        paths.append(tmp_path / f"{target}.onnx")
        onnx.save(lowered, str(paths[-1]))
    *ours, original = evaluate([*paths, deit_tiny], images, samples=64)  # those of a fixed batch first
    assert original.top1 is not None and original.top1 > 40
    assert [one.top1 for one in ours] == [original.top1] * len(TARGETS)
    assert [one.agreement for one in [*ours[1:], original]] == [100] * len(TARGETS)
