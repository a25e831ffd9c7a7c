"""`evaluate` and `bench` as Python functions: the first model's preprocessing, and clear refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp import verbs
from onnxsnp.calibration.preprocess import Preprocess
from onnxsnp.errors import DataError, ModelError
from onnxsnp.runtime import InputSpec

FLOAT = np.dtype(np.float32)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two models with the same input and other weights."""
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for seed, path in enumerate(paths):
        onnx.save(graphs.mlp(8, 16, 5, seed=seed), str(path))
    return paths


def test_evaluate_compares_with_the_first_model(pair: list[Path]) -> None:
    same = verbs.evaluate([pair[0], pair[0]], samples=12)[1]
    other = verbs.evaluate(pair, {"x": np.random.default_rng(0).standard_normal((12, 8), np.float32)})[1]
    assert same.count == 12 and same.agreement == 100 and same.cosine == pytest.approx(1)
    assert other.count == 12 and other.cosine is not None and other.cosine < 0.99


def test_bench_pairs_models_and_counts_its_rounds(pair: list[Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = verbs.bench(pair, runs=3, warmup=1, batch=2, threads=1, progress=lambda *step: seen.append(step))
    assert [one.model for one in found] == [str(path) for path in pair]
    assert all(one.median > 0 and one.runs == 3 and one.batch == 2 for one in found) and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("verb", [verbs.evaluate, lambda models: verbs.bench(models, runs=1)])
def test_what_is_no_model_is_named(verb: Callable[[list[Path]], object], pair: list[Path]) -> None:
    pair[1].write_text("hello")
    with pytest.raises(ModelError, match=r"b\.onnx is not an ONNX model"):
        verb(pair)
    pair[1].unlink()
    with pytest.raises(ModelError, match=r"no such model file: .*b\.onnx"):
        verb(pair)


@pytest.mark.parametrize("verb", [verbs.evaluate, lambda models: verbs.bench(models, runs=1)])
def test_no_model_at_all(verb: Callable[[list[Path]], object]) -> None:
    with pytest.raises(ModelError, match="no model"):
        verb([])


def test_class_names_come_from_the_metadata() -> None:
    assert verbs.class_names({}) is None and verbs.class_names({"classes": ""}) is None
    assert verbs.class_names({"classes": "cat,dog"}) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("shape", "size"),
    [((1, 3, 32, 48), (32, 48)), (("N", 16, 24, 3), (16, 24)), (("N", 3, "H", None), (224, 224))],
)
def test_preprocessing_takes_the_size_of_the_models_input(shape: tuple, size: tuple[int, int]) -> None:
    assert verbs.choose_preprocess([InputSpec("x", shape, FLOAT)], {}, "half") == verbs.resolve_preprocess(
        "half", {}, size
    )


def test_a_model_without_an_image_input_needs_no_preprocessing() -> None:
    specs = [InputSpec("x", ("N", 8), FLOAT)]
    assert verbs.choose_preprocess(specs, {}, None) is None
    with pytest.raises(DataError, match="no image input"):
        verbs.choose_preprocess(specs, {}, "half")


def test_a_ready_made_preprocess_is_taken_as_it_is(exports: Path) -> None:
    path = exports / "timm_deit_sdpa_ts17_dyn.onnx"
    ready = verbs.resolve_preprocess("raw", {}, (16, 16))
    assert isinstance(ready, Preprocess)
    assert verbs.open_for([path], None, samples=4, preprocess=ready).samples == 4
