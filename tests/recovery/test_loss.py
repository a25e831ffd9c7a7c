"""The loss and its gradients in one graph: checked against numpy, and against what a step of Adam does to it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from graphs import transformer

from onnxsnp.model import load
from onnxsnp.recovery.gradients.backward import backward_graph
from onnxsnp.recovery.gradients.static import static_graph
from onnxsnp.recovery.loss import Term, add_loss, spreads
from onnxsnp.recovery.optimise import Adam


def test_a_step_of_adam_on_the_gradients_lowers_the_loss():
    static = static_graph(load(transformer()), _sizes(transformer(), 3))
    output = static.graph.outputs[0]
    loss = add_loss(static, [Term(output, "logits")])
    built = backward_graph(loss.graph, static.shapes, loss.wanted, static.parameters)
    parameters = {name: np.array(built.graph.weights[name]) for name in built.gradients}
    built.graph.weights.update(parameters)
    asked = [loss.total, *built.gradients.values()]
    session = built.graph.session(asked, feed=list(parameters), threads=1)
    rng = np.random.default_rng(0)
    image = static.graph.inputs[0]
    feeds = {image: rng.standard_normal(static.shapes[image], np.float32)}
    feeds[loss.feeds[output]] = 3 * rng.standard_normal(static.shapes[output], np.float32)
    adam, losses = Adam(parameters), []
    for _ in range(8):
        total, *found = session.run(asked, feeds)
        losses.append(float(total[0]))
        adam.step(dict(zip(built.gradients, found, strict=True)), 1e-3)
    assert not built.missing
    assert all(after < before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("kind", ["logits", "squares"])
def test_the_loss_is_what_its_definition_says(kind):
    static = static_graph(load(transformer()), _sizes(transformer(), 3))
    output = static.graph.outputs[0]
    rng = np.random.default_rng(1)
    image = rng.standard_normal(static.shapes[static.graph.inputs[0]], np.float32)
    target = rng.standard_normal(static.shapes[output], np.float32)
    spread = spreads({output: target})[output]
    loss = add_loss(static, [Term(output, kind, spread, weight=2.0)])
    asked = [output, loss.total, loss.terms[output], loss.wanted[output]]
    feeds = {static.graph.inputs[0]: image, loss.feeds[output]: target}
    mine, total, term, gradient = loss.graph.session(asked, threads=1).run(asked, feeds)
    expected, slope = (_divergence if kind == "logits" else _squares)(mine.astype(float), target.astype(float))
    assert term == pytest.approx(expected, rel=1e-5)
    assert total == pytest.approx(2 * expected, rel=1e-5)
    np.testing.assert_allclose(gradient, 2 * slope, rtol=1e-4, atol=1e-6)


def _sizes(proto, batch):
    value = proto.graph.input[0]
    return {value.name: (batch, *[dim.dim_value for dim in value.type.tensor_type.shape.dim][1:])}


def _divergence(mine, target):
    q, p = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (mine, target))
    return (p * np.log(p / q)).sum() / len(mine), (q - p) / len(mine)


def _squares(mine, target):
    return np.mean((mine - target) ** 2) / np.var(target), 2 * (mine - target) / mine.size / np.var(target)
