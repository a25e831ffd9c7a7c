"""ONNX's own Attention spelled out: heads apart, scaled query, scores, masks, softmax, mix, heads joined."""

from __future__ import annotations

import numpy as np

from onnxsnp.deploy.lowering.site import Rule, Site

_LOWEST = float(np.finfo(np.float32).min)


def _attention(s: Site) -> str | None:
    """Softmax(q kᵀ · scale + bias) v; the scale is on the query, where TensorRT's fused attention wants it.

    Stays where the padding is told by lengths, or the scores themselves are an output.
    """
    if s.takes("Attention") or s.given(6) or s.output(3):
        return None
    query, key, value = (_heads(s, slot) for slot in range(3))
    for slot, past in ((1, 4), (2, 5)):
        if s.given(past):
            joined = s.add("Concat", s.node.input[past], (key, value)[slot - 1], axis=2, into=s.output(slot))
            key, value = (joined, value) if slot == 1 else (key, joined)
        elif s.output(slot):
            s.add("Identity", (key, value)[slot - 1], into=s.output(slot))
    heads, shared = _head_count(s, 0), _head_count(s, 1)
    if heads != shared:  # each head of keys serves several of queries
        order = s.integers(np.repeat(np.arange(shared), heads // shared).tolist())
        key, value = s.add("Gather", key, order, axis=1), s.add("Gather", value, order, axis=1)
    scale = s.attr("scale") or _head_size(s, 0) ** -0.5
    scores = s.add("MatMul", s.add("Mul", query, s.number(scale)), s.add("Transpose", key, perm=[0, 1, 3, 2]))
    cap = s.attr("softcap", 0.0)
    if cap:
        scores = s.add("Mul", s.add("Tanh", s.add("Div", scores, s.number(cap))), s.number(cap))
    bias, seen = _bias(s)
    if bias:
        scores = s.add("Add", scores, bias)
    mixed = s.add("MatMul", s.add("Softmax", scores, axis=-1), value)
    if seen:
        mixed = s.add("Mul", mixed, seen)
    if s.rank() == 4:
        s.alias = mixed
    else:
        s.reshape(s.add("Transpose", mixed, perm=[0, 2, 1, 3]), s.shapes[s.output_name], into=s.output_name)
    return "the importer has no Attention"


def _head_count(s: Site, slot: int) -> int:
    if s.rank(slot) == 4:
        return s.shape(slot)[1]
    return int(s.attr("kv_num_heads" if slot else "q_num_heads"))


def _head_size(s: Site, slot: int) -> int:
    return s.shape(slot)[3] if s.rank(slot) == 4 else s.shape(slot)[2] // _head_count(s, slot)


def _heads(s: Site, slot: int) -> str:
    """An input as [B, H, tokens, d]; from [B, tokens, H·d] where it is flat."""
    name = str(s.node.input[slot])
    if s.rank(slot) == 4:
        return name
    batch, tokens, _ = s.shape(slot)
    apart = s.reshape(name, [batch, tokens, _head_count(s, slot), _head_size(s, slot)])
    return s.add("Transpose", apart, perm=[0, 2, 1, 3])


def _bias(s: Site) -> tuple[str, str]:
    """What is added to the scores, and a factor that is 0 for queries which see no key (their result is zero).

    Numbers instead of infinities, which fp16 and some kernels turn into NaN. Empty where nothing is hidden.
    """
    fixed, mask = _allowed(s), s.value(3)
    if s.given(3) and mask is None:
        return _computed_bias(s, fixed)
    total = np.zeros((1, 1), np.float32) if fixed is None else np.where(fixed, 0.0, -np.inf).astype(np.float32)
    if mask is not None:
        width = _tokens(s, 1) - mask.shape[-1]
        edges = [(0, 0)] * (mask.ndim - 1) + [(0, width)]
        if mask.dtype == np.bool_:
            mask = np.where(mask, 0.0, -np.inf)
        total = total + np.pad(mask, edges, constant_values=-np.inf)
    if not total.any():
        return "", ""
    hidden = np.isneginf(total.max(-1, keepdims=True))
    seen = s.constant((~hidden).astype(np.float32)) if hidden.any() else ""
    return s.constant(np.maximum(total, _LOWEST).astype(np.float32)), seen


def _computed_bias(s: Site, fixed: np.ndarray | None) -> tuple[str, str]:
    """The same of a mask that depends on the model's inputs."""
    mask = str(s.node.input[3])
    width = _tokens(s, 1) - s.shape(3)[-1]
    if s.dtype(3) == np.bool_:
        if width:  # as numbers: importers pad no BOOL
            pads = s.integers([0] * (2 * s.rank(3) - 1) + [width])
            mask = s.cast(s.add("Pad", s.cast(mask, np.float32), pads), np.bool_)
        if fixed is not None:
            mask = s.add("And", mask, s.constant(fixed))
        bias = s.add("Where", mask, s.number(0.0), s.number(_LOWEST))
        return bias, s.reduce(
            "ReduceMax", s.cast(mask, np.float32), [-1 % max(s.rank(3), 2 if fixed is not None else 1)]
        )
    if width:
        pads = s.integers([0] * (2 * s.rank(3) - 1) + [width])
        mask = s.add("Pad", mask, pads, s.number(-np.inf))
    if fixed is not None:
        mask = s.add("Add", mask, s.constant(np.where(fixed, 0.0, -np.inf).astype(np.float32)))
    last = max(s.rank(3), 2 if fixed is not None else 1) - 1
    seen = s.add("GreaterOrEqual", s.reduce("ReduceMax", mask, [last]), s.number(_LOWEST))
    return s.add("Max", mask, s.number(_LOWEST)), s.cast(seen, np.float32)


def _tokens(s: Site, slot: int) -> int:
    """Queries (0) or keys (1), those of the cache included."""
    past = s.shape(4)[2] if slot and s.given(4) else 0
    return past + s.shape(slot)[-2]


def _allowed(s: Site) -> np.ndarray | None:
    """Which key each query may see by its position alone; None for all."""
    left, right = s.attr("left_window_size", -1), s.attr("right_window_size", -1)
    ahead = 0 if s.attr("is_causal", 0) else None
    if ahead is None and left < 0 and right < 0:
        return None
    past = s.shape(4)[2] if s.given(4) else 0
    behind = past + np.arange(_tokens(s, 0))[:, None] - np.arange(_tokens(s, 1))
    allowed = np.ones(behind.shape, bool)
    if ahead is not None:
        allowed &= behind >= 0
    if left >= 0:
        allowed &= behind <= left
    if right >= 0:
        allowed &= -behind <= right
    return allowed


RULES: dict[str, Rule] = {"Attention": _attention}
