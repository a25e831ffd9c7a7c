"""Whether TensorRT has a kernel for a whole attention, site by site, and how to keep it.

What its documentation asks for (TensorRT, "Fused Attention" and "Multi-Head Attention Fusion"): a GPU of compute
capability 7.5 or later, half precision, one head size for query, key and value, from 16 to 256 and a multiple of 8,
and a scale that is applied to query or key, not to their product. Whether a kernel is used then is TensorRT's choice:
it also weighs speed, and says so in its log only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import lcm, prod
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxsnp.deploy.lowering.products import scaled_product
from onnxsnp.deploy.targets import Target
from onnxsnp.graph.attention import TRANSPARENT, Site
from onnxsnp.graph.axes import Axis
from onnxsnp.graph.groups import Group
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.planning.ties import Tie
from onnxsnp.surgery.rewrite import spread

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis

LEAST, MOST, STEP = 16, 256, 8  # of a head size


@dataclass(frozen=True)
class SiteFusion:
    """What becomes of one attention on a target.

    Attributes:
        site: its name, as `onnxsnp inspect` shows it.
        qk_size, v_size: head sizes.
        kept: whether it meets all that the target asks for.
        why: what it does not meet; empty where it is kept.
        rule: the rule that says so, in a word; sites with one differ in numbers only.
    """

    site: str
    qk_size: int
    v_size: int
    kept: bool
    why: str = ""
    rule: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dict(vars(self))


def fused_attention(analysis: Analysis, target: Target, precision: str, plan: Plan | None = None) -> list[SiteFusion]:
    """Every attention of a model on a target, in the order of the graph.

    Args:
        precision: "fp32" or "fp16".
        plan: what is cut; the model as it is, if None.
    """
    cuts = [] if plan is None else spread(analysis.dependencies, as_cuts(plan, analysis.groups))
    return _sites(analysis, target, precision, {cut.atom: cut.keep.shape[1] for cut in cuts})


def ties(analysis: Analysis, target: Target, precision: str, multiple: int) -> list[Tie]:
    """Query-key and value sizes that have to be one for a fused attention to stay one.

    Only of attentions that meet all that the target asks for before anything is cut; for others there is nothing to
    lose. Head sizes are those that fuse, and multiples of `multiple`.
    """
    found: dict[str, Tie] = {}
    for index, site in enumerate(_sites(analysis, target, precision, {})):
        pair = [analysis.structure.group(kind, index) for kind in ("qk", "v")]
        groups = [group for group in pair if group is not None and group.prunable]
        if site.kept and len(groups) == 2 and groups[0].sites == groups[1].sites:
            found[groups[0].id] = _tie(groups, site.qk_size, lcm(multiple, STEP))
    return list(found.values())


def _tie(groups: Sequence[Group], size: int, step: int) -> Tie:
    """Rows in terms of the groups' indices, which stand for several neurons each where positions turn pairs."""
    step = lcm(step, *(group.together for group in groups))
    sizes = [*range(-(-LEAST // step) * step, size, step), size]
    return Tie(tuple(groups), np.asarray([[one // group.together for group in groups] for one in sizes], np.int64))


def _sites(analysis: Analysis, target: Target, precision: str, sizes: Mapping[int, int]) -> list[SiteFusion]:
    found = []
    for site in analysis.structure.sites:
        qk, v = (_size(analysis, axis, sizes) for axis in (site.query, site.value))
        checks = {
            "hardware": _by_hardware(target),
            "precision": "" if precision == "fp16" else f"attention is fused in fp16 only, not in {precision}",
            "one size": "" if qk == v else f"query and key have head size {qk}, values {v}; it has to be one",
            "size": _by_size(qk),
            "scale": _by_scale(analysis, site),
        }
        rule = next((name for name, why in checks.items() if why), "")
        found.append(SiteFusion(site.name, qk, v, not rule, checks.get(rule, ""), rule))
    return found


def _size(analysis: Analysis, axis: Axis, sizes: Mapping[int, int]) -> int:
    deps = analysis.dependencies
    return prod(sizes.get(atom, deps.size(atom)) for atom in deps.atoms(*axis))


def _by_hardware(target: Target) -> str:
    if target.fuses_attention:
        return ""
    has = ".".join(map(str, target.compute_capability or ()))
    return f"the GPU of {target.name} has compute capability {has}, and 7.5 is needed"


def _by_size(size: int) -> str:
    if not LEAST <= size <= MOST:
        return f"head size {size} is not between {LEAST} and {MOST}"
    return f"head size {size} is no multiple of {STEP}" if size % STEP else ""


def _by_scale(analysis: Analysis, site: Site) -> str:
    """Whether something between the product and the softmax scales the scores, unless right behind the product.

    There the lowering moves the scale to an operand of the product.
    """
    graph = analysis.graph
    readers, producers = graph.readers(), graph.producers()
    scalars = {name for name, array in graph.weights.items() if array.size == 1}
    waiting = [name for node in graph.nodes if node.name == site.score != site.mix for name in node.output]
    while waiting:
        name = waiting.pop()
        for node, _slot in readers.get(name, []):
            moved = len(readers[name]) == 1 and scaled_product(graph, node, producers) is not None
            if node.op_type in ("Mul", "Div") and scalars.intersection(node.input) and not moved:
                return "scores are scaled behind other operators; query or key has to be scaled before their product"
            if node.op_type in TRANSPARENT:
                waiting.extend(node.output)
    return ""
