"""The cuts that `bench_fidelity` compares methods at: the rows of its table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onnxsnp.analysis import Analysis
from onnxsnp.errors import PlanError
from onnxsnp.graph.groups import Group
from onnxsnp.planning.allocation import from_file

RATIOS = Path(__file__).with_name("snp_ratios.json")
ATTENTION_AND_FFN = ("qk", "v", "ffn")
SHARES = (0.30, 0.41, 0.45, 0.50, 0.60)
PUBLISHED = "deit_tiny"  # entry of the ratios file


@dataclass(frozen=True)
class Row:
    """One cut.

    Exactly one of ratio, share and counts is given.

    Attributes:
        title: first column of the table.
        kinds: of the groups that are cut.
        ratio: of the neurons of every such group that go.
        share: of the model's MACs that go; how they are spread over the groups is left to the method.
        counts: kept neurons by group id.
    """

    title: str
    kinds: tuple[str, ...]
    ratio: float | None = None
    share: float | None = None
    counts: Mapping[str, int] | None = None

    def definition(self) -> dict[str, Any]:
        """All that the result depends on, as plain data for JSON."""
        return {**asdict(self), "kinds": list(self.kinds)}

    def groups(self, analysis: Analysis) -> list[Group]:
        """The groups in scope."""
        return [group for group in analysis.structure.groups if group.kind in self.kinds]


def rows_for(analysis: Analysis) -> list[Row]:
    """All rows that make sense for a model, in the table's order."""
    rows = [
        Row("query-key 50 %", ("qk",), ratio=0.5),
        Row("query-key 70 %", ("qk",), ratio=0.7),
        Row("value 50 %", ("v",), ratio=0.5),
        Row("FFN 50 %", ("ffn",), ratio=0.5),
        Row("residual 20 %", ("residual",), ratio=0.2),
    ]
    rows += [Row(f"all, {100 * share:.0f} % of MACs", ATTENTION_AND_FFN, share=share) for share in SHARES]
    if has_published_shape(analysis):
        rows += _published(analysis)
    return rows


def _published(analysis: Analysis) -> list[Row]:
    """The layer-wise ratios of SNP (arXiv 2404.11630) and their MACs, without and with the residual stream."""
    every = [group for group in analysis.structure.groups if group.kind in (*ATTENTION_AND_FFN, "residual")]
    inner = [group for group in every if group.kind != "residual"]
    whole = from_file(f"{RATIOS}:{PUBLISHED}", every)
    counts = from_file(f"{RATIOS}:{PUBLISHED}", inner, scoped=True)
    budget = _entry()["expected"]["gmacs"]
    share = 1 - budget * 1e9 / analysis.cost.total("macs")
    return [
        Row("published ratios, residual uncut", ATTENTION_AND_FFN, counts=counts),
        Row("published ratios", (*ATTENTION_AND_FFN, "residual"), counts=whole),
        Row(f"{budget:.2f} GMACs, residual uncut", ATTENTION_AND_FFN, share=share),
        Row(f"{budget:.2f} GMACs", (*ATTENTION_AND_FFN, "residual"), share=share),
    ]


def has_published_shape(analysis: Analysis) -> bool:
    """Whether all published ratios, the residual's included, fit the model and give the published MACs."""
    entry, groups = _entry(), analysis.structure.groups
    blocks = {kind: sum(group.kind == kind for group in groups) for kind in ATTENTION_AND_FFN}
    lengths = {"qk": len(entry["query_key"]), "v": len(entry["value"]), "ffn": len(entry["ffn"])}
    if blocks != lengths or "residual" not in analysis.groups:
        return False
    counts = from_file(f"{RATIOS}:{PUBLISHED}", groups)
    got = analysis.cost.total("macs", {analysis.groups[name].atom: kept for name, kept in counts.items()})
    return abs(got / 1e9 / entry["expected"]["gmacs"] - 1) < 0.01


def _entry() -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(RATIOS.read_text())["models"][PUBLISHED]
    return entry


def chosen(names: Iterable[str], parts: Iterable[str] | None, what: str) -> list[str]:
    """The names that contain one of the parts (in any case); all of them if no part is given.

    Raises:
        PlanError: a part that is in none of the names.
    """
    known = list(names)
    if parts is None:
        return known
    wanted = [part.lower() for part in parts]
    for part in wanted:
        if not any(part in name.lower() for name in known):
            raise PlanError(f"no {what} has '{part}' in its name", hint=f"there are: {'; '.join(known)}")
    return [name for name in known if any(part in name.lower() for part in wanted)]
