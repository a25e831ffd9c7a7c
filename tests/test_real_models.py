"""The main path on a real ImageNet model and real images, where they are present."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.pruning import prune


@pytest.fixture(scope="module")
def deit_tiny(real_data: Path) -> Analysis:
    path = real_data / "models" / "deit_tiny.onnx"
    if not path.exists():
        pytest.skip(f"no DeiT-Tiny at {path}")
    return analyse_model(path)


@pytest.fixture(scope="module")
def images(real_data: Path) -> Path:
    path = real_data / "data" / "imagenet" / "calibration.zip"
    if not path.exists():
        pytest.skip(f"no calibration images at {path}")
    return path


def test_every_part_of_deit_tiny_is_found(deit_tiny: Analysis) -> None:
    kinds = [group.kind for group in deit_tiny.structure.groups]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"qk": 12, "v": 12, "head": 12, "ffn": 12, "residual": 1}
    assert all(group.prunable for group in deit_tiny.structure.groups) and not deit_tiny.structure.skipped
    sizes = {(group.kind, group.size, group.heads) for group in deit_tiny.structure.groups}
    assert sizes == {("qk", 64, 3), ("v", 64, 3), ("head", 3, 1), ("ffn", 768, 1), ("residual", 192, 1)}
    assert deit_tiny.cost.total("params") == 5717416


def test_a_third_of_deit_tiny_goes_and_most_answers_stay(deit_tiny: Analysis, images: Path) -> None:
    record = prune(deit_tiny, 0.25, allocation="uniform", calibration=images, samples=64).record
    assert record["verification"]["passed"] and record["verification"]["masked_equality"] < 1e-5
    assert record["after"]["macs"] < 0.8 * record["before"]["macs"]
    assert record["agreement"]["samples"] >= 32 and record["agreement"]["top1"] > 60


def test_rotated_query_key_pairs_follow_the_original_better_than_selected_ones(
    deit_tiny: Analysis, images: Path
) -> None:
    def kl(compensation: str) -> float:
        options = {"allocation": "uniform", "scope": "qk", "samples": 32, "compensation": compensation}
        return prune(deit_tiny, 0.5, calibration=images, **options).record["agreement"]["kl"]

    assert kl("full") < 0.6 * kl("none")
