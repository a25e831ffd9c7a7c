"""Tables and one-line summaries for the terminal, made from the same plain data that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_KIND_NAMES = {"qk": "Q–K", "v": "V", "ffn": "FFN", "head": "heads", "channel": "channels", "residual": "residual"}
_POINTS = 5  # of a curve that are shown, with the best one and the last
_COLUMNS = ("head", "qk", "v", "ffn")


def count(value: float) -> str:
    """A number with a decimal prefix: 5.72 M, 1.25 G."""
    for scale, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= scale:
            return f"{value / scale:.2f}{letter}"
    return f"{value:.0f}"


def inspection(console: Console, data: Mapping[str, Any]) -> None:
    """The result of `onnxsnp inspect`."""
    shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in data["inputs"].items())
    line = (
        f"{count(data['params'])} parameters, {count(data['macs'])} MACs per sample, "
        f"{data['bytes'] / 1e6:.1f} MB, opset {data['opset']}, input {shapes}"
    )
    console.print(Text(line), highlight=False)
    if data["sites"]:
        table = new_table("attention site", "heads", "Q–K size", "V size", "can be cut")
        for site in data["sites"]:
            able = ", ".join(_KIND_NAMES[kind] for kind in ("qk", "v", "head") if site["prunable"][kind]) or "nothing"
            table.add_row(plain(site["name"]), str(site["heads"]), _size(site["qk_size"]), _size(site["v_size"]), able)
        console.print(table)
    else:
        console.print("no attention site found", style="yellow")
    others = [group for group in data["groups"] if group["kind"] not in ("qk", "v", "head")]
    if others:
        table = new_table("group", "kind", "size", "MACs that scale with it", "can be cut")
        for group in others:
            table.add_row(
                plain(group["id"]),
                _KIND_NAMES[group["kind"]],
                str(group["size"]),
                count(group["macs"]),
                "yes" if group["prunable"] else "no",
            )
        console.print(table)
    if data["skipped"]:
        console.print("left alone:", style="bold")
        for item in data["skipped"]:
            console.print(Text(f"  {item['node']}: {item['reason']}"))


def pruning(console: Console, record: Mapping[str, Any]) -> None:
    """The result of `onnxsnp prune`: widths per block, then before and after side by side."""
    for table in (*_widths(record["groups"]), _before_after(record)):
        console.print(table)
    if record.get("recovery") and record.get("accuracy"):
        stages = new_table("", "before", "after compensation", "after recovery", "by recovery")
        _add_accuracy(stages, record["accuracy"])
        console.print(stages)
    if record["skipped"]:
        console.print(f"note: {record['skipped']} unreadable calibration files were skipped", style="yellow")
    for step in record.get("steps", []):
        if step["kept"]:
            change = f"loss on unseen samples {step['before']:.4g} → {step['after']:.4g}"
            console.print(Text(f"{step['name']}: {change}"), highlight=False)
    if record.get("recovery"):
        console.print(Text(_recovered(record["recovery"])), highlight=False)
    for line in _on_target(record.get("target")):
        console.print(Text(line), highlight=False)
    for note in record["notes"]:
        console.print(Text(f"note: {note}"), style="yellow", highlight=False)
    proof = record.get("verification")
    if proof is not None:
        console.print(
            f"proved: {', '.join(proof['checks'])}; largest relative difference {proof['masked_equality']:.1e}",
            highlight=False,
        )
    if record["output"]:
        # one line however long, so that the path can be copied
        console.print(Text(f"wrote {record['output']} in {sum(record['seconds'].values()):.1f} s"), soft_wrap=True)


def recovery(console: Console, record: Mapping[str, Any]) -> None:
    """The result of `onnxsnp recover`: the curves, then before and after side by side."""
    found = record["recovery"]
    table = new_table("step", "loss", "loss on samples held back", "same top-1 as the original")
    shown = found["curve"][:: max(len(found["curve"]) // _POINTS, 1)]
    shown += [
        point
        for point in found["curve"]
        if point not in shown and point["step"] in (found["best_step"], found["steps"])
    ]
    for point in sorted(shown, key=lambda one: one["step"]):
        mark = " (kept)" if point["step"] == found["best_step"] else ""
        table.add_row(
            f"{point['step']}{mark}",
            or_dash(point["training"], "{:.4g}"),
            f"{point['held']['loss']:.4g}",
            or_dash(point["held"]["agreement"], "{:.1f} %"),
        )
    console.print(table)
    accuracy = record.get("accuracy")
    if accuracy is not None:
        table = new_table("", "original", "pruned", "recovered", "change")
        _add_accuracy(table, accuracy)
        console.print(table)
    console.print(Text(_recovered(found)), highlight=False)
    for note in found["notes"]:
        console.print(Text(f"note: {note}"), style="yellow", highlight=False)
    if record.get("output"):
        console.print(Text(f"wrote {record['output']} in {record['seconds']['recover']:.1f} s"), soft_wrap=True)


def _recovered(found: Mapping[str, Any]) -> str:
    """A recovery in a line."""
    return (
        f"recovery: {found['steps']} steps, {found['passes']:.1f} passes over {found['samples']} samples, "
        f"loss on {found['held_back']} held back {found['before']['loss']:.4g} → {found['after']['loss']:.4g}"
    )


def _add_accuracy(table: Table, accuracy: Mapping[str, Any]) -> None:
    """Rows of what models get right, the state between the first and the last included."""
    stages = [accuracy[name] for name in ("before", "compensated", "after") if name in accuracy]
    old, new = stages[0], stages[-1]
    for name, key in (("top-1", "top1"), ("top-5", "top5")):
        if old[key] is not None:
            cells = [f"{one[key]:.2f} %" for one in stages]
            table.add_row(f"{name} ({new['count']} samples)", *cells, f"{new[key] - stages[-2][key]:+.2f}")
    if new["agreement"] is not None:
        cells = [f"{one['agreement']:.2f} %" for one in stages[1:]]
        table.add_row("same top-1 as the original", "100 %", *cells, "")


def _on_target(target: Mapping[str, Any] | None) -> list[str]:
    """What the target asked for, and whether it can still fuse attention."""
    if target is None:
        return []
    step = target["multiple_of"]
    widths = f"widths are multiples of {step}" if step > 1 else "any width will do"
    head = f"{target['name']} in {target['precision']}: {widths}"
    return [head, *fusion(target["fused_attention"])]


def fusion(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether attention can be fused, as few lines as there are reasons.

    Args:
        sites: with `site`, `kept`, `why`, and `before` where something was cut.
    """
    if not sites:
        return []
    kept = sum(site["kept"] for site in sites)
    lines = [f"attention that can be fused: {kept} of {len(sites)} sites"] if kept else []
    others = [site for site in sites if not site["kept"]]
    for rule in dict.fromkeys(site["rule"] for site in others):
        mine = [site for site in others if site["rule"] == rule]
        what = "fused attention lost" if any(site.get("before") for site in mine) else "no fused attention"
        alike = len({site["why"] for site in mine}) == 1
        where = "" if alike and len(mine) == len(sites) else f" at {mine[0]['site']}"
        more = f" (and at {len(mine) - 1} more)" if where and len(mine) > 1 else ""
        lines.append(f"{what}{where}: {mine[0]['why']}{more}")
    return lines


def dry_run(console: Console, plan: Path | None) -> None:
    """The end of `onnxsnp prune --dry-run`."""
    end = f"wrote the plan {plan}; apply it with --plan" if plan is not None else "-o FILE.json keeps the plan"
    console.print(Text(f"dry run, no model was written; {end}"), soft_wrap=True)


def _widths(groups: Sequence[Mapping[str, Any]]) -> list[Table]:
    """One row per block, one column per kind; groups that belong to no block get a table of their own."""
    cells: dict[int, dict[str, str]] = {}
    others = []
    left = {group["id"].rpartition(".")[2]: group["after"] for group in groups if group["kind"] == "head"}
    for group in groups:
        inside = group["kind"] in ("qk", "v")
        text = _change(group, left.get(group["id"].rpartition(".")[2]) if inside else None)
        number = group["id"].rpartition(".")[2]
        if group["kind"] in _COLUMNS and number.isdigit():
            cells.setdefault(int(number), {})[group["kind"]] = text
        else:
            others.append((group["id"], text))
    tables = []
    if cells:
        kinds = [kind for kind in _COLUMNS if any(kind in row for row in cells.values())]
        tables.append(new_table("block", *(_KIND_NAMES[kind] for kind in kinds)))
        for number in sorted(cells):
            tables[0].add_row(str(number), *(cells[number].get(kind, "–") for kind in kinds))
    if others:
        tables.append(new_table("group", "size"))
        for name, text in others:
            tables[-1].add_row(plain(name), text)
    return tables


def _change(group: Mapping[str, Any], left: int | None) -> str:
    """The size of a group before and after; `left` of its heads stay (all, if None)."""
    before, after = (f"{heads}×" if group["heads"] > 1 else "" for heads in (group["heads"], left or group["heads"]))
    old, new = (group[when] * group.get("together", 1) for when in ("before", "after"))  # as neurons, like `inspect`
    return f"{before}{old}" if (old, before) == (new, after) else f"{before}{old} → {after}{new}"


def _before_after(record: Mapping[str, Any]) -> Table:
    table = new_table("", "before", "after", "change")
    before, after = record["before"], record["after"]
    for name, key in (("parameters", "params"), ("MACs", "macs")):
        table.add_row(name, count(before[key]), count(after[key]), _percent(before[key], after[key]))
    if after["bytes"] is not None:
        table.add_row(
            "file",
            f"{before['bytes'] / 1e6:.2f} MB",
            f"{after['bytes'] / 1e6:.2f} MB",
            _percent(before["bytes"], after["bytes"]),
        )
    latency = record.get("latency")
    if latency is not None:
        table.add_row(
            f"latency at batch {latency['batch']}",
            f"{latency['before_ms']:.2f} ms",
            f"{latency['after_ms']:.2f} ms",
            f"{1 / latency['speedup'] - 1:+.1%}",
        )
    accuracy = record.get("accuracy")
    if accuracy is not None and "compensated" not in accuracy:
        _add_accuracy(table, accuracy)
    agreement = record.get("agreement")
    if agreement is not None:
        seen = f"({agreement['samples']} held-back samples)"
        if agreement["top1"] is not None and accuracy is None:
            table.add_row(f"same top-1 as the original {seen}", "100 %", f"{agreement['top1']:.1f} %", "")
        if agreement["cosine"] is not None:
            table.add_row(f"cosine to the original {seen}", "1", f"{agreement['cosine']:.4f}", "")
        if agreement["kl"] is not None:
            table.add_row(f"KL to the original {seen}", "0", f"{agreement['kl']:.4f}", "")
    return table


def model_names(results: Sequence[Mapping[str, Any]]) -> list[Text]:
    """File names without their folders where that tells the models apart."""
    full = [result["model"] for result in results]
    short = [Path(name).name for name in full]
    return [plain(name) for name in (short if len(set(short)) == len(set(full)) else full)]


def plain(name: str) -> Text:
    """Text from files, in which brackets and colons mean nothing."""
    return Text(name, overflow="fold")


def new_table(*columns: str) -> Table:
    """A plain table: the first column is text, the others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _size(value: int | None) -> str:
    return "–" if value is None else str(value)


def _percent(before: float, after: float) -> str:
    return f"{(after - before) / before:+.1%}" if before else "–"


def or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)
