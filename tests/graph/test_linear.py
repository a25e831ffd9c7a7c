"""Projections, their biases, and their neurons as rows."""

from __future__ import annotations

from dataclasses import replace

import graphs
import numpy as np

from onnxsnp.analysis import analyse_model
from onnxsnp.graph.linear import neuron_matrix


def test_every_projection_is_found_with_its_axes_input_and_bias() -> None:
    analysis = analyse_model(graphs.mlp(4, 6, 3))
    first, second = analysis.linears["fc0.w"], analysis.linears["fc1.w"]
    assert (first.node, first.op, first.data, first.inner, first.outer, first.bias) == (
        "fc0/MatMul",
        "MatMul",
        "x",
        0,
        1,
        "fc0.b",
    )
    assert (second.inner, second.outer, second.bias) == (0, 1, "fc1.b") and second.data != "x"
    assert len(analysis.linears) == 2


def test_a_projection_without_bias_has_none() -> None:
    linears = analyse_model(graphs.mlp(4, 6, 3, bias=False)).linears
    assert [linear.bias for linear in linears.values()] == [None, None]


def test_gemm_and_convolution_have_their_own_bias() -> None:
    net = graphs.Net()
    h = net.op("Relu", net.op("Gemm", net.input("x", ["N", 6]), net.weight("w", 4, 6), net.weight("b", 4), transB=1))
    net.output(net.op("Gemm", h, net.weight("w2", 4, 3)), ["N", 3])
    linears = analyse_model(net.proto()).linears
    assert (linears["w"].inner, linears["w"].outer, linears["w"].bias) == (1, 0, "b")
    assert linears["w2"].bias is None
    linears = analyse_model(graphs.depthwise()).linears
    assert linears["expand.w"].bias == "expand.b" and "depth.w" not in linears


def test_an_addition_is_a_bias_only_where_it_is_all_that_reads_the_product() -> None:
    net = graphs.Net()
    product = net.op("MatMul", net.input("x", ["N", 4]), net.weight("w", 4, 3))
    net.output(net.op("Add", product, net.weight("b", 3)), ["N", 3])
    net.output(net.op("Relu", product), ["N", 3], name="z")
    assert analyse_model(net.proto()).linears["w"].bias is None
    net = graphs.Net()
    product = net.op("MatMul", net.input("x", ["N", 5, 4]), net.weight("w", 4, 3))
    net.output(net.op("Add", product, net.weight("position", 5, 3)), ["N", 5, 3])
    assert analyse_model(net.proto()).linears["w"].bias is None


def test_a_neuron_matrix_has_one_row_per_neuron_heads_outermost() -> None:
    model = graphs.transformer(blocks=1)
    analysis = analyse_model(model)
    weights = graphs.initializers(model)
    query = neuron_matrix(analysis.graph, analysis.dependencies, analysis.groups["qk.0"], "/blocks.0/attn/q.w")
    np.testing.assert_array_equal(query, weights["/blocks.0/attn/q.w"].T)
    value = neuron_matrix(analysis.graph, analysis.dependencies, analysis.groups["v.0"], "/blocks.0/attn/proj.w")
    np.testing.assert_array_equal(value, weights["/blocks.0/attn/proj.w"])
    head = neuron_matrix(analysis.graph, analysis.dependencies, analysis.groups["head.0"], "/blocks.0/attn/v.w")
    want = weights["/blocks.0/attn/v.w"].reshape(12, 3, 6).transpose(1, 0, 2)
    assert head.shape == (3, 72) and sorted(head[1]) == sorted(want[1].reshape(-1))
    assert query.dtype == np.float64


def test_neurons_that_are_minor_to_nothing_come_out_by_head() -> None:
    """Heads that vary fastest in the weight's axis still come first in the rows."""
    net = graphs.Net()
    x = net.input("x", ["N", 5, 4])
    h = net.op("Transpose", net.reshape(net.linear(x, "v", 4, 6), 0, 5, 2, 3), perm=[0, 3, 1, 2])  # d·H + h
    net.output(
        net.op("ReduceSum", net.op("MatMul", net.op("Relu", h), net.weight("o", 3, 2, 5)), [1], keepdims=0), ["N", 5, 5]
    )
    model = net.proto()
    analysis = analyse_model(model)
    (group,) = [group for group in analysis.structure.groups if group.size == 2]
    (head,) = set(analysis.dependencies.atoms("v.w", 1)) - {group.atom}
    group = replace(group, head_atoms=(head,), heads=3)
    rows = neuron_matrix(analysis.graph, analysis.dependencies, group, "v.w")
    columns = graphs.initializers(model)["v.w"].reshape(4, 2, 3)
    for head in range(3):
        for index in range(2):
            np.testing.assert_array_equal(rows[2 * head + index], columns[:, index, head])
