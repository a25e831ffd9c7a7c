"""What a run did, in a few sentences and a table of before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxsnp.evaluation.accuracy import wilson_interval
from onnxsnp.report.terminal import count


def share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def sentences(record: Mapping[str, Any]) -> list[str]:
    """What happened, in words that need no paper."""
    before, after = record["before"], record["after"]
    less = [1 - share(after[key], before[key]) if before[key] else 0.0 for key in ("macs", "params")]
    cut = [group for group in record["groups"] if group["after"] < group["before"]]
    found = [
        f"{less[0]:.1%} of the multiply–accumulates and {less[1]:.1%} of the parameters were removed, by making "
        f"{len(cut)} of {len(record['groups'])} groups of neurons narrower."
    ]
    left = len(record.get("left_alone") or [])
    if left:
        found.append(f"{left} {'places were' if left > 1 else 'place was'} left alone; where and why is said below.")
    latency = record.get("latency")
    if latency:
        low, high = latency["speedup_interval"]
        found.append(
            f"It runs {latency['speedup']:.2f}× as fast (quartiles of the rounds {low:.2f}–{high:.2f}) at batch "
            f"{latency['batch']}, measured side by side."
        )
    accuracy, agreed = record.get("accuracy"), record.get("agreement")
    if accuracy and accuracy["after"]["top1"] is not None:
        old, new = accuracy["before"], accuracy["after"]
        found.append(f"Top-1 accuracy went from {old['top1']:.2f} % to {new['top1']:.2f} % ({new['count']} samples).")
    elif agreed and agreed["top1"] is not None:
        low, high = interval(agreed["top1"], agreed["samples"])
        found.append(
            f"On {agreed['samples']} samples it had not seen it gives the same top-1 class as the original in "
            f"{agreed['top1']:.1f} % (95 % interval {low:.0f}–{high:.0f} %)."
        )
    return found


def interval(percent: float, samples: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, all in percent."""
    return wilson_interval(round(percent / 100 * samples), samples)


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Before and after, one quantity a row: name, before, after, change, share (after of before, for a bar), note."""
    found = []
    for name, key in (("parameters", "params"), ("multiply–accumulates per sample", "macs"), ("file size", "bytes")):
        old, new = record["before"][key], record["after"][key]
        if new is not None and old:
            show = (lambda value: f"{value / 1e6:.2f} MB") if key == "bytes" else count
            found.append(_row(name, show(old), show(new), f"{new / old - 1:+.1%}", new / old))
    latency = record.get("latency")
    if latency:
        found.append(
            _row(
                f"latency at batch {latency['batch']}",
                f"{latency['before_ms']:.2f} ms",
                f"{latency['after_ms']:.2f} ms",
                f"{1 / latency['speedup'] - 1:+.1%}",
                1 / latency["speedup"],
                f"speed-up (median over the rounds) {latency['speedup']:.2f}×, quartiles of {latency['rounds']} rounds "
                f"{latency['speedup_interval'][0]:.2f}–{latency['speedup_interval'][1]:.2f}",
            )
        )
    return found + _quality(record)


def _quality(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    accuracy = record.get("accuracy")
    if accuracy:
        old, new = accuracy["before"], accuracy["after"]
        for name, key in (("top-1 accuracy", "top1"), ("top-5 accuracy", "top5")):
            if old[key] is not None and new[key] is not None:
                low, high = interval(new[key], new["count"])
                note = f"{new['count']} samples; after: 95 % interval {low:.1f}–{high:.1f} %"
                change = f"{new[key] - old[key]:+.2f} points"
                paired = new.get("paired") if key == "top1" else None
                if paired:
                    ends = "{:+.1f} to {:+.1f}".format(*paired["difference_interval"])
                    note += f"; of the change: {ends} points"
                found.append(_row(name, f"{old[key]:.2f} %", f"{new[key]:.2f} %", change, new[key] / 100, note))
    agreed = record.get("agreement")
    if agreed:
        seen = f"{agreed['samples']} samples held back"
        if agreed["top1"] is not None:
            low, high = interval(agreed["top1"], agreed["samples"])
            note = f"{seen}; 95 % interval {low:.1f}–{high:.1f} %"
            found.append(
                _row(
                    "same top-1 class as the original",
                    "100 %",
                    f"{agreed['top1']:.1f} %",
                    "",
                    agreed["top1"] / 100,
                    note,
                )
            )
        if agreed["cosine"] is not None:
            found.append(_row("cosine to the original's outputs", "1", f"{agreed['cosine']:.4f}", "", None, seen))
        if agreed["kl"] is not None:
            note = f"{seen}; Kullback–Leibler divergence, nats"
            found.append(_row("KL to the original's outputs", "0", f"{agreed['kl']:.4f}", "", None, note))
    return found


def _row(name: str, old: str, new: str, change: str, share: float | None, note: str = "") -> dict[str, Any]:
    bar = None if share is None else min(max(share, 0.0), 1.0)
    return {"name": name, "before": old, "after": new, "change": change, "share": bar, "note": note}
