"""Fused attention operators spelled out: projection, heads, scores, scale, masks, softmax, mix, heads joined.

Masks and their defaults are those of onnxruntime's operator documentation (docs/ContribOperators.md).
"""

from __future__ import annotations

from onnx import TensorProto

from onnxsnp.graph.ir import attribute
from onnxsnp.graph.writer import LeftAloneError, Writer

_CACHE = "it keeps a key/value cache, which the model's callers see"
_FILTER = -10000.0  # what onnxruntime adds to masked scores unless told otherwise


def packed(w: Writer) -> None:
    """com.microsoft Attention: one weight [D, q + k + v] for query, key and value of one input [B, S, D]."""
    _refuse(w, caches=(4, 6), outputs=1)
    if attribute(w.node, "do_rotary", 0):
        raise LeftAloneError("it rotates query and key inside")
    data, weight = w.node.input[0], w.node.input[1]
    sizes = [int(size) for size in attribute(w.node, "qkv_hidden_sizes") or [w.shapes[weight][1] // 3] * 3]
    product = w.add("MatMul", data, weight)
    if w.given(2):
        product = w.add("Add", product, w.node.input[2])
    query, key, value = (_apart(w, part) for part in w.split(product, sizes, 2))
    mask = w.node.input[3] if w.given(3) else ""
    extra = w.node.input[5] if w.given(5) else ""
    _attend(w, query, key, value, sizes[0], mask, extra, (data, 1), (data, 1))


def separate(w: Writer) -> None:
    """com.microsoft MultiHeadAttention: query, key and value [B, S, D], their biases in one vector."""
    _refuse(w, caches=(6, 7, 8, 9), outputs=1)
    names = [w.node.input[slot] if w.given(slot) else "" for slot in range(3)]
    query, key, value = names
    if not all(names) or any(len(w.shapes[name]) == 5 for name in names):
        raise LeftAloneError("query, key and value are packed in one tensor")
    keys = (key, 2 if len(w.shapes[key]) == 4 else 1)
    width = w.shapes[query][2]
    if w.given(3):
        names = [w.add("Add", name, bias) for name, bias in zip(names, _biases(w, width), strict=True)]
    apart = [
        name if len(w.shapes[source]) == 4 else _apart(w, name)
        for name, source in zip(names, (query, key, value), strict=True)
    ]
    mask = w.node.input[4] if w.given(4) else ""
    extra = w.node.input[5] if w.given(5) else ""
    _attend(w, apart[0], apart[1], apart[2], width, mask, extra, (query, 1), keys)


def grouped(w: Writer) -> None:
    """com.microsoft GroupQueryAttention of a whole sequence: several heads of queries to each head of keys."""
    _refuse(w, caches=(3, 4), outputs=1)
    for slot, what in _UNUSUAL.items():
        if w.given(slot):
            raise LeftAloneError(what)
    if attribute(w.node, "smooth_softmax", 0) == 1:
        raise LeftAloneError(_UNUSUAL[11])
    heads, shared = attribute(w.node, "num_heads"), attribute(w.node, "kv_num_heads")
    query, key, value = _unpacked(w, heads, shared)
    size = w.shapes[w.node.input[0]][2] // (heads if w.given(1) else heads + 2 * shared)
    if attribute(w.node, "do_rotary", 0):
        places = w.unsqueeze(_places(w, (w.node.input[0], 1)), [0])
        tables = [w.add("Gather", w.node.input[slot], places, axis=0) for slot in (7, 8)]
        turned, pairs = 2 * w.shapes[w.node.input[7]][1], attribute(w.node, "rotary_interleaved", 0)
        query = _rotate(w, query, (tables[0], tables[1]), turned, size, pairs)
        key = _rotate(w, key, (tables[0], tables[1]), turned, size, pairs)
    # [B, shared, heads / shared, S, d] times [B, shared, 1, d, T]
    query = w.add("Transpose", w.add("Reshape", query, w.integers([0, 0, shared, -1, size])), perm=[0, 2, 3, 1, 4])
    key, value = (w.add("Reshape", part, w.integers([0, 0, shared, 1, -1])) for part in (key, value))
    scores = w.add("MatMul", query, w.add("Transpose", key, perm=[0, 2, 3, 4, 1]))
    scores = w.add("Mul", scores, w.number(attribute(w.node, "scale", 0.0) or size**-0.5))
    cap = attribute(w.node, "softcap", 0.0)
    if cap:
        scores = w.add("Mul", w.add("Tanh", w.add("Div", scores, w.number(cap))), w.number(cap))
    scores = w.add("Add", scores, w.add("Where", _out_of_sight(w), w.lowest(), w.number(0.0)))
    mixed = w.add("MatMul", w.add("Softmax", scores, axis=4), w.add("Transpose", value, perm=[0, 2, 3, 1, 4]))
    w.add("Reshape", w.add("Transpose", mixed, perm=[0, 3, 1, 2, 4]), w.integers([0, 0, -1]), into=w.node.output[0])


_UNUSUAL = {
    9: "its positions are given",
    10: "a table is added to its scores",
    11: "its softmax leaves a share to no token at all",
    12: "it quantises keys and values",
    13: "it quantises keys and values",
    14: "it normalises queries and keys inside",
    15: "it normalises queries and keys inside",
}


def _unpacked(w: Writer, heads: int, shared: int) -> list[str]:
    """Query, key and value of GroupQueryAttention, which may come in one tensor."""
    if w.given(1) and w.given(2):
        return list(w.node.input[:3])
    size = w.shapes[w.node.input[0]][2] // (heads + 2 * shared)
    return w.split(w.node.input[0], [heads * size, shared * size, shared * size], 2)


def _out_of_sight(w: Writer) -> str:
    """Which keys [B, 1, 1, S, T] a query does not see: behind its sequence's end, ahead of it, or out of its window."""
    keys = _places(w, (w.node.input[0], 1))
    end = w.add("Reshape", w.add("Cast", w.node.input[5], to=TensorProto.INT64), w.integers([-1]))
    last = w.unsqueeze(end, [1, 2, 3, 4])
    if attribute(w.node, "causal", 1):  # a query behind the end sees what the last one does
        own = w.unsqueeze(keys, [1])
        last = w.add("Where", w.add("Less", own, last), own, last)
    hidden = w.add("Greater", keys, last)
    window = attribute(w.node, "local_window_size", -1)
    if window > 0:
        hidden = w.add("Or", hidden, w.add("Less", keys, w.add("Sub", last, w.whole(window - 1))))
    return hidden


def rotary(w: Writer) -> None:
    """com.microsoft RotaryEmbedding: inputs, positions, cosines and sines [length, size / 2]."""
    data, places, cosines, sines = w.node.input
    if attribute(w.node, "is_packed_batching", 0):
        raise LeftAloneError("its sequences are packed into one")
    if len(w.shapes[places]) == 1:  # where the first token stands
        first = w.add("Cast", places, to=TensorProto.INT64)
        tokens = w.size_of(data, 1 if len(w.shapes[data]) == 3 else 2)
        places = w.unsqueeze(w.add("Add", w.add("Range", w.whole(0), tokens, w.whole(1)), first), [0])
    tables = [w.add("Gather", table, places, axis=0) for table in (cosines, sines)]
    size = attribute(w.node, "rotary_embedding_dim", 0) or 2 * w.shapes[cosines][1]
    _rotated(w, (tables[0], tables[1]), size)


def standard_rotary(w: Writer) -> None:
    """ONNX RotaryEmbedding (opset 23): the positions are optional and come last."""
    tables = list(w.node.input[1:3])
    if w.given(3):
        tables = [w.add("Gather", table, w.node.input[3], axis=0) for table in tables]
    size = attribute(w.node, "rotary_embedding_dim", 0) or 2 * w.shapes[w.node.input[1]][-1]
    _rotated(w, (tables[0], tables[1]), size)


# --------------------------------------------------------------------------------------------------------------- parts


def _refuse(w: Writer, caches: tuple[int, ...], outputs: int) -> None:
    """Caches go in and come out with the sizes of the heads, which are then not this model's to change."""
    if any(w.given(slot) for slot in caches) or any(w.output(slot) for slot in range(outputs, len(w.node.output))):
        raise LeftAloneError(_CACHE)


def _biases(w: Writer, width: int) -> list[str]:
    """The one vector's parts for query, key and value."""
    name = w.node.input[3]
    held = w.held.get(name)
    if held is None:
        return w.split(name, [width, width, w.shapes[name][0] - 2 * width], 0)
    return [w.constant(held[:width]), w.constant(held[width : 2 * width]), w.constant(held[2 * width :])]


def _apart(w: Writer, tensor: str) -> str:
    """[B, S, H·d] as [B, H, S, d]."""
    heads = attribute(w.node, "num_heads")
    return w.add("Transpose", w.add("Reshape", tensor, w.integers([0, 0, heads, -1])), perm=[0, 2, 1, 3])


def _attend(
    w: Writer,
    query: str,
    key: str,
    value: str,
    width: int,
    mask: str,
    extra: str,
    queries: tuple[str, int],
    keys: tuple[str, int],
) -> None:
    """Softmax(q kᵀ · scale + masks) v, with the heads joined.

    Args:
        query, key, value: [B, H, tokens, d].
        width: of all heads' queries together.
        queries, keys: tensor and axis from which the numbers of tokens can be read.
    """
    scale = attribute(w.node, "scale", 0.0) or (width / attribute(w.node, "num_heads")) ** -0.5
    scores = w.add("MatMul", query, w.add("Transpose", key, perm=[0, 1, 3, 2]))
    scores = w.add("Mul", scores, w.number(scale))
    if extra:
        scores = w.add("Add", scores, extra)
    hidden = _hidden(w, mask, keys) if mask else ""
    if attribute(w.node, "unidirectional", 0):  # takes the place of a mask's number, so that they never add up to -inf
        ahead = w.add("Greater", _places(w, keys), w.unsqueeze(_places(w, queries), [1]))
        hidden = w.add("Where", ahead, w.lowest(), hidden or w.number(0.0))
    if hidden:
        scores = w.add("Add", scores, hidden)
    mixed = w.add("MatMul", w.add("Softmax", scores, axis=3), value)
    joined = w.add("Transpose", mixed, perm=[0, 2, 1, 3])
    w.add("Reshape", joined, w.integers([0, 0, -1]), into=w.node.output[0])


def _places(w: Writer, tokens: tuple[str, int]) -> str:
    return w.add("Range", w.whole(0), w.size_of(*tokens), w.whole(1))


def _hidden(w: Writer, mask: str, keys: tuple[str, int]) -> str:
    """A large negative number where a mask of one of onnxruntime's forms hides the key; empty if it hides nothing."""
    shape = w.shapes[mask]
    batch, tokens = w.shapes[keys[0]][0], w.shapes[keys[0]][keys[1]]
    if len(shape) == 1 and shape[0] == batch:  # lengths
        hidden = w.add(
            "Not", w.add("Less", _places(w, keys), w.unsqueeze(w.add("Cast", mask, to=TensorProto.INT64), [1]))
        )
        axes = [1, 2]
    elif len(shape) == 2 and shape[1] == 1 != tokens:  # a mask of this shape hides nothing
        return ""
    elif len(shape) in (2, 3) and shape[-1] == tokens:  # 1 where a key is seen, 0 where it is not
        hidden = w.add("Not", w.add("Greater", w.add("Cast", mask, to=TensorProto.INT64), w.whole(0)))
        axes = [1, 2] if len(shape) == 2 else [1]
    else:
        raise LeftAloneError(f"its mask has the form {'×'.join(map(str, shape))}")
    value = w.number(attribute(w.node, "mask_filter_value", _FILTER))
    return w.unsqueeze(w.add("Where", hidden, value, w.number(0.0)), axes)


def _rotated(w: Writer, tables: tuple[str, str], size: int) -> None:
    """A RotaryEmbedding, of heads apart or side by side."""
    data, heads = w.node.input[0], attribute(w.node, "num_heads", 0)
    flat = len(w.shapes[data]) == 3
    width = w.shapes[data][-1]
    head = (width // heads if heads else size) if flat else width
    _rotate(w, data, tables, size, head, attribute(w.node, "interleaved", 0), flat, w.node.output[0])


def _rotate(
    w: Writer,
    data: str,
    tables: tuple[str, str],
    size: int,
    head: int,
    interleaved: int,
    flat: bool = True,
    into: str = "",
) -> str:
    """x · cos + turned(x) · sin over the first `size` entries of each head (arXiv 2104.09864, eq. 34).

    Args:
        tables: cosines and sines [B or 1, tokens, size / 2].
        head: entries of each head.
        interleaved: pairs are neighbours, not half of `size` apart.
        flat: the heads of `data` are side by side [B, tokens, H·d], not apart [B, H, tokens, d].
    """
    if flat:
        data = w.add("Reshape", data, w.integers([0, 0, -1, head]))
    rest = ""
    if size < head:
        data, rest = w.split(data, [size, head - size], 3)
    apart = [w.unsqueeze(table, [2 if flat else 1]) for table in tables]
    if interleaved:
        data, axis, half = w.add("Reshape", data, w.integers([0, 0, 0, -1, 2])), 4, 1
        cosine, sine = (w.unsqueeze(table, [4]) for table in apart)
    else:
        axis, half = 3, size // 2
        cosine, sine = (w.add("Concat", table, table, axis=3) for table in apart)
    first, second = w.split(data, [half, half], axis)
    turned = w.add("Concat", w.add("Neg", second), first, axis=axis)
    result = w.add("Add", w.add("Mul", data, cosine), w.add("Mul", turned, sine))
    if interleaved:
        result = w.add("Reshape", result, w.integers([0, 0, 0, -1]))
    if rest:
        result = w.add("Concat", result, rest, axis=3)
    if flat:
        return w.add("Reshape", result, w.integers([0, 0, -1]), into=into)
    return w.add("Identity", result, into=into)
