"""Values that cannot be rotated go by optimal brain surgeon, head by head."""

from __future__ import annotations

from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.statistics import Statistics, collect
from onnxsnp.graph.linear import neuron_places
from onnxsnp.planning.selection import Selector
from onnxsnp.pruning import prune
from onnxsnp.reconstruction.full import Reconstruction
from onnxsnp.reconstruction.values import value_reader, value_removals


def bent(net: graphs.Net, value: Any) -> Any:
    return net.op("HardSigmoid", value)


def measured(analysis: Analysis, model: onnx.ModelProto) -> Statistics:
    reader = value_reader(analysis, analysis.groups["v.0"])
    assert reader is not None
    batch = Batch(graphs.inputs_for(model, 60, 1), None, 60)
    return collect(analysis.graph, analysis.dependencies, [], [], [reader.data], [batch])


def test_the_cost_of_every_step_is_that_of_the_best_refit_within_the_head() -> None:
    model = graphs.attention(joined=bent)
    analysis = analyse_model(model)
    group = analysis.groups["v.0"]
    assert "v.0" not in analysis.rotations.values
    reader, statistics = value_reader(analysis, group), measured(analysis, model)
    assert reader is not None
    removals = value_removals(analysis, group, reader, statistics)
    assert [len(head.order) for head in removals] == [graphs.SIZE - 1] * graphs.HEADS
    places = neuron_places(analysis.graph, analysis.dependencies, group, reader.weight, reader.inner)
    for head, rows in zip(removals, places, strict=True):
        covariance = statistics.moments[reader.data].covariance[np.ix_(rows, rows)]
        weight = analysis.graph.weights[reader.weight][rows].astype(np.float64)
        for step, error in enumerate(head.errors):
            left = np.setdiff1d(np.arange(graphs.SIZE), head.order[: step + 1])
            fit = np.linalg.solve(covariance[np.ix_(left, left)], covariance[left] @ weight)
            rest = weight.copy()
            rest[left] -= fit
            assert error == pytest.approx(np.trace(rest.T @ covariance @ rest), rel=0.05)


def test_as_many_values_go_from_every_head_and_the_curve_is_their_sum() -> None:
    model = graphs.attention(joined=bent)
    analysis = analyse_model(model)
    statistics = measured(analysis, model)
    selector = Selector(analysis, statistics, Reconstruction(analysis, statistics, "full"), "snp")
    group = analysis.groups["v.0"]
    removals = selector.head_removals(group)
    (entry,) = selector.entries({"v.0": 2})
    assert [set(keep) for keep in entry.keep] == [set(range(graphs.SIZE)) - set(head.order[:4]) for head in removals]
    curve = selector.curve(group)
    assert curve is not None and curve[graphs.SIZE] == 0
    assert curve[2] == pytest.approx(sum(head.errors[3] for head in removals))


def test_a_value_that_another_of_its_head_repeats_goes_without_a_trace() -> None:
    model = graphs.attention(joined=bent)
    values = {name: graphs.initializers(model)[name].copy() for name in ("v.w", "v.b")}
    for array in values.values():  # neuron 4 of the first head, and neuron 1 of the second
        array[..., 4], array[..., graphs.SIZE + 1] = array[..., 2], array[..., graphs.SIZE + 5]
    model = graphs.set_weights(model, values)
    result = prune(model, 1 / graphs.SIZE, scope="v", allocation="uniform", samples=40)
    (entry,) = result.plan.groups
    first, second = (set(range(graphs.SIZE)) - set(keep) for keep in entry.keep)
    assert first in ({2}, {4}) and second in ({1}, {5})
    assert result.model is not None
    inputs = graphs.inputs_for(model, 3, 9)
    for want, got in zip(graphs.run(model, inputs), graphs.run(result.model, inputs), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())


def test_values_that_more_than_one_projection_reads_have_no_reader() -> None:
    analysis = analyse_model(graphs.attention(end=beside))
    assert len(analysis.groups["v.0"].consumers) == 1 and value_reader(analysis, analysis.groups["v.0"]) is not None
    analysis = analyse_model(graphs.attention(joined=read_twice))
    assert len(analysis.groups["v.0"].consumers) == 2 and value_reader(analysis, analysis.groups["v.0"]) is None
    assert value_reader(analysis, analysis.groups["qk.0"]) is None


def beside(net: graphs.Net, value: Any) -> Any:
    return net.op("Relu", value)


def read_twice(net: graphs.Net, value: Any) -> Any:
    """A gate computed from the values beside them."""
    width = graphs.HEADS * graphs.SIZE
    gate = net.op("Sigmoid", net.linear(value, "gate", width, 1))
    return net.op("Mul", value, gate)


def test_automatic_allocation_measures_what_values_without_a_closed_form_lose() -> None:
    result = prune(graphs.attention(joined=read_twice), 0.4, samples=32)
    assert {"qk.0", "v.0", "ffn.0"} == result.record["allocation"]["sensitivity"].keys()
    assert result.record["after"]["macs"] <= 0.62 * result.record["before"]["macs"]
    assert result.record["verification"]["passed"]
