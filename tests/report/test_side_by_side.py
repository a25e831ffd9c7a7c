"""Models side by side: whole at 80 columns, and saying only what happened."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from onnxsnp.report import side_by_side


def shown(function: Any, *arguments: Any, width: int = 80) -> str:
    stream = io.StringIO()
    function(Console(file=stream, width=width, markup=False, emoji=False), *arguments)
    text = stream.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    return text


def evaluation(model: str, **changes: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("top1", "top5", "top1_interval", "agreement", "cosine", "kl", "paired"))
    return {"model": model, **empty, "count": 64, "classes": [], "nonfinite": 0, **changes}


def latency(model: str, **changes: Any) -> dict[str, Any]:
    times = {"median": 12.34, "p90": 13.0, "mean": 12.4, "min": 12.0}
    rest = {"threads": 1, "batch": 1, "runs": 50, "provider": "cpu", "bytes": 4_884_240, "memory": None}
    return {"model": model, **times, "speedup": 1.29, "speedup_interval": (1.19, 1.31), **rest, **changes}


def test_models_side_by_side_fit_80_columns() -> None:
    numbers = {"top1": 62.5, "top5": 100.0, "top1_interval": (38.6, 81.5), "top5_interval": (96.3, 100.0)}
    numbers |= {"agreement": 100.0, "cosine": 1.0, "kl": 0.0}
    models = [evaluation(f"/some/long/folder/{name}", **numbers) for name in ("net.onnx", "vit_cifar10.pruned.onnx")]
    text = shown(side_by_side.evaluations, models, "64 images of x.zip")
    row = next(line for line in text.splitlines() if line.startswith("vit_cifar10.pruned.onnx "))
    assert " ".join(row.split()) == "vit_cifar10.pruned.onnx 62.50 % 38.6–81.5 100.00 % 100.00 % 1.0000 0.0000"
    assert "95 % CI of top-5: net.onnx 96.3–100.0, vit_cifar10.pruned.onnx 96.3–100.0" in " ".join(text.split())


def test_equal_file_names_keep_their_folders() -> None:
    text = shown(side_by_side.evaluations, [evaluation("a/m.onnx"), evaluation("b/m.onnx", cosine=0.5)], "8 images")
    assert "a/m.onnx" in text and "b/m.onnx" in text and "top-1" not in text


def test_one_model_without_labels_has_nothing_to_compare() -> None:
    text = shown(side_by_side.evaluations, [evaluation("m.onnx", nonfinite=2)], "8 images")
    assert "nothing to compare: give a second model" in text and "cosine" not in text
    assert "m.onnx: 2 samples gave NaN or infinity" in text


@pytest.mark.parametrize(("threads", "text"), [(None, "all threads"), (1, "1 thread,"), (2, "2 threads")])
def test_latencies(threads: int | None, text: str) -> None:
    both = [latency("x/net.onnx", threads=threads), latency("x/vit_cifar10.pruned.onnx", threads=threads)]
    found = shown(side_by_side.latencies, both)
    assert "1.29× (1.19–1.31)" in found and text in found and "4.88 MB" in found


def test_a_labelled_comparison_says_what_chance_it_is_and_which_classes_changed() -> None:
    numbers = {"top1": 60.0, "top5": 90.0, "top1_interval": (50.0, 69.0), "top5_interval": (82.0, 95.0)}
    paired = {"lost": 12, "gained": 4, "difference": -8.0, "difference_interval": (-15.6, 0.1), "p": 0.0768}
    classes = [
        {"label": number, "name": "tench" if number == 0 else None, "count": 10, "before": 5, "after": 5 + step}
        | {"change": 10.0 * step}
        for number, step in enumerate([-3, -2, -2, -1, -1, -1, 0, 0, 1, 2])
    ]
    models = [
        evaluation("a.onnx", **numbers, paired=None, classes=[]),
        evaluation("b.onnx", **numbers, paired=paired, classes=classes),
    ]
    text = " ".join(shown(side_by_side.evaluations, models, "64 images of x.zip").split())
    assert "b.onnx: -8.00 points of top-1 (95 % CI -15.60 to +0.10)" in text and "p = 0.077" in text
    assert "0 tench 10 5 2 -30.0 points" in text and "9 10 5 7 +20.0 points" in text and "8 10 5 6 +10.0" in text
    assert " 5 10 5 4 -10.0" not in text and "3 other classes, 2 of them unchanged" in text


def test_latencies_of_each_setting_stand_together_with_memory_where_it_was_measured() -> None:
    rows = [latency(name, batch=batch, memory=12_300_000) for batch in (1, 8) for name in ("a.onnx", "b.onnx")]
    found = shown(side_by_side.latencies, rows)
    assert found.index("batch 1,") < found.index("batch 8,") and found.count("12.3 MB") == 4
    assert "peak in a process of its own" in " ".join(found.split())
