"""Accuracy and agreement against values worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.calibration.data import open_dataset
from onnxsnp.errors import DataError, ModelError
from onnxsnp.evaluation.accuracy import evaluate_models, label_ranks, softmax_kl, vector_cosines, wilson_interval
from onnxsnp.runtime import input_specs, open_session


def linear(weight: np.ndarray, *, batch: int | str = "N", name: str = "x", rank3: bool = False) -> bytes:
    """A model whose logits are `x @ weight` (and, with rank3, only an output of three axes)."""
    weight = np.asarray(weight, np.float32)
    rows, columns = weight.shape
    nodes = [helper.make_node("MatMul", [name, "w"], ["logits"])]
    out_shape: list[int | str] = [batch, "T", columns] if rank3 else [batch, columns]
    in_shape: list[int | str] = [batch, "T", rows] if rank3 else [batch, rows]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, in_shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, out_shape)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def opened(model: bytes, values: np.ndarray, labels: list[int] | None = None, **options):
    content = {"x": np.asarray(values, np.float32)}
    if labels is not None:
        content["labels"] = np.array(labels)
    return open_dataset(content, input_specs(open_session(model)), **options)


def test_top1_and_top5_count_planted_labels() -> None:
    logits = np.tile(np.arange(8, 0, -1, dtype=np.float32), (10, 1))  # class 0 is best, class 7 worst
    labels = [0, 0, 0, 1, 4, 4, 5, 6, 7, 7]  # three right at top-1, six in the first five
    identity = linear(np.eye(8))
    (result,) = evaluate_models([identity], opened(identity, logits, labels, batch_size=3))
    assert (result.top1, result.top5, result.count) == (30.0, 60.0, 10)
    assert result.top1_interval == pytest.approx((10.78, 60.32), abs=0.01)
    assert result.agreement is None and result.kl is None and result.cosine is None


def test_without_labels_there_is_no_accuracy_but_there_is_agreement() -> None:
    identity = linear(np.eye(2))
    first, second = evaluate_models([identity, identity], opened(identity, np.eye(2)))
    assert first.top1 is None and second.top1 is None
    assert (second.agreement, second.cosine, second.kl, second.max_abs_difference) == (100.0, 1.0, 0.0, 0.0)


def test_agreement_cosine_kl_and_difference_match_hand_computed_values() -> None:
    identity, swapped = linear(np.eye(2)), linear([[0, 1], [1, 0]])
    rows = np.array([[3.0, 4.0], [1.0, 1.0], [2.0, 0.0], [5.0, 5.0]])  # ties go to class 0 in both
    results = evaluate_models([identity, swapped], opened(identity, rows, batch_size=3))
    result = results[1]
    assert result.agreement == 50.0
    assert result.cosine == pytest.approx((24 / 25 + 1 + 0 + 1) / 4)
    assert result.cosine_by_output == {"logits": result.cosine}
    # two classes with logit difference d: KL(p || swapped p) = (2·sigmoid(d) − 1)·d
    by_hand = sum((2 / (1 + math.exp(-d)) - 1) * d for d in (-1.0, 0.0, 2.0, 0.0)) / 4
    assert result.kl == pytest.approx(by_hand)
    assert result.max_abs_difference == 2.0


def test_kl_is_taken_from_the_first_model_to_the_other() -> None:
    first, second = np.log([[0.9, 0.1]]), np.log([[0.5, 0.5]])
    assert softmax_kl(first, second)[0] == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert softmax_kl(second, first)[0] == pytest.approx(0.5 * math.log(5 / 9) + 0.5 * math.log(5))
    identity, flat = linear(np.eye(2)), linear(np.zeros((2, 2)))
    result = evaluate_models([identity, flat], opened(identity, first))[1]
    assert result.kl == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2))
    assert softmax_kl(first + 1000, second - 1000)[0] == pytest.approx(softmax_kl(first, second)[0])


def test_the_same_results_whatever_the_batch_size() -> None:
    rng = np.random.default_rng(0)
    a, b = linear(rng.standard_normal((6, 9))), linear(rng.standard_normal((6, 9)))
    values, labels = rng.standard_normal((23, 6)), rng.integers(0, 9, 23).tolist()
    one, many = (evaluate_models([a, b], opened(a, values, labels, batch_size=size))[1] for size in (1, 23))
    assert (one.top1, one.top5, one.agreement) == (many.top1, many.top5, many.agreement)
    assert one.cosine == pytest.approx(many.cosine) and one.kl == pytest.approx(many.kl)


def test_padding_of_a_fixed_batch_is_not_counted() -> None:
    fixed = linear(np.eye(2), batch=4)
    swapped = linear([[0, 1], [1, 0]], batch=4)
    rows = np.array([[1.0, 0.0]] * 4 + [[0.0, 0.0]])  # the fifth would be repeated four times
    data = opened(fixed, rows, [0, 0, 0, 0, 1], pad_last=True, shuffle=False)
    first, second = evaluate_models([fixed, swapped], data)
    assert first.count == 5 and first.top1 == 80.0
    assert second.agreement == 20.0 and second.cosine == pytest.approx(1 / 5)


def test_ties_count_as_argmax_decides_and_broken_rows_never_count_as_right() -> None:
    flat = np.zeros((3, 10))
    assert label_ranks(flat, np.array([0, 1, 9])).tolist() == [0, 1, 9]
    broken = np.array([[np.nan, 0.0], [np.inf, 0.0], [1.0, 0.0]])
    assert (label_ranks(broken, np.array([0, 0, 0])) < 5).tolist() == [False, False, True]


def test_a_model_that_gives_nan_is_wrong_and_disagrees() -> None:
    good, bad = linear(np.eye(2)), linear([[np.nan, 0], [0, 1]])
    result = evaluate_models([good, bad], opened(good, np.ones((4, 2)), [0, 0, 0, 0]))[1]
    assert (result.nonfinite, result.top1, result.agreement, result.cosine) == (4, 0.0, 0.0, 0.0)
    assert result.kl is None and result.max_abs_difference is None


def test_outputs_that_are_not_logits_are_compared_by_cosine_along_the_last_axis() -> None:
    first, second = linear(np.eye(2), rank3=True), linear([[1, 0], [0, -1]], rank3=True)
    rows = np.array([[[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]])  # cosines 1, −1, −1
    result = evaluate_models([first, second], opened(first, rows))[1]
    assert result.cosine == pytest.approx(-1 / 3) and result.agreement is None and result.kl is None
    assert result.max_abs_difference == 6.0


def test_cosine_of_zero_vectors_is_one_only_when_both_are_zero() -> None:
    a, b = np.array([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    assert vector_cosines(a, b).tolist() == [1.0, 0.0, 1.0]


def test_wilson_interval_matches_published_values() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)
    assert wilson_interval(10, 10) == pytest.approx((72.25, 100.0), abs=0.01)
    assert wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)  # Newcombe 1998, table I


def test_models_with_other_inputs_or_outputs_are_refused() -> None:
    first = linear(np.eye(2))
    data = opened(first, np.eye(2))
    with pytest.raises(ModelError, match=r"take different inputs: y: .* against x: "):
        evaluate_models([first, linear(np.eye(2), name="y")], data)
    with pytest.raises(ModelError, match="take different inputs"):
        evaluate_models([first, linear(np.ones((3, 2)))], data)
    with pytest.raises(ModelError, match="different shapes"):
        evaluate_models([first, linear(np.ones((2, 3)))], data)
    with pytest.raises(ModelError, match="no model"):
        evaluate_models([], data)


def test_labels_outside_the_classes_are_an_error() -> None:
    model = linear(np.eye(2))
    with pytest.raises(DataError, match="label 2 is outside the model's 2 classes"):
        evaluate_models([model], opened(model, np.eye(2), [0, 2]))


def test_progress_reaches_the_number_of_samples_and_results_are_plain_json() -> None:
    model = linear(np.eye(2))
    calls: list[tuple[int, int]] = []
    results = evaluate_models(
        [model, model], opened(model, np.ones((5, 2)), [0] * 5, batch_size=2), progress=lambda *at: calls.append(at)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert json.loads(json.dumps(results[1].to_dict()))["top1"] == 100.0


def test_a_second_model_is_compared_sample_by_sample() -> None:
    values = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1]]
    swapped = np.eye(4)[[1, 0, 2, 3]]  # takes class 0 for 1 and the other way round
    models = [linear(np.eye(4)), linear(swapped)]
    labels = [0, 1, 2, 3, 1, 1]  # the first model is wrong on the fifth
    first, second = evaluate_models(models, opened(models[0], values, labels, batch_size=4), names=["a", "b", "c", "d"])
    assert first.paired is None and first.classes == []
    assert second.paired is not None and (second.paired.lost, second.paired.gained) == (3, 1)
    assert second.paired.difference == pytest.approx(100 * (3 - 5) / 6) and second.paired.p == pytest.approx(0.625)
    assert [(one["name"], one["before"], one["after"]) for one in second.classes] == [
        ("a", 1, 0),
        ("b", 2, 1),
        ("c", 1, 1),
        ("d", 1, 1),
    ]
    assert second.top5_interval is not None and second.top5_interval[1] == 100
    assert json.loads(json.dumps(second.to_dict()))["paired"]["lost"] == 3
