"""The table of `onnxsnp sweep`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxsnp.report.terminal import count, new_table


def sweep(console: Console, summary: Mapping[str, Any]) -> None:
    """The result of `onnxsnp sweep`: a row per plan, the front marked, and the choice."""
    console.print(_table(summary["rows"]))
    for row in summary["rows"]:
        if row["error"]:
            console.print(Text(f"{row['name']}: {row['error']}"), style="yellow", highlight=False)
    console.print("* no other plan is both cheaper and better", highlight=False)
    if summary["verdict"]:
        console.print(Text(summary["verdict"]), style="bold", highlight=False)
    if summary["output"]:
        console.print(Text(f"wrote {summary['output']}"), soft_wrap=True)


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    done = [row for row in rows if not row["error"]]
    labelled = any(row["top1"] is not None for row in done)
    timed = any(row["ms"] is not None for row in done)
    columns = ["MACs", "removed", "parameters"] + (["latency", "speed-up"] if timed else [])
    columns += ["top-1", "lost (95 % CI)"] if labelled else ["same top-1"]
    table = new_table("plan", "", *columns, "KL", "s")
    for row in done:
        cells = [row["name"], ("→" if row["chosen"] else "") + ("*" if row["pareto"] else "")]
        cells += [count(row["macs"]), f"{row['macs_removed']:.1%}", count(row["params"])]
        if timed:
            cells += [_form(row["ms"], "{:.2f} ms"), _form(row["speedup"], "{:.2f}×")]
        cells += _quality(row, labelled)
        cells += [_form(row["kl"], "{:.4f}"), "reused" if row["reused"] else f"{row['seconds']:.1f}"]
        table.add_row(*map(Text, cells))
    return table


def _quality(row: Mapping[str, Any], labelled: bool) -> list[str]:
    if not labelled:
        return [_form(row["agreement"], "{:.1f} %")]
    interval = row["lost_interval"]
    around = "" if interval is None else f" ({interval[0]:+.1f} to {interval[1]:+.1f})"
    return [_form(row["top1"], "{:.2f} %"), _form(row["lost"], "{:+.2f}") + around]


def _form(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
