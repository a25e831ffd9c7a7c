"""One pass over the calibration data with a session that computes moments itself.

The instrumented copy of the model carries extra nodes for the Gram matrices of query and key (per image and head) and
for the second moments of the inputs of projections; only these small matrices leave the session, where they are
added up.

Second moments of a wide activation take longer than the layer itself, and the tokens of an image say much the same. So
where there are far more tokens than features, some are passed over, not the same ones in every batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from onnxsnp.blas import available_cores, single_threaded
from onnxsnp.calibration.data import Batch
from onnxsnp.calibration.overlap import Overlap, per_query
from onnxsnp.errors import DataError
from onnxsnp.graph.attention import Site
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.dependency import Dependencies
from onnxsnp.graph.gains import GainSite
from onnxsnp.graph.groups import Group
from onnxsnp.graph.inputs import padding_masks
from onnxsnp.graph.ir import Graph, Namer, SharedSession
from onnxsnp.model import give_back
from onnxsnp.parallel import Crew
from onnxsnp.runtime import is_inverted
from onnxsnp.scoring.snp import qk_scores

if TYPE_CHECKING:
    from onnxsnp.calibration.changes import AttentionChange

_WAITING_BYTES = 64 << 20  # of Gram matrices that wait to be scored
_WIDE, _BANDS = 256, 4  # second moments of activations this wide are computed in so many bands
ENOUGH = 8  # tokens per feature of a wide activation: where there are twice as many, only every second is taken
_SIDE_BY_SIDE_BYTES = 64 << 20  # of moments per batch up to which batches are run side by side


@dataclass
class Moments:
    """Second moments of one activation over all tokens of all images.

    Attributes:
        second: Σ xᵀx, [width, width].
        total: Σ x, [width].
        count: number of tokens.
    """

    second: np.ndarray
    total: np.ndarray
    count: int = 0

    @property
    def mean(self) -> np.ndarray:
        """E[x], [width]."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> np.ndarray:
        """E[xᵀx] − E[x]ᵀE[x], [width, width]."""
        mean = self.mean
        return self.second / max(self.count, 1) - np.outer(mean, mean)


@dataclass
class PairMoments:
    """Second moments of the queries and keys of one attention module, per head.

    Attributes:
        query: Σ qᵀq over all tokens, [heads, size, size].
        key: Σ (k − k̄)ᵀ(k − k̄) over all tokens, with the mean k̄ over the tokens of each image, [heads, size, size].
        queries, keys: number of tokens summed over.
    """

    query: np.ndarray
    key: np.ndarray
    queries: int = 0
    keys: int = 0


@dataclass
class Statistics:
    """What a calibration pass measured.

    Attributes:
        qk: by group id, the scores of SNP eq. 4-6 summed over the images, [heads, size].
        pairs: by group id, moments of queries and keys.
        overlaps: by group id, moments of the pairs' contributions, with the heads of the group's `GainSite`.
        changes: by group id, what the attention loses without each channel.
        moments: by tensor name.
        samples: images (or sequences) seen.
    """

    qk: dict[str, np.ndarray] = field(default_factory=dict)
    pairs: dict[str, PairMoments] = field(default_factory=dict)
    overlaps: dict[str, Overlap] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    changes: dict[str, AttentionChange] = field(default_factory=dict)
    samples: int = 0


@dataclass(frozen=True)
class _Operand:
    """Names of the added outputs for one operand of a score product, the axes they are indexed by first, its size."""

    gram: str
    mean: str
    tokens: str
    others: tuple[Axis, ...]
    size: Axis


def collect(
    graph: Graph,
    dependencies: Dependencies,
    sites: Sequence[Site],
    qk_groups: Sequence[Group],
    tensors: Iterable[str],
    batches: Iterable[Batch],
    *,
    pair_groups: Sequence[Group] = (),
    gain_sites: Sequence[GainSite] = (),
    rank: int | None = None,
    samples: int | None = None,
    threads: int | None = None,
    provider: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the data through the instrumented model.

    Args:
        qk_groups: query-key groups to score (each belongs to one of `sites`).
        pair_groups: query-key groups whose moments are wanted.
        gain_sites: query-key groups the overlap of whose pairs is wanted.
        tensors: activations whose second moments are wanted; their features are the last axis, or the channels where
            a convolution reads them.
        rank: components that count in eq. 6; estimated per image and head if None.
        samples: how many there will be about; if None, no token is passed over.
        progress: called with the number of samples after each batch.

    Raises:
        DataError: an activation is not finite.
    """
    builder = _Builder(graph, dependencies)
    pairs = []
    gains = {gain.group.id: gain for gain in gain_sites}
    wanted_groups = [*qk_groups, *pair_groups, *(gain.group for gain in gain_sites)]
    for group in {group.id: group for group in wanted_groups}.values():
        for site in (sites[index] for index in group.sites):
            pairs.append((group, builder.gram(site.query, site.query_tokens), builder.gram(site.key, site.key_tokens)))
    scored, measured = ({group.id for group in wanted} for wanted in (qk_groups, pair_groups))
    wanted = {name: builder.moments(name) for name in tensors}
    result = Statistics()
    sums: dict[str, _Sums] = {}
    scorer = _Scorer(result.qk, rank, threads)
    for batch, values in _runs(builder, batches, samples, threads, provider):
        for group, query, key in pairs:
            if group.id in scored:
                scorer.add(group, dependencies, values, query, key)
        for group, query, key in pairs:
            if group.id in measured:
                _add_pairs(result.pairs, group, dependencies, values, query, key)
            if group.id in gains:
                _add_overlap(result.overlaps, gains[group.id], dependencies, values, query, key)
        for name, (bands, total, size) in wanted.items():
            _add(sums, name, [values.pop(band) for band in bands], values.pop(total), int(values[size]))
        result.samples += batch.count
        if progress is not None:
            progress(result.samples)
        values.clear()
    scorer.flush()
    for name in list(sums):
        result.moments[name] = sums.pop(name).moments()
    return result


def _runs(
    builder: _Builder, batches: Iterable[Batch], samples: int | None, threads: int | None, provider: str
) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
    """Batches, and what the session returns for each. The first one shows how many tokens there are to come."""
    apart = builder.bytes <= _SIDE_BY_SIDE_BYTES
    crew = Crew.of(threads, provider) if apart else Crew.whole(threads, provider)
    session = builder.session(crew)
    steps = dict.fromkeys(builder.widths, 1)

    def run(item: tuple[int, Batch]) -> tuple[Batch, dict[str, np.ndarray]]:
        number, batch = item
        taken = {name: np.asarray([[number % step], [step]], np.int64) for name, step in steps.items()}
        outputs = session.run(builder.outputs, {**batch.inputs, **taken})
        return batch, dict(zip(builder.outputs, outputs, strict=True))

    numbered = enumerate(batches)
    start = next(numbered, None)
    if start is None:
        return
    batch, values = run(start)
    for name, (size, width) in builder.widths.items():
        tokens = int(values[size]) // width * (samples or 0) // batch.count
        steps[name] = max(1, tokens // (ENOUGH * width))
    yield batch, values
    del batch, values
    if apart:
        yield from crew.map(run, numbered)
        return
    for item in numbered:  # a result that waits would take up room, too, and so would what the allocator keeps
        give_back()
        yield run(item)


@dataclass
class _Sums:
    """Moments while they are added up: of the second ones only bands on and right of the diagonal.

    Those of a wide activation are in single precision, like the products they are sums of: in double precision they
    would be larger than the model.

    Attributes:
        bands: [rows, width − start] each, from the top.
        total: Σ x, [width].
        entries: numbers summed over.
    """

    bands: list[np.ndarray]
    total: np.ndarray
    entries: int = 0

    def moments(self) -> Moments:
        """The finished moments; wide ones in single precision, which is what their products were computed in."""
        width = len(self.total)
        second = np.empty((width, width), np.float32 if len(self.bands) > 1 else np.float64)
        start = 0
        while self.bands:
            band = self.bands.pop(0)
            stop = start + len(band)
            second[start:stop, start:] = band
            second[stop:, start:stop] = second[start:stop, stop:].T
            block = second[start:stop, start:stop]
            block[...] = np.triu(block) + np.triu(block, 1).T
            start = stop
        return Moments(second, self.total, self.entries // width)


def _add(sums: dict[str, _Sums], name: str, bands: Sequence[np.ndarray], total: np.ndarray, entries: int) -> None:
    """Add one batch."""
    if not np.isfinite(total).all():
        raise DataError(
            f"activation '{name}' is not finite on the calibration data",
            hint="check the preprocessing, or the model in float32",
        )
    if name not in sums:
        kind = np.float32 if len(bands) > 1 else np.float64
        sums[name] = _Sums([np.zeros(band.shape, kind) for band in bands], np.zeros(total.size))
    held = sums[name]
    for mine, band in zip(held.bands, bands, strict=True):
        mine += band
    held.total += total.reshape(-1)
    held.entries += entries


class _Scorer:
    """Scores query-key pairs of many images at a time, so that inference and scoring seldom take turns."""

    def __init__(self, found: dict[str, np.ndarray], rank: int | None, threads: int | None) -> None:
        self._found, self._rank, self._threads = found, rank, threads
        self._waiting: dict[tuple[str, int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        self._shapes: dict[str, tuple[list[int], int]] = {}  # of a head's neurons, and which of these axes is cut
        self._bytes = 0

    def add(
        self,
        group: Group,
        dependencies: Dependencies,
        values: dict[str, np.ndarray],
        query: _Operand,
        key: _Operand,
    ) -> None:
        """Take one batch's Gram matrices of one group."""
        grams = [_by_head(group, dependencies, values[side.gram], side) for side in (query, key)]
        grams[1] = per_query(grams[1], grams[0])
        name = (group.id, int(values[query.tokens]), int(values[key.tokens]))
        atoms = dependencies.factors.atoms(query.size)
        self._shapes[group.id] = [-1, *map(dependencies.size, atoms)], 1 + atoms.index(group.atom)
        self._waiting.setdefault(name, []).append((grams[0], grams[1]))
        self._bytes += grams[0].nbytes + grams[1].nbytes
        if self._bytes > _WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Score what is waiting, groups side by side."""
        with single_threaded(), ThreadPoolExecutor(max_workers=self._threads or available_cores()) as pool:
            jobs = {name: pool.submit(self._score, name) for name in self._waiting}
            for (group, _, _), job in jobs.items():
                scores = job.result()
                self._found[group] = self._found[group] + scores if group in self._found else scores
        self._waiting.clear()
        self._bytes = 0

    def _score(self, name: tuple[str, int, int]) -> np.ndarray:
        queries, keys = (np.concatenate(side) for side in zip(*self._waiting[name], strict=True))
        scores = qk_scores(queries, keys, name[1], name[2], rank=self._rank, threads=1)
        shape, cut = self._shapes[name[0]]
        apart = scores.reshape(shape)  # neurons that can only go together are worth what they are worth in sum
        total: np.ndarray = apart.sum(axis=tuple(axis for axis in range(1, len(shape)) if axis != cut))
        return total


def _add_pairs(
    pairs: dict[str, PairMoments],
    group: Group,
    dependencies: Dependencies,
    values: dict[str, np.ndarray],
    query: _Operand,
    key: _Operand,
) -> None:
    """Add one batch to a group's moments of queries and keys."""
    tokens_q, tokens_k = int(values[query.tokens]), int(values[key.tokens])
    grams_q = _by_head(group, dependencies, values[query.gram], query).astype(np.float64)
    grams_k = _by_head(group, dependencies, values[key.gram], key).astype(np.float64)
    means = _by_head(group, dependencies, values[key.mean], key).astype(np.float64)
    zero = np.zeros((group.heads, group.size, group.size))
    held = pairs.setdefault(group.id, PairMoments(zero, zero))
    held.query = held.query + grams_q.sum(axis=0)
    held.key = held.key + grams_k.sum(axis=0) - tokens_k * np.einsum("ihc,ihd->hcd", means, means)
    held.queries += tokens_q * len(grams_q)
    held.keys += tokens_k * len(grams_k)


def _add_overlap(
    overlaps: dict[str, Overlap],
    site: GainSite,
    dependencies: Dependencies,
    values: dict[str, np.ndarray],
    query: _Operand,
    key: _Operand,
) -> None:
    """Add one batch to the overlap of a group's pairs."""
    group = replace(site.group, heads=site.heads, head_atoms=site.head_atoms)
    tokens = int(values[query.tokens]), int(values[key.tokens])
    grams = [_by_head(group, dependencies, values[side.gram], side) for side in (query, key)]
    means = _by_head(group, dependencies, values[key.mean], key) if site.centred else None
    held = overlaps.setdefault(site.group.id, Overlap.empty(site.heads, site.group.size))
    held.add(grams[0], grams[1], tokens, means)


def _by_head(group: Group, dependencies: Dependencies, gram: np.ndarray, operand: _Operand) -> np.ndarray:
    """Grams [.., d, d] or means [.., d] as [images, heads, ...]."""
    return by_head(group, dependencies, gram, operand.others)


def by_head(group: Group, dependencies: Dependencies, array: np.ndarray, axes: Sequence[Axis]) -> np.ndarray:
    """An array whose first axes are some of a tensor's as [images, heads, ...], whatever axes batch and heads shared.

    Args:
        axes: the tensor's axes that the first of the array are; all but the group's heads become images.
    """
    labels: list[int | None] = []
    shape: list[int] = []
    for index, axis in enumerate(axes):
        atoms = dependencies.factors.atoms(axis)
        sizes = [dependencies.size(atom) for atom in atoms]
        loose = next((at for at, atom in enumerate(atoms) if atom not in group.head_atoms), None)
        if loose is not None:  # the batch may be larger or smaller than in the analysis; the heads are not
            sizes[loose] = array.shape[index] // int(np.prod(sizes[:loose] + sizes[loose + 1 :]))
        labels.extend(atoms or (None,))
        shape.extend(sizes or [array.shape[index]])
    heads = [labels.index(atom) for atom in group.head_atoms]
    images = [index for index in range(len(labels)) if index not in heads]
    own = array.shape[len(axes) :]
    last = range(len(labels), len(labels) + len(own))
    view = array.reshape(*shape, *own).transpose(*images, *heads, *last)
    return view.reshape(-1, group.heads, *own)


class _Builder:
    """Adds moment nodes to a copy of a graph.

    Attributes:
        outputs: what a session is to return.
        widths: inputs that say which tokens of a wide activation count, [[first], [step]], and for each the output with
            the number of entries that did, and the width.
        bytes: size of all second moments.
    """

    def __init__(self, graph: Graph, dependencies: Dependencies) -> None:
        self._graph = graph.copy()
        self._deps = dependencies
        self._namer = Namer(graph.names())
        self._masks = padding_masks(graph)
        floats = [array for array in graph.weights.values() if array.dtype.kind not in "iub"]
        self._cast = any(array.dtype != np.float32 for array in floats)
        rows = {name for node in graph.nodes if node.op_type in ("MatMul", "Gemm") for name in node.input[:2]}
        self._convolved = {node.input[0] for node in graph.nodes if node.op_type == "Conv"} - rows
        self.outputs: list[str] = []
        self.widths: dict[str, tuple[str, int]] = {}
        self.bytes = 0

    def session(self, crew: Crew) -> SharedSession:
        """A session that returns `outputs`."""
        shell = onnx.ModelProto()
        shell.CopyFrom(self._graph.shell)
        for name in self.widths:
            shell.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, [2, 1]))
        del shell.graph.output[:]
        shell.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.outputs)
        return Graph(shell, self._graph.nodes, self._graph.weights).timed_session(**crew.opened, arena=False)

    def gram(self, axis: Axis, tokens: Axis) -> _Operand:
        """XᵀX over the token axis, for every index of the other axes."""
        tensor, rank, at, token_at = self._operand(axis, tokens)
        others = [index for index in range(rank) if index not in (at, token_at)]
        axes = tuple(self._named_axis(axis, tokens, index, rank) for index in others)
        rows = self._node("Transpose", [tensor], perm=[*others, token_at, at])
        columns = self._node("Transpose", [tensor], perm=[*others, at, token_at])
        gram = self._node("MatMul", [columns, rows])
        count = self._node("Gather", [self._node("Shape", [tensor]), self._constant(np.asarray(token_at))])
        mean = self._mean(rows, rank - 2)
        self.outputs.extend([gram, mean, count])
        return _Operand(gram, mean, count, axes, axis)

    def moments(self, tensor: str) -> tuple[list[str], str, str]:
        """XᵀX, Σx and the number of entries of an activation with its features last, or on axis 1 of an image.

        Tokens that are padding are left out. XᵀX is symmetric, so of a wide one only bands to the right of the diagonal
        are computed: 5/8 of it with four.
        """
        rank, rows = len(self._deps.facts.shapes[tensor]), self._full(tensor)
        axis = 1 if tensor in self._convolved else rank - 1
        width = self._deps.facts.shapes[tensor][axis]
        there = self._there(tensor) if axis == rank - 1 else None
        if axis < rank - 1:
            rows = self._node("Transpose", [rows], perm=[0, *range(2, rank), 1])
        flat = self._node("Reshape", [rows, self._constant(np.asarray([-1, width]))])
        if there is not None:
            flat = self._node("Compress", [flat, there], axis=0)
        taken = self._namer("onnxsnp.tokens")
        if width >= _WIDE:
            first, every = (self._node("Gather", [taken, self._constant(np.asarray(index))]) for index in (0, 1))
            last, rows_axis = (self._constant(np.asarray([value])) for value in (np.iinfo(np.int64).max, 0))
            flat = self._node("Slice", [flat, first, last, rows_axis, every])
        bands = []
        step = -(-width // _BANDS) if width >= _WIDE else width
        for start in range(0, width, step):
            right = self._columns(flat, start, width) if start else flat
            band = self._columns(right, 0, step) if step < width - start else right
            bands.append(self._node("Gemm", [band, right], transA=1))
        mean = self._mean(flat, 0)
        size = self._node("Size", [flat])
        count = self._node("Cast", [self._node("Div", [size, self._constant(np.asarray(width))])], to=TensorProto.FLOAT)
        total = self._node("Mul", [mean, count])
        self.outputs.extend([*bands, total, size])
        self.bytes += 4 * width * width
        if width >= _WIDE:
            self.widths[taken] = (size, width)
        return bands, total, size

    def _there(self, tensor: str) -> str | None:
        """Which tokens of an activation are no padding, bool [tokens]; None where no mask of the model says so."""
        axes = range(len(self._deps.facts.shapes[tensor]) - 1)
        tokens = tuple(atom for axis in axes for atom in self._deps.atoms(tensor, axis))
        for mask, inputs in self._masks.items():
            if tokens and any(self._deps.atoms(name) == tokens for name in inputs):
                flat = self._node("Reshape", [mask, self._constant(np.asarray([-1]))])
                marked = self._node("Cast", [flat], to=TensorProto.BOOL)
                return self._node("Not", [marked]) if is_inverted(mask) else marked
        return None

    def _columns(self, tensor: str, start: int, stop: int) -> str:
        bounds = [self._constant(np.asarray([value])) for value in (start, stop, 1)]
        return self._node("Slice", [tensor, *bounds])

    def _operand(self, axis: Axis, tokens: Axis) -> tuple[str, int, int, int]:
        """The tensor to read, its rank, and where in it the contracted and the token axis are."""
        if axis in self._deps.facts.virtual:
            name = axis[0].split("|", 1)[1]
            heads = self._deps.facts.virtual[(axis[0], 0)]
            shape = self._constant(np.asarray([0, 0, heads, -1]))
            return self._node("Reshape", [self._full(name), shape]), 4, 3, 1
        return self._full(axis[0]), len(self._deps.facts.shapes[axis[0]]), axis[1], tokens[1]

    def _named_axis(self, axis: Axis, tokens: Axis, index: int, rank: int) -> Axis:
        if axis in self._deps.facts.virtual:
            return (axis[0], 0) if index == 2 else (tokens[0], 0)
        return (axis[0], index)

    def _mean(self, tensor: str, axis: int) -> str:
        if self._graph.opset < 18:
            return self._node("ReduceMean", [tensor], axes=[axis], keepdims=0)
        return self._node("ReduceMean", [tensor, self._constant(np.asarray([axis]))], keepdims=0)

    def _full(self, tensor: str) -> str:
        return self._node("Cast", [tensor], to=TensorProto.FLOAT) if self._cast else tensor

    def _constant(self, value: np.ndarray) -> str:
        name = self._namer("onnxsnp.constant")
        self._graph.weights[name] = value.astype(np.int64)
        return name

    def _node(self, op: str, inputs: list[str], **attributes: Any) -> str:
        name = self._namer(f"onnxsnp.{op}")
        node: NodeProto = helper.make_node(op, inputs, [name], name=name, **attributes)
        self._graph.nodes.append(node)
        return name
