"""The breakdown by operator: planted events, MACs against a count by hand, and sums that leave nothing over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import graphs
import onnx
import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.errors import ModelError
from onnxsnp.evaluation.profile import OpTime, Profile, profile_models, summarise_events
from onnxsnp.evaluation.unbought import BETWEEN, unbought


def run(start: float, took: float) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": start, "dur": took}


def node(start: float, took: float, op: str, inputs: list[list[int]], output: list[int], *sizes: int) -> dict[str, Any]:
    """An event; the sizes are bytes of activations read and written."""
    shapes = {"input_type_shape": [{"float": one} for one in inputs], "output_type_shape": [{"float": output}]}
    args = {"op_name": op, **shapes, "activation_size": str(sizes[0]), "output_size": str(sizes[1])}
    return {"cat": "Node", "name": f"{op}_kernel_time", "ts": start, "dur": took, "args": args}


def test_events_become_medians_by_kind_without_warm_up_and_disturbances() -> None:
    events = []
    for number, (matmul, softmax) in enumerate([(9000, 9000), (100, 40), (300, 50), (200, 8000), (200, 60)]):
        start = 100_000.0 * number
        events += [
            node(start + 1, matmul, "MatMul", [[1, 4, 8]], [1, 4, 16], 128, 256),
            node(start + 20_000, 50, "MatMul", [[2, 4, 8], [2, 8, 4]], [2, 4, 4], 512, 128),
            node(start + 30_000, softmax, "Softmax", [[2, 4, 4]], [2, 4, 4], 128, 128),
            run(start, matmul + softmax + 150),
        ]
        events[-1]["dur"] = 60_000
    found = summarise_events(events, "m", warmup=1)
    ops = {op.op: op for op in found.ops}
    assert ops["MatMul with weights"].ms == 0.2 and ops["Softmax"].ms == pytest.approx(0.055)
    assert ops["MatMul with weights"].macs == 4 * 8 * 16 and ops["MatMul of activations"].macs == 2 * 4 * 8 * 4
    assert ops["Softmax"].bytes == 256 and ops["Softmax"].macs == 0 and not ops["Softmax"].product
    assert all(op.calls == 1 for op in found.ops)
    assert found.ms == pytest.approx(sum(op.ms for op in found.ops) + found.outside)
    with pytest.raises(ModelError, match="no run"):
        summarise_events(events, "m", warmup=5)


def test_a_real_profile_counts_the_macs_that_the_graph_has(tmp_path: Path) -> None:
    model = graphs.transformer(blocks=2, heads=2, qk=8, v=8, width=16, ffn=32, tokens=5)
    path = tmp_path / "m.onnx"
    onnx.save(model, str(path))
    feed = graphs.inputs_for(model, 3, 0)
    first, second = profile_models([path, path], [feed, feed], runs=3, warmup=1, threads=1)
    assert first.macs == second.macs == pytest.approx(3 * analyse_model(model).cost.total("macs"))
    assert first.ms > 0 and {"MatMul with weights", "Softmax"} <= {op.op for op in first.ops}
    assert json.loads(json.dumps(first.to_dict()))["model"] == str(path)
    assert not list(tmp_path.glob("*.json"))


def made(products: float, softmax: float, norm: float, macs: float, data: float, outside: float = 0.0) -> Profile:
    ops = [
        OpTime("MatMul with weights", True, 4, products, macs, 100),
        OpTime("Softmax", False, 1, softmax, 0, data),
        OpTime("LayerNormalization", False, 1, norm, 0, 100),
    ]
    return Profile("m", products + softmax + norm + outside, ops, outside)


def test_time_beyond_proportion_is_split_with_nothing_left_over() -> None:
    before = made(8.0, 1.0, 1.0, 1e9, 100)
    after = made(5.0, 0.5, 1.0, 4e8, 50, 0.5)
    found = unbought(before, after)
    assert found is not None and found.macs == pytest.approx(0.4) and found.time == pytest.approx(0.7)
    assert found.excess_ms == pytest.approx(7.0 - 4.0)
    assert sum(part.excess_ms for part in found.parts) == pytest.approx(found.excess_ms)
    parts = {part.op: part for part in found.parts}
    assert all(part.uncut_ms + part.slower_ms == pytest.approx(part.excess_ms) for part in found.parts)
    assert (parts["MatMul with weights"].uncut_ms, parts["MatMul with weights"].slower_ms) == pytest.approx((0, 1.8))
    assert (parts["Softmax"].uncut_ms, parts["Softmax"].slower_ms) == pytest.approx((0.1, 0))
    assert (parts["LayerNormalization"].uncut_ms, parts["LayerNormalization"].work) == pytest.approx((0.6, 1.0))
    assert parts[BETWEEN].excess_ms == pytest.approx(0.5)
    assert found.rates == pytest.approx((125.0, 80.0))
    assert found.words == (
        "MACs -60.0%, time -30.0%: in proportion it would be 4.00 ms, it is 7.00. "
        "The 3.00 ms that the cut did not buy: 1.80 ms products doing fewer MACs per second (125.0 → 80.0 G in all); "
        "0.70 ms operators without MACs (20% of the time before, 21% now), whose data shrank less than the MACs "
        "(LayerNormalization 0.60, Softmax 0.10); 0.50 ms what runs between operators"
    )


def test_operators_that_only_one_model_has_are_said_to_be_that() -> None:
    before, after = made(8.0, 1.0, 1.0, 1e9, 100), made(4.0, 0.5, 0.5, 5e8, 50)
    after.ops.append(OpTime("Transpose", False, 3, 2.0, 0, 10))
    after.ms += 2.0
    found = unbought(before, after)
    assert found is not None
    assert "2.00 ms operators that one of the two models does not have (Transpose 2.00)" in found.words


def test_a_cut_that_bought_all_has_nothing_to_explain_and_no_macs_no_answer() -> None:
    found = unbought(made(8, 1, 1, 1e9, 100), made(3, 0.5, 0.5, 5e8, 50))
    assert found is not None and found.words.endswith("the time fell at least as far as the MACs")
    assert unbought(Profile("m", 1.0), made(3, 1, 1, 1e9, 100)) is None
