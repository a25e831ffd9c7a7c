"""The same operator in another opset, where only its optional attributes differ."""

from __future__ import annotations

import onnx
from onnx import NodeProto, helper


def written_in(node: NodeProto, since: int, opset: int) -> NodeProto:
    """A node of one opset in another: attributes that the other lacks go where they hold their default.

    What cannot be written so stays as it is; `lint` names it.
    """
    if node.domain not in ("", "ai.onnx"):
        return node
    node.domain = ""
    if not onnx.defs.has(node.op_type, since) or not onnx.defs.has(node.op_type, opset):
        return node
    old, new = onnx.defs.get_schema(node.op_type, since), onnx.defs.get_schema(node.op_type, opset)
    kept = []
    for entry in node.attribute:
        if entry.name not in new.attributes and entry.name in old.attributes:
            default = old.attributes[entry.name].default_value
            if helper.get_attribute_value(entry) == (helper.get_attribute_value(default) if default.name else None):
                continue
        kept.append(entry)
    if len(kept) < len(node.attribute):
        copies = [onnx.AttributeProto() for _ in kept]
        for copy, entry in zip(copies, kept, strict=True):
            copy.CopyFrom(entry)
        del node.attribute[:]
        node.attribute.extend(copies)
    return node
