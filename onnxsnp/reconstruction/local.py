"""Fit a feed-forward branch of the cut network to what the original computes there, given the original's stream.

The problem is local: in goes the residual stream of the original before the branch (mapped, where its width is cut),
out comes what the original's branch adds to it. Earlier cuts play no part, so that one fit does not chase the errors of
others; that is left to the sequential refit of the branch's last projection (see `sequential`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from onnxsnp.graph.feedforward import FeedForward
from onnxsnp.graph.ir import Graph
from onnxsnp.graph.linear import Linear
from onnxsnp.graph.segments import Segment, between, segment_graph
from onnxsnp.parallel import Crew
from onnxsnp.reconstruction.two_layers import Activation, TwoLayers, fit_two_layers

TOKENS = 16384  # that a branch is fitted on at most

Tokens = tuple[np.ndarray, np.ndarray]  # inputs and targets of a branch


class LocalFit:
    """Takes tokens of one feed-forward branch, and fits its layers.

    Args:
        narrow: the cut network.
        crew: who runs its parts.
    """

    def __init__(self, network: FeedForward, narrow: Graph, crew: Crew) -> None:
        self._network, self._narrow, self._crew = network, narrow, crew
        # on whole samples: what lies in front of the projections may name axes or sizes, or mix tokens
        self._read = self._runner([network.branch.other], network.inputs)

    def tokens(self, before: np.ndarray, added: np.ndarray, rows: slice) -> Tokens:
        """Some tokens of a batch: what the branch reads there, and what it should add.

        Args:
            before: the stream in front of the branch, whole samples, with the channels of the cut network.
            added: what the branch should add to it.
            rows: which of the tokens to take.
        """
        inputs, targets = (
            np.ascontiguousarray(array.reshape(-1, array.shape[-1])[rows]) for array in (self._read([before]), added)
        )
        return inputs, targets

    def fit(self, tokens: Sequence[Tokens]) -> dict[str, np.ndarray]:
        """New weights and biases of the cut network by name; none if that did not lower the error."""
        network, weights = self._network, self._narrow.weights
        last, bias = network.branch.linear, _bias(weights, network.branch.linear)
        # part of the second layer, so that the error is that of the stream
        scale = weights[network.branch.scale].reshape(-1) if network.branch.scale else np.ones(1, np.float32)
        start = TwoLayers(
            tuple((_matrix(weights, one), _bias(weights, one)) for one in network.first),
            _matrix(weights, last).astype(np.float32) * scale,
            None if bias is None else bias.astype(np.float32) * scale,
        )
        between_layers = self._runner(list(network.before), last.data)

        def activation(before: Sequence[np.ndarray]) -> np.ndarray:
            return between_layers(before).reshape(before[0].shape)  # constants may bring leading axes

        inputs, target = (np.concatenate(arrays) for arrays in zip(*tokens, strict=True))
        found, errors = fit_two_layers(start, inputs, target, activation)
        if len(errors) == 1:
            return {}
        new: dict[str, np.ndarray] = {}
        for linear, (weight, bias) in [
            *zip(network.first, found.first, strict=True),
            (last, (found.second / scale, None if found.bias is None else found.bias / scale)),
        ]:
            new[linear.weight] = np.moveaxis(weight, 0, linear.inner).astype(weights[linear.weight].dtype)
            if linear.bias is not None and bias is not None:
                held = weights[linear.bias]
                new[linear.bias] = bias.reshape(held.shape).astype(held.dtype)
        return new

    def _runner(self, given: list[str], wanted: str) -> Activation:
        """A part of the cut network as a function."""
        part = between(self._narrow, given, wanted)
        if part is None or not part.nodes:
            return lambda arrays: arrays[0]
        kind = self._narrow.weights[self._network.branch.linear.weight].dtype
        graph = segment_graph(
            self._narrow, Segment(part.nodes, part.inputs, (wanted,)), [wanted], dict.fromkeys(given, kind)
        )
        session = graph.session(**{**self._crew.opened, "threads": 1})  # called from as many threads as there are cores

        def run(arrays: Any) -> np.ndarray:
            feeds = {name: np.asarray(array, kind) for name, array in zip(given, arrays, strict=True)}
            return session.run([wanted], {name: feeds[name] for name in graph.inputs})[0].astype(np.float32, copy=False)

        return run


def _matrix(weights: dict[str, np.ndarray], linear: Linear) -> np.ndarray:
    return np.moveaxis(weights[linear.weight], linear.inner, 0)


def _bias(weights: dict[str, np.ndarray], linear: Linear) -> np.ndarray | None:
    return None if linear.bias is None else weights[linear.bias].reshape(-1)
