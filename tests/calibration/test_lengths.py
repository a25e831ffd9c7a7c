"""Open sizes of generated inputs: they go together, and the model runs with them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxsnp.calibration.lengths import LENGTHS, settled, sized, with_bounds
from onnxsnp.errors import ModelError
from onnxsnp.runtime import InputSpec

IDS = np.dtype(np.int64)
SPECS = [
    InputSpec("ids", ("N", "seq"), IDS),
    InputSpec("mask", ("N", "past + seq"), IDS),
    InputSpec("image", ("N", 3, "H", "W"), np.dtype(np.float32)),
    InputSpec("fixed", (4, 5), IDS),
]


def taking(most: int, fed: list[dict[str, np.ndarray]]):
    def run(feed: dict[str, np.ndarray]) -> None:
        fed.append(feed)
        if feed["ids"].shape[1] > most:
            raise ModelError(f"no row {most}")

    return run


def test_the_longest_length_that_runs_is_taken() -> None:
    fed: list[dict[str, np.ndarray]] = []
    found = settled(SPECS, taking(50, fed))
    assert [spec.shape for spec in found] == [("N", 32), ("N", 64), ("N", 3, "H", "W"), (4, 5)]
    assert [len(feed["ids"][0]) for feed in fed] == [128, 64, 32]
    assert {name: array.shape for name, array in fed[-1].items()} == {
        "ids": (1, 32),
        "mask": (1, 64),
        "image": (1, 3, 224, 224),
        "fixed": (4, 5),
    }


def test_a_model_that_takes_no_length_is_one_error_with_its_own_reason() -> None:
    with pytest.raises(ModelError, match=r"128, 64, 32, 16, 8: no row 3"):
        settled(SPECS, taking(3, []))


def test_nothing_is_run_where_nothing_is_open() -> None:
    fed: list[dict[str, np.ndarray]] = []
    assert settled(SPECS[2:], taking(1, fed)) == SPECS[2:] and not fed


def test_every_length_is_tried_with_equal_symbols() -> None:
    for length in LENGTHS:
        ids, mask, *_ = sized(SPECS, length)
        assert ids.shape[1] == length and mask.shape[1] == 2 * length


def test_bounds_of_ids_are_read_from_the_model() -> None:
    table = numpy_helper.from_array(np.ones((9, 2), np.float32), "table")
    node = helper.make_node("Gather", ["table", "ids"], ["y"])
    value = [helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["N", "seq"])]
    result = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", "seq", 2])]
    graph = helper.make_graph([node], "g", value, result, [table])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (found,) = with_bounds(SPECS[:1], model.SerializeToString())
    assert found.below == 9 and found.shape == SPECS[0].shape
    assert with_bounds(SPECS[2:3], b"not read") == SPECS[2:3]
