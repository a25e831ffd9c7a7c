"""The proof after surgery: the cut model against the original graph with zeros where the plan cuts.

The masked model is made from the graph as exported, before packed projections were taken apart and shapes rewritten, so
it checks all of that as well. Zeros go into both sides of every cut; the softmax scale stays that of the original head
size. Where the residual stream is cut, its normalisations are told to average over the channels that stay, which makes
the comparison exact there too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import NodeProto, helper

from onnxsnp.errors import ModelError, VerificationError
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.ir import Graph, Namer, SharedSession, attribute
from onnxsnp.graph.normalize import as_graph
from onnxsnp.graph.precision import BRAIN, element_types, is_float, widen
from onnxsnp.model import load
from onnxsnp.runtime import Session, first_line, open_session, run_session
from onnxsnp.surgery.rewrite import Cut, mask_array, mask_weights, spread
from onnxsnp.surgery.unpack import put_back

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis
    from onnxsnp.surgery.apply import Applied


@dataclass(frozen=True)
class Verification:
    """Outcome of the proof.

    Attributes:
        passed: every check held.
        masked_equality: largest difference between cut and masked model, relative to the largest output.
        normalised_equality: the same between the original file and its normalised form.
        checks: what was done, in words.
    """

    passed: bool
    masked_equality: float
    normalised_equality: float
    checks: tuple[str, ...]


def tolerance(weights: Mapping[str, np.ndarray]) -> float:
    """Largest relative difference that round-off explains, for the coarsest type among the weights.

    What is stored in bfloat16 is computed in single precision here (`onnxsnp.graph.precision`).
    """
    types = [array.dtype for array in weights.values() if is_float(array.dtype) and array.size > 16]
    sizes = [4 if dtype == BRAIN else dtype.itemsize for dtype in types]
    return {8: 1e-9, 4: 1e-4, 2: 3e-2}.get(min(sizes, default=4), 1e-4)


def masked(
    base: Graph, graph: Graph, dependencies: Dependencies, cuts: Sequence[Cut], updates: Mapping[str, np.ndarray]
) -> Graph:
    """The original graph with zeros in place of everything that is cut.

    Args:
        base: the graph as exported (see `Normalized.base`).
        graph: the analysed graph the cuts refer to.
        updates: refitted weights of `graph` in their original shapes.
    """
    result = base.copy()
    for name, array in mask_weights(graph, dependencies, cuts, updates).items():
        put_back(result.weights, graph, name, array)
    _average_over_kept(result, dependencies, cuts)
    return result


def _average_over_kept(graph: Graph, dependencies: Dependencies, cuts: Sequence[Cut]) -> None:
    """Rewrite, in place, the normalisations that run over a cut axis so that they see only the kept channels."""
    cuts = spread(dependencies, cuts)
    kept: dict[str, np.ndarray] = {}
    for role in dependencies.facts.statistics:
        atoms = dependencies.atoms(*role.axis)
        mine = [cut for cut in cuts if cut.atom in atoms and not set(cut.head_atoms) - set(atoms)]
        if mine:
            ones = np.ones(dependencies.facts.size(role.axis), bool)
            kept[role.node] = mask_array(ones, [atoms], dependencies.size, mine)
    namer = Namer(graph.names())
    types = element_types(graph.skeleton()) if kept else {}
    rebuilt: list[NodeProto] = []
    for node in graph.nodes:
        stays = kept.get(node.name)
        if stays is None:
            rebuilt.append(node)
            continue
        dtype = types.get(node.input[0]) or _float_type(graph)
        dtype = np.dtype(np.float32) if dtype == BRAIN else dtype
        mask = namer("onnxsnp.mask")
        graph.weights[mask] = stays.astype(dtype)
        factor = namer("onnxsnp.factor")
        graph.weights[factor] = np.asarray(stays.size / stays.sum(), dtype)
        make = _mean_over_kept if node.op_type == "ReduceMean" else _norm_over_kept
        rebuilt.extend(make(graph, node, mask, factor, namer))
    graph.nodes = rebuilt


def _float_type(graph: Graph) -> np.dtype:
    return next(array.dtype for array in graph.weights.values() if is_float(array.dtype) and array.size > 16)


def _mean_over_kept(graph: Graph, node: NodeProto, mask: str, factor: str, namer: Namer) -> list[NodeProto]:
    seen, mean = namer(f"{node.name}.masked"), namer(f"{node.name}.mean")
    clone = NodeProto()
    clone.CopyFrom(node)
    clone.input[0], clone.output[0] = seen, mean
    return [
        helper.make_node("Mul", [node.input[0], mask], [seen], name=seen),
        clone,
        helper.make_node("Mul", [mean, factor], [node.output[0]], name=namer(f"{node.name}.scaled")),
    ]


def _norm_over_kept(graph: Graph, node: NodeProto, mask: str, factor: str, namer: Namer) -> list[NodeProto]:
    """LayerNormalization or RMSNormalization spelled out, over the kept channels of the last axis."""
    nodes: list[NodeProto] = []

    def add(op: str, *inputs: str, **attributes: Any) -> str:
        name = namer(f"{node.name}.{op}")
        nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def mean(tensor: str) -> str:
        if graph.opset >= 18:
            axes = namer(f"{node.name}.axes")
            graph.weights[axes] = np.asarray([-1], np.int64)
            return add("Mul", add("ReduceMean", tensor, axes), factor)
        return add("Mul", add("ReduceMean", tensor, axes=[-1]), factor)

    epsilon = namer(f"{node.name}.epsilon")
    graph.weights[epsilon] = np.asarray(attribute(node, "epsilon", 1e-5), graph.weights[mask].dtype)
    centred = add("Mul", node.input[0], mask)
    if node.op_type == "LayerNormalization":
        centred = add("Mul", add("Sub", node.input[0], mean(centred)), mask)
    spread = add("Sqrt", add("Add", mean(add("Mul", centred, centred)), epsilon))
    scaled = add("Mul", add("Div", centred, spread), node.input[1])
    if len(node.input) > 2 and node.input[2]:
        scaled = add("Add", scaled, node.input[2])
    nodes[-1].output[0] = node.output[0]
    return nodes


def prove(
    analysis: Analysis,
    applied: Applied,
    feeds: Sequence[Mapping[str, np.ndarray]],
    threads: int | None = None,
    provider: str = "cpu",
) -> Verification:
    """Check a cut graph: it is valid, the normalised form equals the original, and it equals the masked original.

    References run exactly as written; original and cut model as users run them, with onnxruntime's optimisations.

    Args:
        feeds: model inputs to compare outputs on.

    Raises:
        VerificationError: it is not, or a difference that round-off does not explain.
        ModelError: the model was not valid before it was cut either.
    """
    if not applied.cuts:
        return Verification(True, 0.0, 0.0, ("nothing was cut; the model is the original",))
    limit = tolerance(analysis.graph.weights)
    base = analysis.normalized.base
    checks = _checked(base, applied.graph)
    gap = _gap(partial(analysis.original.opened, threads, provider), _as_written(base, threads), feeds)
    if gap > limit:
        raise VerificationError(
            f"the normalised model differs from the original by {gap:.1e} of the output",
            hint="please report this model; nothing was written",
        )
    expected = masked(base, analysis.graph, analysis.dependencies, applied.cuts, applied.updates)
    error = _gap(_as_written(expected, threads), partial(applied.graph.opened, threads, provider), feeds)
    if error > limit:
        raise VerificationError(
            f"the cut model differs from the masked original by {error:.1e} of the output",
            hint="please report this model; nothing was written",
        )
    batches = ", ".join(str(len(next(iter(feed.values())))) for feed in feeds)
    checks += ["normalised model equals the original", "cut model equals the masked original", f"batch {batches}"]
    return Verification(True, error, gap, tuple(checks))


def _checked(base: Graph, cut: Graph) -> list[str]:
    """The checks that a cut graph passed; if it does not, the fault may be the model's own."""
    try:
        return check_graph(cut, base)
    except VerificationError as error:
        try:
            check_graph(base, base)
        except VerificationError as before:
            said = before.message.replace("the cut model", "the model")
            raise ModelError(said, hint="its declarations contradict what it computes; export it again") from error
        raise


def check_graph(graph: Graph, original: Graph | None = None) -> list[str]:
    """The ONNX checker and strict shape inference.

    Args:
        original: what was cut. Exporters write bfloat16 where an opset does not have it yet (Conv before 22); a model
            that came like that is checked in single precision.

    Raises:
        VerificationError: the model is not valid.
    """
    proto = graph.skeleton()
    fault = _fault(proto)
    if fault is not None and graph.brain and original is not None and _fault(original.skeleton()) is not None:
        widen(proto)
        fault = _fault(proto)
    if fault is not None:
        raise VerificationError(
            f"the cut model is not valid ONNX: {first_line(fault)}",
            hint="please report this; nothing was written",
        ) from fault
    return ["checker", "strict shape inference"]


def _fault(proto: onnx.ModelProto) -> Exception | None:
    """What is wrong with a model."""
    try:
        onnx.checker.check_model(proto, full_check=False)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
        return error
    return None


def check_file(
    expected: Sequence[Sequence[np.ndarray]], feeds: Sequence[Mapping[str, np.ndarray]], limit: float, path: Path
) -> None:
    """Open the written file as a user would, run it, and compare.

    Args:
        expected: outputs of the proved graph on `feeds`.
        limit: largest relative difference.

    Raises:
        VerificationError: it does not open or run, or gives something else.
    """
    try:
        session = _as_users(path)
        gap = largest_gap([(want, run_session(session, feed)) for want, feed in zip(expected, feeds, strict=True)])
    except ModelError as error:
        raise VerificationError(f"the written model does not run: {error.message}") from error
    if gap > limit:
        raise VerificationError(f"the written model differs by {gap:.1e} from the one that was proved")


def _as_users(path: Path) -> Session:
    """A written file in onnxruntime; one that holds bfloat16, which CPU kernels do not take, in single precision."""
    graph = as_graph(load(path))
    return graph.session() if graph.brain else open_session(path, prepack=False)


def difference(
    left: Graph, right: Graph, feeds: Sequence[Mapping[str, np.ndarray]], threads: int | None = None
) -> float:
    """Largest difference of two graphs' outputs, relative to the largest entry of the first one's.

    The first runs exactly as written; the second as users will run it, with onnxruntime's optimisations.

    Raises:
        VerificationError: they do not run, or differ in the shape of an output.
    """
    return _gap(_as_written(left, threads), partial(right.session, threads=threads), feeds)


def _as_written(graph: Graph, threads: int | None) -> Callable[[], SharedSession]:
    return partial(graph.session, threads=threads, optimize=False)


def _gap(
    left: Callable[[], SharedSession], right: Callable[[], SharedSession], feeds: Sequence[Mapping[str, np.ndarray]]
) -> float:
    try:
        a, b = left(), right()
        runs = [(a.run(None, feed), b.run(None, feed)) for feed in feeds]
    except ModelError as error:
        raise VerificationError(f"the cut model does not run: {error.message}") from error
    except Exception as error:  # onnxruntime has no exception type of its own for a failed run
        raise VerificationError(f"the cut model does not run: {first_line(error)}") from error
    return largest_gap(runs)


def largest_gap(runs: Sequence[tuple[Sequence[np.ndarray], Sequence[np.ndarray]]]) -> float:
    """Largest difference between outputs, relative to the largest entry of the first one's; inf if not finite.

    Raises:
        VerificationError: they differ in the shape of an output.
    """
    worst = 0.0
    for first, second in runs:
        for want, got in zip(first, second, strict=True):
            if want.shape != got.shape:
                raise VerificationError(f"an output has shape {got.shape} instead of {want.shape}")
            if want.dtype.kind == "f" and want.size:
                gap = np.abs(want.astype(np.float64) - got.astype(np.float64)).max()
                # np.maximum, since max() drops nan
                worst = float(np.maximum(worst, gap / max(float(np.abs(want).max()), 1e-12)))
            elif want.size and not np.array_equal(want, got):
                worst = max(worst, float(np.mean(want != got)))
    return worst if np.isfinite(worst) else float("inf")
