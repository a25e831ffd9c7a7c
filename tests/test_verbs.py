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


def test_bench_takes_lists_and_measures_memory(pair: list[Path]) -> None:
    found = verbs.bench(pair, runs=2, warmup=0, batch=[1, 3, 1], threads=[1, 2])
    pairs = [(threads, batch) for threads in (1, 2) for batch in (1, 3) for _ in pair]
    assert [(one.threads, one.batch) for one in found] == pairs
    assert all(one.memory is None for one in found)
    (measured,) = verbs.bench(pair[:1], runs=1, warmup=0, threads=1, memory=True)
    assert measured.memory is None or 0 < measured.memory < 100e6


def test_the_breakdown_covers_every_setting(pair: list[Path]) -> None:
    found = verbs.bench_per_op(pair, runs=3, warmup=1, batch=[1, 4], threads=1)
    assert [one["batch"] for one in found] == [1, 4]
    for one in found:
        assert [profile["model"] for profile in one["profiles"]] == [str(path) for path in pair]
        assert one["unbought"][0]["macs"] == 1.0


def test_evaluate_names_the_classes_by_the_label_map(pair: list[Path], tmp_path: Path) -> None:
    (tmp_path / "map.txt").write_text("ant 0\nbee 3\n")
    assert verbs.known_names(pair[0], {"ant": 0, "bee": 3}) == ["ant", "1", "2", "bee"]
    assert verbs.known_names(pair[0], {"ant": 0, "a": 0}) is None
    with pytest.raises(DataError, match="is for images"):
        verbs.evaluate(pair, {"x": np.zeros((2, 8), np.float32)}, labels=tmp_path / "map.txt")
