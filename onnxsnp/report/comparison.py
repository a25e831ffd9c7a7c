"""Tables of `onnxsnp evaluate` and `onnxsnp bench`: models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from onnxsnp.report.terminal import model_names, new_table, or_dash, plain

_CLASSES = 5  # gains and losses shown


def evaluations(console: Console, results: Sequence[Mapping[str, Any]], description: str) -> None:
    """The result of `onnxsnp evaluate`."""
    console.print(Text(description), highlight=False)
    labelled = results[0]["top1"] is not None
    columns = ["top-1", "95 % CI", "top-5"] if labelled else []
    compared = ["agreement", "cosine", "KL"] if len(results) > 1 else []
    table = new_table("model", *columns, *compared)
    for result, name in zip(results, model_names(results), strict=True):
        row: list[str | Text] = [name]
        if labelled:
            low, high = result["top1_interval"]
            row += [f"{result['top1']:.2f} %", f"{low:.1f}–{high:.1f}", f"{result['top5']:.2f} %"]
        if compared:
            row += [
                or_dash(result["agreement"], "{:.2f} %"),
                or_dash(result["cosine"], "{:.4f}"),
                or_dash(result["kl"], "{:.4f}"),
            ]
        table.add_row(*row)
    if labelled or compared:
        console.print(table)
    else:
        console.print("nothing to compare: give a second model, or --data with images in class folders")
    if labelled:
        spans = [f"{name} {_span(result)}" for result, name in zip(results, model_names(results), strict=True)]
        console.print(Text(f"95 % CI of top-5: {', '.join(spans)}"), highlight=False)
    for result, name in list(zip(results, model_names(results), strict=True))[1:]:
        if result["paired"] is not None:
            console.print(Text(f"{name}: {_paired(result['paired'], result['count'])}"), highlight=False)
            _classes(console, result["classes"])
    broken = [result for result in results if result["nonfinite"]]
    for result in broken:
        console.print(Text(f"{result['model']}: {result['nonfinite']} samples gave NaN or infinity"), style="red")


def _span(result: Mapping[str, Any]) -> str:
    low, high = result["top5_interval"]
    return f"{low:.1f}–{high:.1f}"


def _paired(paired: Mapping[str, Any], count: int) -> str:
    """The difference to the first model, and whether it can be chance."""
    low, high = paired["difference_interval"]
    return (
        f"{paired['difference']:+.2f} points of top-1 (95 % CI {low:+.2f} to {high:+.2f}); of {count} samples "
        f"{paired['lost']} that the first gets right are wrong now, {paired['gained']} the other way round; "
        f"exact McNemar p = {paired['p']:.2g}"
    )


def _classes(console: Console, classes: Sequence[Mapping[str, Any]]) -> None:
    """The largest losses and gains of single classes."""
    losses = [one for one in classes if one["change"] < 0][:_CLASSES]
    gains = [one for one in reversed(classes) if one["change"] > 0][:_CLASSES]
    if len(classes) < 2 or not (losses or gains):
        return
    table = new_table("class", "samples", "right before", "right now", "change")
    for one in [*losses, *reversed(gains)]:
        name = str(one["label"]) if one["name"] is None else f"{one['label']} {one['name']}"
        table.add_row(
            plain(name), str(one["count"]), str(one["before"]), str(one["after"]), f"{one['change']:+.1f} points"
        )
    console.print(table)
    rest = len(classes) - len(losses) - len(gains)
    if rest:
        same = sum(one["change"] == 0 for one in classes)
        console.print(f"{rest} other classes, {same} of them unchanged", highlight=False)


def latencies(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    """The result of `onnxsnp bench`."""
    table = new_table("model", "median", "p90", "min", "speed-up", "file")
    for index, (result, name) in enumerate(zip(results, model_names(results), strict=True)):
        low, high = result["speedup_interval"]
        ratio = "1" if index == 0 else f"{result['speedup']:.2f}× ({low:.2f}–{high:.2f})"
        table.add_row(
            name,
            *(f"{result[key]:.2f} ms" for key in ("median", "p90", "min")),
            ratio,
            f"{result['bytes'] / 1e6:.2f} MB",
        )
    console.print(table)
    first = results[0]
    threads = {None: "all threads", 1: "1 thread"}.get(first["threads"], f"{first['threads']} threads")
    console.print(
        f"batch {first['batch']}, {first['runs']} interleaved rounds, {threads}, {first['provider']}; "
        "speed-up is the median over rounds, quartiles in brackets",
        highlight=False,
    )
