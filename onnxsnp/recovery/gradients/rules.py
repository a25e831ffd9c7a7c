"""What each operator does to gradients: `{op_type: rule}`, one small function per operator.

A rule gets a forward node, the gradients of its outputs (empty where there is none) and the `Tape`; it gives the tape
the gradient of each input that is wanted. Tensors of the forward graph can be read. A variant it does not know is a
`NoRuleError` that says what the variant has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnx import NodeProto

from onnxsnp.recovery.gradients import elementwise, layout, norms, products, spatial
from onnxsnp.recovery.gradients.tape import Tape

Rule = Callable[[NodeProto, Sequence[str], Tape], None]

RULES: dict[str, Rule] = {
    **elementwise.RULES,
    **layout.RULES,
    **norms.RULES,
    **products.RULES,
    **spatial.RULES,
}

# Results that do not move with small changes of the inputs: integers, truth values, shapes, steps.
WITHOUT_GRADIENT = {
    "And",
    "ArgMax",
    "ArgMin",
    "BitShift",
    "Ceil",
    "Constant",
    "ConstantOfShape",
    "Equal",
    "EyeLike",
    "Floor",
    "Greater",
    "GreaterOrEqual",
    "IsInf",
    "IsNaN",
    "Less",
    "LessOrEqual",
    "NonZero",
    "Not",
    "OneHot",
    "Or",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Range",
    "Round",
    "Shape",
    "Sign",
    "Size",
    "Xor",
}
