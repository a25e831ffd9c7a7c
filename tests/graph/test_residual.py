"""Which residual streams may have another basis: all writers and readers are found, and what forbids it is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.statistics import Moments
from onnxsnp.evaluation.verify import difference
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.residual import ResidualSite, hidden_channels
from onnxsnp.reconstruction.residual import ResidualRotation

FOLDER = Path(__file__).resolve().parent.parent / "exports"
TOKENS, WIDTH, FFN = 5, 12, 20
Hooks = dict[str, graphs.Hook]


def stream(opset: int = 17, **hooks: graphs.Hook) -> onnx.ModelProto:
    """An embedding, one FFN behind a normalisation, a last normalisation and a head; hooks change tensors on the way.

    Hooks: embedded, stream (after the FFN's addition) [N, T, width]; normed, end (behind the two normalisations);
    written [N, T, width], what the FFN adds.
    """
    net = graphs.Net(opset)

    def hooked(name: str, value: Any) -> Any:
        return hooks[name](net, value) if name in hooks else value

    h = hooked("embedded", net.linear(net.input("x", ["N", TOKENS, 7]), "embed", 7, WIDTH))
    hidden = net.linear(hooked("normed", net.norm(h, "norm1", WIDTH)), "fc1", WIDTH, FFN)
    h = hooked("stream", net.op("Add", h, hooked("written", net.linear(net.op("Relu", hidden), "fc2", FFN, WIDTH))))
    net.output(net.linear(hooked("end", net.norm(h, "norm2", WIDTH)), "head", WIDTH, 3), ["N", TOKENS, 3])
    return net.proto()


def vector(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.5, shape)


def by(value: Any, kind: str = "Mul") -> graphs.Hook:
    return lambda net, x: net.op(kind, x, net.tensor(np.asarray(value)))


def unary(kind: str, **attributes: Any) -> graphs.Hook:
    return lambda net, x: net.op(kind, x, **attributes)


def normalised(net: graphs.Net, x: Any) -> Any:
    return net.norm(x, "post", WIDTH)


def rms(net: graphs.Net, x: Any) -> Any:
    spread = net.op("Sqrt", net.op("Add", net.mean(net.op("Mul", x, x), -1), 1e-5))
    return net.op("Mul", net.op("Div", x, spread), net.weight("rms.scale", WIDTH, scale=0.2, shift=1.0))


def read_as_it_is(net: graphs.Net, x: Any) -> Any:
    return net.op("Add", x, net.linear(net.op("Relu", net.linear(x, "bare", WIDTH, 9)), "back", 9, WIDTH))


def mapped_without_activation(net: graphs.Net, x: Any) -> Any:
    """One square weight that reads the stream behind a normalisation and writes it again."""
    return net.op("Add", x, net.linear(net.norm(x, "inner", WIDTH), "square", WIDTH, WIDTH))


def norm_with(scale: np.ndarray) -> graphs.Hook:
    shift = np.full(WIDTH, 0.1)
    return lambda net, x: net.op("Add", x, net.linear(net.norm(x, "odd", WIDTH, (scale, shift)), "in", WIDTH, WIDTH))


def hiding(*channels: int) -> np.ndarray:
    gains = vector(WIDTH)
    gains[list(channels)] = 0
    return gains


LEGAL: dict[str, Hooks] = {
    "plain": {},
    "scale per channel on what is written": {"written": by(vector(WIDTH))},
    "two of them": {"written": lambda net, x: by(vector(WIDTH))(net, by(2 * vector(WIDTH))(net, x))},
    "scale per channel on the embedding": {"embedded": by(vector(1, 1, WIDTH))},
    "one number": {"written": by(0.5), "embedded": by([2.0], "Div")},
    "position table": {"embedded": by(vector(TOKENS, WIDTH), "Add")},
    "casts and identities": {name: unary("Cast", to=1) for name in ("embedded", "written", "stream", "normed", "end")},
    "mean over the tokens": {"end": lambda net, x: net.mean(x, 1)},
    "mean before the norm": {"stream": lambda net, x: net.mean(x, 1)},
    "part of the tokens": {"end": lambda net, x: net.op("Slice", x, [1], [3], [1])},
    "channels in the middle": {
        "stream": lambda net, x: transposed(net, by(vector(WIDTH, 1), "Add")(net, transposed(net, x)))
    },
    "reader that writes": {"stream": mapped_without_activation},
    "one channel hidden": {"stream": norm_with(hiding(3))},
    "several channels hidden": {"stream": norm_with(hiding(0, 4, 5, 11))},
}
BLOCKED: dict[str, tuple[Hooks, str]] = {
    "norm on the embedding": ({"embedded": normalised}, "normalises what is normalised"),
    "norm of a norm": ({"normed": normalised}, "normalises what is normalised"),
    "read as it is": ({"stream": read_as_it_is}, "bare/MatMul reads the stream without a normalisation"),
    "activation": ({"stream": unary("Relu")}, "Relu at"),
    "activation behind the norm": ({"normed": unary("Tanh")}, "Tanh at"),
    "root mean square norm": ({"stream": rms}, "Mul at"),
    "number added": ({"stream": by(0.5, "Add")}, "has no channels"),
    "stream weighed": (
        {"stream": by(vector(WIDTH)), "written": lambda net, x: net.op("Add", x, net.op("Neg", x))},
        "Neg",
    ),
    "stream weighed by channel where it is also read": ({"embedded": lambda net, x: weighed_aside(net, x)}, "weighs"),
    "norm weighed by channel": ({"end": by(vector(WIDTH))}, "weighs the channels"),
    "scale per token and channel": ({"written": by(vector(TOKENS, WIDTH))}, "weighs more than the channels"),
    "hidden channels": ({"stream": norm_with(hiding(*range(7)))}, "hides most channels"),
}


def transposed(net: graphs.Net, x: Any) -> Any:
    return net.op("Transpose", x, perm=[0, 2, 1])


def weighed_aside(net: graphs.Net, x: Any) -> Any:
    """The stream plus itself weighed by channel: no factor of its writers."""
    return net.op("Add", x, net.op("Mul", x, net.tensor(vector(WIDTH))))


def site_of(analysis: Analysis) -> ResidualSite:
    assert "residual" in analysis.rotations.residuals, analysis.rotations.blocked
    return analysis.rotations.residuals["residual"]


def turned(analysis: Analysis) -> Any:
    """The model with its stream in the basis of made-up activations."""
    site, weights = site_of(analysis), analysis.graph.weights
    rng = np.random.default_rng(2)
    moments = {}
    for linear, norm in site.readers:
        n = rng.standard_normal((200, site.group.size)) @ rng.standard_normal((site.group.size,) * 2)
        n -= n.mean(axis=1, keepdims=True)
        n /= n.std(axis=1, keepdims=True)
        data = n * weights[norm.scale].reshape(-1) + (0 if norm.shift is None else weights[norm.shift].reshape(-1))
        moments[linear.data] = Moments(data.T @ data, data.sum(axis=0), len(data))
    graph = analysis.graph.copy()
    graph.weights.update(ResidualRotation(analysis, site, moments).weights(np.arange(site.group.size), {}))
    return graph


@pytest.mark.parametrize("opset", [17, 13])
@pytest.mark.parametrize("name", LEGAL)
def test_what_is_linear_may_lie_between_writers_and_readers(name: str, opset: int) -> None:
    model = stream(opset, **LEGAL[name])
    analysis = analyse_model(model)
    graph = turned(analysis)
    for weight, _ in site_of(analysis).writers:
        assert not np.allclose(graph.weights[weight], analysis.graph.weights[weight], atol=1e-2)
    feeds = [graphs.inputs_for(model, 3)]
    assert difference(as_graph(analysis.model), graph, feeds, 1) < 1e-5


@pytest.mark.parametrize("name", BLOCKED)
def test_what_forbids_another_basis_is_named(name: str) -> None:
    hooks, reason = BLOCKED[name]
    analysis = analyse_model(stream(**hooks))
    assert analysis.groups["residual"].prunable
    assert reason in analysis.rotations.blocked["residual"] and not analysis.rotations.residuals


def test_all_that_touches_the_stream_is_a_writer_a_reader_or_a_norm() -> None:
    for path in sorted(FOLDER.glob("*.onnx")):
        analysis = analyse_model(path)
        group, site = analysis.groups["residual"], site_of(analysis)
        written = {name for name, _ in site.writers}
        norms = {name for _, norm in site.readers for name in (norm.scale, norm.shift)}
        factors = {name for names in site.factors.values() for name in names}
        read = {linear.weight for linear, _ in site.readers}
        assert {place[0] for place in group.places} == written | norms | factors | read, path.stem
        assert set(group.producers) <= set(site.writers) and {name for name, _ in group.consumers} == read
        assert len(norms) == 10 and not written & (norms | factors | read)
        assert bool(factors) == ("beit" in path.stem or "layerscale" in path.stem)


def test_a_channel_is_hidden_if_its_gain_is_lost_beside_its_shift_or_the_other_gains() -> None:
    scale = np.asarray([1.0, 0.0, 1e-7, -1e-3, 1e-3, -0.5])
    shift = np.asarray([0.0, 0.0, 0.0, 0.5, 0.01, 9.0])
    assert hidden_channels(scale, shift).tolist() == [False, True, True, True, False, False]
