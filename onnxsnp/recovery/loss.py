"""How far a model is from the original, as nodes of its own graph, together with the gradients that start there.

A hidden state counts with its mean squared error relative to the original's variance, the logits with the
Kullback-Leibler divergence of what they say (arXiv 1503.02531, at temperature 1), any other output like a hidden state.
The original's tensors are inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxsnp.graph.ir import Graph, Namer
from onnxsnp.recovery.gradients.static import Static
from onnxsnp.recovery.gradients.tape import Tape


@dataclass(frozen=True)
class Term:
    """One tensor that is to be like the original's.

    Attributes:
        tensor: its name in the model that is trained.
        kind: `squares` (mean squared error over `spread`) or `logits` ([samples, classes], KL divergence).
        spread: variance of the original's tensor.
        weight: of this term in the sum.
    """

    tensor: str
    kind: str
    spread: float = 1.0
    weight: float = 1.0


@dataclass
class Loss:
    """A graph with its loss.

    Attributes:
        graph: the model, and the nodes of the loss.
        feeds: for each term's tensor, the input that takes the original's.
        wanted: for each term's tensor, the name of the gradient of the loss by it (`backward_graph`).
        terms: for each term's tensor, the name of its value [1], unweighted.
        total: name of the weighted sum [1].
    """

    graph: Graph
    feeds: dict[str, str]
    wanted: dict[str, str]
    terms: dict[str, str]
    total: str


def add_loss(static: Static, terms: Sequence[Term]) -> Loss:
    """The model with the loss as nodes (`static` is not changed).

    Raises:
        ValueError: there is no term.
    """
    if not terms:
        raise ValueError("a loss needs a term")
    graph = static.graph.copy()
    tape = Tape(graph, static.shapes, set())
    tape.prefix = "loss."
    namer = Namer(graph.names())
    loss = Loss(graph, {}, {}, {}, "")
    shell = onnx.ModelProto()
    shell.CopyFrom(graph.shell)
    for term in terms:
        feed = namer(f"original {term.tensor}")
        shape = static.shapes[term.tensor]
        shell.graph.input.append(helper.make_tensor_value_info(feed, TensorProto.FLOAT, shape))
        write = _divergence if term.kind == "logits" else _squares
        loss.terms[term.tensor], loss.wanted[term.tensor] = write(term, feed, shape, tape)
        loss.feeds[term.tensor] = feed
    weighted = [tape.scaled(loss.terms[term.tensor], term.weight) for term in terms]
    loss.total = tape.add("Sum", *weighted)
    graph.shell = shell
    graph.nodes += tape.nodes
    graph.weights.update(tape.weights)
    return loss


def _squares(term: Term, feed: str, shape: tuple[int, ...], t: Tape) -> tuple[str, str]:
    """‖x − t‖² / (n · spread), and its gradient."""
    scale = 1 / (prod(shape) * term.spread)
    difference = t.add("Sub", term.tensor, feed)
    value = t.scaled(t.reshape(t.add("ReduceSumSquare", difference, keepdims=1), [1]), scale)
    return value, t.scaled(difference, 2 * scale * term.weight)


def _divergence(term: Term, feed: str, shape: tuple[int, ...], t: Tape) -> tuple[str, str]:
    """Σ p (log p − log q) / samples, and its gradient (q − p) / samples."""
    samples = prod(shape[:-1])
    axis = len(shape) - 1
    target, mine = t.add("Softmax", feed, axis=axis), t.add("Softmax", term.tensor, axis=axis)
    surprise = t.add("Sub", t.add("LogSoftmax", feed, axis=axis), t.add("LogSoftmax", term.tensor, axis=axis))
    total = t.sum(t.add("Mul", target, surprise), list(range(len(shape))))
    value = t.scaled(t.reshape(total, [1]), 1 / samples)
    return value, t.scaled(t.add("Sub", mine, target), term.weight / samples)


def spreads(tensors: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The variance of each of some tensors of the original, over all its entries."""
    return {name: max(float(np.var(array, dtype=np.float64)), 1e-12) for name, array in tensors.items()}
