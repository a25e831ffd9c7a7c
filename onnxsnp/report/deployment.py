"""What `onnxsnp engine` prints, made from the same plain data that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from onnxsnp.report.terminal import fusion, new_table


def targets(console: Console, profiles: Sequence[Mapping[str, Any]]) -> None:
    """The profiles there are."""
    columns = ("target", "what", "TensorRT", "opset", "compute capability", "precisions", "widths", "fuses attention")
    shown = new_table(*columns)
    for column in shown.columns:
        column.justify = "left"
    for one in profiles:
        steps = {step for precision, step in (one["multiple_of"] or {}).items() if step > 1}
        names = [precision for precision, step in (one["multiple_of"] or {}).items() if step > 1]
        shown.add_row(
            one["name"],
            one["about"],
            one["tensorrt"] + (" (importer)" if one["runtime"] != "tensorrt" else ""),
            str(one["opset"]),
            one["compute_capability"] or "any",
            ", ".join(one["precisions"]),
            f"×{max(steps)} in {', '.join(names)}" if steps else "any",
            "yes" if one["fuses_attention"] else "no",
        )
    console.print(shown)
    console.print('a profile of your own: --target FILE.toml, with base = "NAME" and what differs', highlight=False)


def engine(console: Console, record: Mapping[str, Any]) -> None:
    """What was rewritten, whether it computes the same, what was built and what was not, and what to do next."""
    target = record["target"]
    release = f"TensorRT {target['tensorrt']}" + (" (its importer)" if target["runtime"] != "tensorrt" else "")
    about = f"{target['name']}: {target['about']}; {release}, {record['precision']}"
    _line(console, about, style="bold")
    for change in record["changes"]:
        _line(console, f"  {change['count']} × {change['op']}: {change['why']}")
    for model in (record, *([record["original"]] if record["original"] else [])):
        _line(console, _same(model))
        if model["parity_fp16"] is not None:
            half = model["parity_fp16"]
            _line(
                console,
                f"{model['label']}, in half precision in onnxruntime{_top(half)}; largest difference "
                f"{half['difference']:.1e}, {half['tolerance']:.0e} allowed; the device chooses its layers' precision",
            )
    for finding in record["lint"]:
        where = f"{finding['node']} ({finding['op']})" if finding["op"] else finding["node"]
        _line(console, f"warning: {where}: {finding['message']}; {finding['remedy']}", style="yellow")
    for text in record["warnings"]:
        _line(console, f"warning: {text}", style="yellow")
    for text in fusion(record["fused_attention"]):
        _line(console, text)
    _measured(console, record)
    for note in record["notes"]:
        _line(console, f"note: {note}", style="yellow")
    _line(console, _made(record), style="bold")
    _line(console, f"wrote {record['output']} ({_files(record['files'])}) and {record['output']}.engine.json")
    if record["next"]:
        _line(console, "next, with your device's name (or once more with --host USER@DEVICE, which does both):")
    for step in record["next"]:
        _line(console, f"  {step}")


def _same(model: Mapping[str, Any]) -> str:
    parity = model["parity"]
    return (
        f"{model['label']}, lowered: same outputs as {model['source']} in onnxruntime{_top(parity)}; largest "
        f"difference {parity['difference']:.1e} of the largest value, {parity['tolerance']:.0e} allowed"
    )


def _top(parity: Mapping[str, Any]) -> str:
    return {True: ", same top-1", False: ", another top-1", None: ""}[parity["same_top1"]]


def _made(record: Mapping[str, Any]) -> str:
    """What was built, and what was not."""
    target, engine = record["target"], record["engine"]
    if not record["built"] or engine is None:
        return (
            f"no engine was built here: an engine for {target['name']} is built on the device, with its own "
            f"TensorRT {target['tensorrt']}"
        )
    took = "" if engine["seconds"] is None else f" in {engine['seconds']:.1f} s"
    return f"built {engine['file']}: {engine['bytes'] / 1e6:.2f} MB, with {engine['built_with']}{took}"


def _measured(console: Console, record: Mapping[str, Any]) -> None:
    """Latency side by side and differences of outputs, where the engine was run."""
    latency = record["latency"]
    if latency is not None:
        before, after = latency["before"], latency["after"]
        shown = new_table(
            "latency on the device", *(["before"] if before else []), "after", *(["change"] if before else [])
        )
        for name in ("median", "p90", "p99"):
            old = [f"{before[name]:.2f} ms"] if before else []
            change = [f"{after[name] / before[name] - 1:+.1%}"] if before else []
            shown.add_row(name, *old, f"{after[name]:.2f} ms", *change)
        console.print(shown)
    if record["engine"] is not None and record["engine"].get("fused_attention"):
        _line(console, f"fused attention, by the device's log: {record['engine']['fused_attention']}")
    for output in record["outputs"] or []:
        said = "agrees with" if output["passed"] else "DIFFERS from"
        _line(
            console,
            f"output {output['name']} of the engine {said} onnxruntime's: {output['relative_difference']:.1e} of its "
            f"largest value, {output['tolerance']:.0e} allowed",
        )


def _files(files: Sequence[Mapping[str, Any]]) -> str:
    return f"{len(files)} files, {sum(one['bytes'] for one in files) / 1e6:.1f} MB"


def _line(console: Console, text: str, style: str = "") -> None:
    """One line however long, so that it can be copied."""
    console.print(Text(text), style=style or None, highlight=False, soft_wrap=True)
