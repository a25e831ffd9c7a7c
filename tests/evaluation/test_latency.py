"""Paired timing: order, arithmetic and inputs. No test depends on how fast this machine is."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.errors import ModelError
from onnxsnp.evaluation import latency as module
from onnxsnp.evaluation.latency import (
    bench_inputs,
    bench_models,
    compare_latency,
    machine,
    measure_rounds,
    round_order,
    rounds_for,
    summarise,
)
from onnxsnp.runtime import InputSpec


def linear(size: int, batch: int | str = "N") -> bytes:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, size])],
        [numpy_helper.from_array(np.ones((size, size), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


class FakeClock:
    """Time that passes only when a runner says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def runner(self, name: str, seconds: list[float]):
        left = iter(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += next(left)

        return run


def test_rounds_are_interleaved_timed_in_ms_and_without_the_warmup() -> None:
    clock = FakeClock()
    runners = [clock.runner("a", [9.0, 0.002, 0.004, 0.006]), clock.runner("b", [9.0, 0.001, 0.001, 0.003])]
    calls: list[tuple[int, int]] = []
    times = measure_rounds(runners, 3, 1, lambda *at: calls.append(at), clock=lambda: clock.now)
    assert np.allclose(times, [[2, 1], [4, 1], [6, 3]])
    assert [Counter(clock.log[i : i + 2]) for i in range(0, 8, 2)] == [Counter("ab")] * 4
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_everyone_takes_every_place_equally_often_and_follows_different_ones() -> None:
    orders = [round_order(number, 3) for number in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    for place in range(3):
        assert Counter(order[place] for order in orders) == {0: 2, 1: 2, 2: 2}
    followed = {(a, b) for order in orders for a, b in pairwise(order)}
    assert len(followed) == 6
    assert round_order(5, 1) == [0]


def test_the_speedup_is_the_median_of_the_ratios_within_rounds() -> None:
    times = np.array([[10.0, 5.0], [100.0, 50.0], [10.0, 10.0], [30.0, 10.0], [8.0, 4.0]])  # ratios 2, 2, 1, 3, 2
    result = summarise(times, 1)
    assert (result.speedup, result.speedup_interval) == (2.0, (2.0, 2.0))
    assert (result.median, result.min, result.mean, result.runs) == (10.0, 4.0, 15.8, 5)
    assert result.p90 == pytest.approx(34.0)  # between 10 and 50 at rank 3.6
    # the ratio of the medians, 10 / 10, would have missed it
    assert np.median(times[:, 0]) / np.median(times[:, 1]) == 1.0


def test_models_in_files_and_in_memory_are_timed_and_sized(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    path.write_bytes(linear(64))
    small = linear(8)
    first, second = bench_models([path, small], runs=3, warmup=1, batch=2, threads=1)
    assert first.model == str(path) and second.model == "the model in memory"
    assert (first.bytes, second.bytes) == (path.stat().st_size, len(small))
    assert first.speedup == 1.0 and first.batch == 2 and first.runs == 3 and first.threads == 1
    assert 0 < first.min <= first.median <= first.p90
    assert json.loads(json.dumps(second.to_dict()))["speedup"] == second.speedup


def test_a_fixed_batch_stays_and_different_ones_are_refused() -> None:
    assert bench_models([linear(4, batch=3)], runs=1, warmup=0, threads=1)[0].batch == 3
    with pytest.raises(ModelError, match=r"different batches: .* 3, .* 1"):
        bench_models([linear(4, batch=3), linear(4)], runs=1, warmup=0, threads=1)


def test_input_shapes_set_dynamic_sizes_and_must_fit() -> None:
    specs = [InputSpec("x", ("N", 3, "H", "W"), np.dtype(np.float32))]
    assert bench_inputs(specs, 2, None, 0)["x"].shape == (2, 3, 224, 224)
    assert bench_inputs(specs, 2, {"x": (5, 3, 16, 24)}, 0)["x"].shape == (5, 3, 16, 24)
    with pytest.raises(ModelError, match=r"shape \[5, 4, 16, 24\] does not fit input x"):
        bench_inputs(specs, 2, {"x": (5, 4, 16, 24)}, 0)
    with pytest.raises(ModelError, match="no input named 'y'"):
        bench_inputs(specs, 2, {"y": (1,)}, 0)


@pytest.mark.parametrize("bad", [{"runs": 0}, {"warmup": -1}, {"batch": 0}, {"threads": 0}])
def test_impossible_numbers_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ModelError, match=r"must be \d or more"):
        bench_models([linear(4)], **bad)


@pytest.mark.parametrize(
    ("one", "rounds", "took"),
    [(0.001, 100, 0.102), (0.1, 20, 2.2), (0.5, 5, 3.5), (1.0, 5, 7.0), (1.9, 3, 9.5), (3.0, 2, 9.0), (30.0, 1, 60.0)],
)
def test_a_short_measurement_has_rounds_for_a_few_seconds(one: float, rounds: int, took: float) -> None:
    clock = FakeClock()
    times = rounds_for([clock.runner("a", [one] * 200)], 2.0, 5, 100, clock=lambda: clock.now)
    assert len(times) == rounds and clock.now == pytest.approx(took)


def test_before_and_after_are_plain_data_with_the_ratio_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = np.array([[10.0, 5.0], [100.0, 50.0], [12.0, 3.0]])
    monkeypatch.setattr(module, "rounds_for", lambda *args: times)
    found = compare_latency([None, None], {"x": np.zeros((2, 3))})  # type: ignore[list-item]
    assert found["before_ms"] == 12.0 and found["after_ms"] == 5.0 and found["speedup"] == 2.0
    assert (found["rounds"], found["batch"]) == (3, 2) and json.loads(json.dumps(found)) == found


def test_a_machine_is_described_with_what_decides_its_speed() -> None:
    assert "3 threads, cpu, onnxruntime" in machine(3, "cpu") and "all threads" in machine(None, "cpu")
