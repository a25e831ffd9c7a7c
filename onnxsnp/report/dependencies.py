"""The dependency graph as a page: search a tensor, see what its axes are tied to, and which operators tied them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsnp._version import __version__
from onnxsnp.analysis import Analysis
from onnxsnp.report.charts import KINDS
from onnxsnp.report.html import template
from onnxsnp.writing import write_record

_MODEL = "a model in memory"


class _Index:
    """Texts by number, since the same names occur thousands of times."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        if text not in self._known:
            self._known[text] = len(self.texts)
            self.texts.append(text)
        return self._known[text]


def page(analysis: Analysis) -> str:
    """The page as text.

    Raises:
        ReportError: jinja2 is not installed.
    """
    data = graph_data(analysis)
    kinds = [kind for kind in KINDS if any(group.kind == kind for group in analysis.structure.groups)]
    return template("dependencies.html.j2").render(
        model=str(analysis.model.path or _MODEL),
        data=data,
        kinds=[(kind, KINDS[kind]) for kind in kinds],
        version=__version__,
    )


def write_page(analysis: Analysis, path: str | Path) -> None:
    """Write the page, whole or not at all."""
    write_record(page(analysis), path)


def graph_data(analysis: Analysis) -> dict[str, Any]:
    """The dependency graph in as few bytes as a page of a large model needs.

    Returns:
        names: tensors; ops: operators with their type; shapes and weights (0 or 1) by tensor; components: each with id
        (of its group, or None), kind, size, heads, reasons [[text, operator or None]], places [[tensor, axis,
        position]] and ties [[place, place, operator]], by index.
    """
    dependencies = analysis.dependencies
    names, operators = _Index(), _Index()
    types = {node.name: node.op_type for node in analysis.graph.nodes}
    groups = {group.atom: group for group in analysis.structure.groups}
    components = []
    for atom, places in sorted(dependencies.places.items(), key=lambda one: (one[0] not in groups, -len(one[1]))):
        number = {place: index for index, place in enumerate(places)}
        ties = [
            [number[left], number[right], operators(_operator(node, types))]
            for left, right, node in dependencies.graph.subgraph(places).edges(data="node")
        ]
        group = groups.get(atom)
        components.append(
            {
                "id": None if group is None else group.id,
                "kind": None if group is None else group.kind,
                "size": dependencies.size(atom),
                "heads": 1 if group is None else group.heads,
                "reasons": _reasons(analysis, atom, () if group is None else group.reasons),
                "places": [[names(tensor), axis, position] for tensor, axis, position in places],
                "ties": ties,
            }
        )
    shapes = dependencies.facts.shapes
    return {
        "names": names.texts,
        "ops": operators.texts,
        "shapes": [list(shapes.get(name, ())) for name in names.texts],
        "weights": [int(name in analysis.graph.weights) for name in names.texts],
        "components": components,
    }


def _operator(node: str, types: Mapping[str, str]) -> str:
    return f"{types[node]} {node}" if node in types else node


def _reasons(analysis: Analysis, atom: int, own: Sequence[str]) -> list[list[str | None]]:
    """Why a factor must stay: what its group says, and what froze it where."""
    found: list[list[str | None]] = [[reason, None] for reason in own]
    found += [[freeze.reason, freeze.node] for freeze in analysis.dependencies.frozen.get(atom, [])]
    return list({tuple(one): one for one in found}.values())[:20]
