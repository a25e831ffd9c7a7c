"""The network block by block, with each group's width before and after, as plain data for a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxsnp.report.charts import KINDS

_ATTENTION = ("head", "qk", "v")


def network(record: Mapping[str, Any]) -> dict[str, Any]:
    """Blocks in order, and groups that lie in no block.

    Returns:
        blocks: number, attention (cells), ffn (cells); others: cells. A cell has id, kind, label, before, after, text,
        share (width left), scale (width before as a share of the widest of its kind), lines (what hovering says).
    """
    groups = record["groups"]
    widest: dict[str, int] = {}
    for group in groups:
        widest[group["kind"]] = max(widest.get(group["kind"], 1), group["before"])
    left = {_number(group): group["after"] for group in groups if group["kind"] == "head"}
    blocks: dict[int, dict[str, Any]] = {}
    others = []
    for group in groups:
        cell = _cell(record, group, widest[group["kind"]], left.get(_number(group)))
        number = _number(group)
        if number is None or group["kind"] not in (*_ATTENTION, "ffn"):
            others.append({**cell, "label": cell["id"]})
            continue
        block = blocks.setdefault(number, {"number": number, "attention": [], "ffn": []})
        block["ffn" if group["kind"] == "ffn" else "attention"].append(cell)
    for block in blocks.values():
        block["attention"].sort(key=lambda cell: _ATTENTION.index(cell["kind"]))
    return {"blocks": [blocks[number] for number in sorted(blocks)], "others": others}


def _number(group: Mapping[str, Any]) -> int | None:
    last = str(group["id"]).rpartition(".")[2]
    return int(last) if last.isdecimal() else None


def _cell(record: Mapping[str, Any], group: Mapping[str, Any], widest: int, heads_left: int | None) -> dict[str, Any]:
    together = group.get("together", 1)
    before, after = group["before"] * together, group["after"] * together
    inside = group["kind"] in ("qk", "v") and group["heads"] > 1
    old = f"{group['heads']}×{before}" if inside else str(before)
    new = f"{heads_left or group['heads']}×{after}" if inside else str(after)
    details = record.get("details", {}).get(group["id"], {})
    return {
        "id": group["id"],
        "kind": group["kind"] if group["kind"] in KINDS else "other",
        "label": KINDS.get(group["kind"], group["kind"]),
        "text": old if old == new else f"{old} → {new}",
        "share": after / before if before else 1.0,
        "scale": group["before"] / widest,
        "lines": _lines(group, details, after / before if before else 1.0),
        "reasons": details.get("reasons", []),
    }


def _lines(group: Mapping[str, Any], details: Mapping[str, Any], share: float) -> list[str]:
    """What is known about a group, in words."""
    found = [f"{group['before']} → {group['after']} per head" if group["heads"] > 1 else ""]
    found.append("kept whole" if share == 1 else f"{1 - share:.0%} cut")
    if "sensitivity" in details:
        found.append(f"loss of the model when it is cut alone: {details['sensitivity']:.3g}")
    curve = details.get("curve")
    if curve and group["after"] in curve["width"]:
        error, top = curve["error"][curve["width"].index(group["after"])], max(curve["error"])
        found.append(f"error at its own output: {error / top:.2%} of the largest" if top > 0 else "")
    scores = details.get("scores")
    if scores:
        ends = [f"{10 ** scores[end] if scores['log'] else scores[end]:.3g}" for end in ("low", "high")]
        found.append(f"scores from {ends[0]} to {ends[1]}, {sum(scores['cut'])} neurons cut")
    return [line for line in [*found, *(f"left alone: {reason}" for reason in details.get("reasons", []))] if line]


def skipped(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Reasons and the nodes they hold for, most frequent first."""
    by_reason: dict[str, list[str]] = {}
    for item in record.get("left_alone", []):
        by_reason.setdefault(str(item["reason"]), []).append(str(item["node"]))
    return [
        {"reason": reason, "nodes": nodes} for reason, nodes in sorted(by_reason.items(), key=lambda one: -len(one[1]))
    ]
