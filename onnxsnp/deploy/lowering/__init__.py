"""One function per operator that an importer does not take as it is; `RULES` is the list."""

from __future__ import annotations

from onnxsnp.deploy.lowering import activations, attention, einsum, images, logic, norms, quantised, reductions, shapes
from onnxsnp.deploy.lowering.site import Rule

RULES: dict[str, Rule] = {
    **activations.RULES,
    **attention.RULES,
    **einsum.RULES,
    **images.RULES,
    **logic.RULES,
    **norms.RULES,
    **quantised.RULES,
    **reductions.RULES,
    **shapes.RULES,
}
