"""Tables of `onnxsnp evaluate` and `onnxsnp bench`: models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxsnp.report.terminal import model_names, new_table, or_dash, plain

_CLASSES = 5  # gains and losses shown
_OPERATORS = 10  # kinds of operators shown


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
    """The result of `onnxsnp bench`: a table for each pair of threads and batch."""
    for threads, batch in dict.fromkeys((one["threads"], one["batch"]) for one in results):
        mine = [one for one in results if (one["threads"], one["batch"]) == (threads, batch)]
        _latencies(console, mine)


def _latencies(console: Console, results: Sequence[Mapping[str, Any]]) -> None:
    measured = any(result["memory"] is not None for result in results)
    table = new_table("model", "median", "p90", "min", "speed-up", *(["memory"] if measured else []), "file")
    for index, (result, name) in enumerate(zip(results, model_names(results), strict=True)):
        low, high = result["speedup_interval"]
        ratio = "1" if index == 0 else f"{result['speedup']:.2f}× ({low:.2f}–{high:.2f})"
        row: list[str | Text] = [name, *(f"{result[key]:.2f} ms" for key in ("median", "p90", "min")), ratio]
        if measured:
            row.append("–" if result["memory"] is None else f"{result['memory'] / 1e6:.1f} MB")
        table.add_row(*row, f"{result['bytes'] / 1e6:.2f} MB")
    console.print(table)
    first = results[0]
    console.print(
        f"batch {first['batch']}, {first['runs']} interleaved rounds, {_threads(first['threads'])}, "
        f"{first['provider']}; speed-up is the median over rounds, quartiles in brackets"
        + ("; memory is the peak in a process of its own, less what that has without a model" if measured else ""),
        highlight=False,
    )


def per_op(console: Console, profiled: Mapping[str, Any]) -> None:
    """Where the time went, of each model beside the first, and what the cut did not buy."""
    first = profiled["profiles"][0]
    names = model_names(profiled["profiles"])
    where = f"batch {profiled['batch']}, {_threads(profiled['threads'])}, with onnxruntime's profiler on"
    for profile, found, name in zip(profiled["profiles"][1:], profiled["unbought"], names[1:], strict=True):
        if found is None:
            continue
        console.print(_parts(found["parts"], first["ms"], profile["ms"]))
        console.print(Text(f"{name} ({where}): {found['words']}"), highlight=False)
    if len(profiled["profiles"]) == 1 or None in profiled["unbought"]:
        table = new_table("operator", "calls", "ms", "share")
        for op in first["ops"][:_OPERATORS]:
            table.add_row(plain(op["op"]), str(op["calls"]), f"{op['ms']:.3f}", f"{op['ms'] / first['ms']:.1%}")
        console.print(table)
        console.print(Text(f"{names[0]} ({where})"), highlight=False)


def _parts(parts: Sequence[Mapping[str, Any]], before: float, after: float) -> Table:
    """The kinds of operators that take longest, what is left of their work, and their time beyond proportion."""
    table = new_table("operator", "before", "share", "after", "share", "work left", "not bought")

    def row(name: str, chosen: Sequence[Mapping[str, Any]], work: float | None) -> None:
        old, new, excess = (sum(part[key] for part in chosen) for key in ("before_ms", "after_ms", "excess_ms"))
        cells = [f"{old:.3f} ms", f"{old / before:.0%}", f"{new:.3f} ms", f"{new / after:.0%}"]
        table.add_row(plain(name), *cells, "–" if work is None else f"{work:.0%}", f"{excess:+.3f}")

    shown = sorted(parts, key=lambda part: -max(part["before_ms"], part["after_ms"]))
    for part in shown[:_OPERATORS]:
        row(part["op"], [part], part["work"])
    if len(shown) > _OPERATORS:
        row(f"{len(shown) - _OPERATORS} others", shown[_OPERATORS:], None)
    row("all", shown, None)
    return table


def _threads(threads: int | None) -> str:
    return {None: "all threads", 1: "1 thread"}.get(threads, f"{threads} threads")
