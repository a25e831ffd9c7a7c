"""Attention maps show what the models attend to, and rollout follows its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.evaluation.rollout import attention_maps, by_head, drawn, from_png, grid_of, rollout
from onnxsnp.planning.plan import Plan
from onnxsnp.pruning import prune
from onnxsnp.surgery.apply import apply

MODEL = Path(__file__).parents[2] / "models" / "deit_cifar10.onnx"


def probabilities(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).random(shape)
    return values / values.sum(-1, keepdims=True)


def test_rollout_is_the_product_of_the_layers_with_their_residuals() -> None:
    layers = [probabilities(2, 3, 5, 5, seed=seed) for seed in range(3)]
    naive = np.zeros((2, 5, 5))
    for sample in range(2):
        joint = np.eye(5)
        for layer in layers:  # from the input to the output
            joint = (0.5 * layer[sample].mean(axis=0) + 0.5 * np.eye(5)) @ joint
        naive[sample] = joint
    found = rollout(layers)
    np.testing.assert_allclose(found, naive)
    np.testing.assert_allclose(found.sum(-1), 1)


@pytest.mark.parametrize("layout", ["heads", "merged", "keys before queries"])
def test_probabilities_are_found_in_any_layout(layout: str) -> None:
    want = probabilities(4, 3, 5, 6)
    given = {"heads": want, "merged": want.reshape(12, 5, 6), "keys before queries": want.swapaxes(2, 3)}[layout]
    found = by_head(given, 4)
    assert found is not None
    np.testing.assert_allclose(found, want)


def test_windows_have_no_map_of_a_sample() -> None:
    assert by_head(probabilities(8, 3, 5, 5), 2) is None
    assert by_head(np.ones((2, 3, 5, 5)), 2) is None


@pytest.mark.parametrize(
    ("tokens", "shape", "want"),
    [
        (65, (32, 32), (1, 8, 8)),
        (198, (224, 224), (2, 14, 14)),
        (49, (224, 224), (0, 7, 7)),
        (33, (32, 64), (1, 4, 8)),
        (40, (32, 32), (4, 6, 6)),
        (62, (32, 32), None),
    ],
)
def test_tokens_lie_on_a_grid_of_the_picture_s_shape(
    tokens: int, shape: tuple[int, int], want: tuple[int, int, int] | None
) -> None:
    assert grid_of(tokens, shape) == want


def test_maps_are_the_class_token_s_row_on_one_scale() -> None:
    before, after = probabilities(2, 3, 10, 10), probabilities(2, 1, 10, 10, seed=1)
    shown = drawn(before, after, (9, 9))
    assert isinstance(shown, dict) and shown["grid"] == [3, 3]
    top = np.maximum(before[:, :, 0, 1:].max(axis=(1, 2)), after[:, :, 0, 1:].max(axis=(1, 2)))
    picture = from_png(shown["after"])
    assert picture.shape == (6, 3)
    np.testing.assert_allclose((picture[3:] / 255) ** 2, after[1, 0, 0, 1:].reshape(3, 3) / top[1], atol=1 / 255)
    third = before[0, 2, 0, 1:].reshape(3, 3) / top[0]
    np.testing.assert_allclose((from_png(shown["before"])[:3, 6:] / 255) ** 2, third, atol=1 / 255)


def test_the_heads_that_are_left_are_compared_with_themselves() -> None:
    analysis = analyse_model(MODEL)
    plan = Plan("", [graphs.keeping(analysis.groups["head.5"], [[1, 3]])])
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    found: dict[str, Any] = attention_maps(
        analysis, apply(analysis, plan).graph, Batch({analysis.graph.inputs[0]: images}, None, 2), plan, threads=1
    )
    last = found["sites"][-1]
    assert last["heads"] == [4, 2] and last["kept"] == [1, 3] and max(last["distance"]) < 1e-4
    both, left = from_png(last["before"]), from_png(last["after"])
    np.testing.assert_allclose(left[:, :8], both[:, 8:16], atol=1)
    assert len(found["images"]) == 2 and found["rollout"]["grid"] == [8, 8] and not found["skipped"]
    assert found["rollout"]["distance"] > 0


def test_tokens_without_a_picture_are_shown_as_whole_maps() -> None:
    model = graphs.transformer()
    analysis = analyse_model(model)
    inputs = graphs.calibration(model, 2)
    plan = Plan("", [])
    batch = Batch(dict(inputs), None, 2)
    found = attention_maps(analysis, apply(analysis, plan).graph, batch, plan, threads=1)
    assert found["images"] == [] and all(site["grid"] == [5, 5] for site in found["sites"])
    assert found["sites"] and all(max(site["distance"]) == 0 for site in found["sites"])


@pytest.mark.parametrize(
    ("name", "rolled"), [("text_bert_ts17_dyn", True), ("text_bart_ts17_dyn", False), ("levit_timm_ts17_dyn", False)]
)
def test_only_one_sequence_that_reads_itself_is_rolled_out(name: str, rolled: bool) -> None:
    model = Path(__file__).parents[1] / "exports" / "families" / f"{name}.onnx"
    options = {"samples": 4, "compensation": "none", "allocation": "uniform", "latency": False, "threads": 1}
    found = prune(model, 0.3, attention_maps=1, **options).record["attention"]
    assert (found["rollout"] is not None) == rolled and len(found["sites"]) > 1 and not found["skipped"]


@pytest.mark.parametrize("text", ["", "AAAA", "no base64!", None, 3])
def test_what_is_no_picture_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"picture|base64|padding"):
        from_png(text)
