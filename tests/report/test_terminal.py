"""What people see: whole at 80 columns, unbroken in a pipe, and saying only what happened."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from onnxsnp.report import terminal


def shown(function: Any, *arguments: Any, width: int = 80) -> str:
    stream = io.StringIO()
    function(Console(file=stream, width=width, markup=False, emoji=False), *arguments)
    text = stream.getvalue()
    assert all(len(line) <= width for line in text.splitlines() if not line.startswith(("wrote", "dry run")))
    return text


def group(name: str, kind: str, before: int, after: int, heads: int = 1) -> dict[str, Any]:
    return {"id": name, "kind": kind, "before": before, "after": after, "heads": heads}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "output": "out/small.onnx",
        "before": {"params": 5_717_416, "macs": 1_253_683_200, "bytes": 22_981_700},
        "after": {"params": 4_000_000, "macs": 877_578_240, "bytes": 16_100_000},
        "groups": [
            group("qk.0", "qk", 64, 32, 3),
            group("v.0", "v", 64, 64, 3),
            group("ffn.0", "ffn", 768, 500),
            group("residual", "residual", 192, 160),
        ],
        "notes": [],
        "skipped": 0,
        "seconds": {"analyse": 1.25, "cut": 2.25},
        "verification": {"checks": ["checker", "a run"], "masked_equality": 3e-7},
        "agreement": {"samples": 32, "top1": 90.625, "cosine": 0.98765, "kl": 0.0123},
        **changes,
    }


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (5_717_416, "5.72 M"), (1.25e9, "1.25 G"), (-2000, "-2.00 k")],
)
def test_counts_get_a_prefix(value: float, text: str) -> None:
    assert terminal.count(value) == text


def test_widths_stand_under_their_kind_and_the_rest_apart() -> None:
    lines = shown(terminal.pruning, record()).splitlines()
    assert lines[0].split() == ["block", "Q–K", "V", "FFN"]
    assert " ".join(lines[1].split()) == "0 3×64 → 3×32 3×64 768 → 500"
    assert lines[0].endswith("FFN") and lines[1].endswith("500") and len(lines[0]) == len(lines[1])
    assert [line.split() for line in lines[2:4]] == [["group", "size"], ["residual", "192", "→", "160"]]


def test_where_heads_go_their_number_stands_before_and_after() -> None:
    groups = [
        *(group(f"qk.{block}", "qk", 64, 32, 3) for block in range(2)),
        *(group(f"v.{block}", "v", 64, 64, 3) for block in range(2)),
        group("head.1", "head", 3, 2),
    ]
    rows = [line.split() for line in shown(terminal.pruning, record(groups=groups)).splitlines()[:3]]
    assert rows[0] == ["block", "heads", "Q–K", "V"]
    assert rows[1] == ["0", "–", "3×64", "→", "3×32", "3×64"]
    assert rows[2] == ["1", "3", "→", "2", "3×64", "→", "2×32", "3×64", "→", "2×64"]


def test_indices_that_stand_for_pairs_are_shown_as_neurons() -> None:
    pairs = [group("qk.0", "qk", 32, 5, 1) | {"together": 2}, group("v.0", "v", 64, 64, 12) | {"together": 1}]
    row = shown(terminal.pruning, record(groups=pairs)).splitlines()[1]
    assert row.split() == ["0", "64", "→", "10", "12×64"]


def test_kinds_that_a_model_lacks_get_no_column() -> None:
    text = shown(terminal.pruning, record(groups=[group("ffn.0", "ffn", 16, 11)]))
    assert text.splitlines()[0].split() == ["block", "FFN"]
    text = shown(terminal.pruning, record(groups=[group("channel.0", "channel", 6, 4)]))
    assert text.splitlines()[0].split() == ["group", "size"] and "block" not in text


def test_before_and_after_with_the_change() -> None:
    text = shown(terminal.pruning, record())
    assert "5.72 M    4.00 M  -30.0%" in text and "22.98 MB  16.10 MB  -29.9%" in text
    assert "same top-1 as the original (32 held-back samples)" in text and "90.6 %" in text
    assert "wrote out/small.onnx in 3.5 s" in text and "largest relative difference 3.0e-07" in text


def test_accuracy_takes_the_place_of_agreement() -> None:
    sides = {
        "before": {"top1": 70.0, "top5": 95.0, "agreement": None, "count": 64},
        "after": {"top1": 68.75, "top5": 95.0, "agreement": 97.0, "count": 64},
    }
    text = shown(terminal.pruning, record(accuracy=sides))
    assert "top-1 (64 samples)" in text and "-1.25" in text and "97.00 %" in text and "90.6 %" not in text


def test_latency_stands_beside_the_other_costs() -> None:
    times = {"before_ms": 16.3, "after_ms": 9.87, "speedup": 1.6, "batch": 1}
    lines = [" ".join(line.split()) for line in shown(terminal.pruning, record(latency=times)).splitlines()]
    at = lines.index("latency at batch 1 16.30 ms 9.87 ms -37.5%")
    assert lines[at - 1].startswith("file ") and lines[at + 1].startswith("same top-1")


def test_notes_and_skipped_files_are_told() -> None:
    text = shown(terminal.pruning, record(notes=["one [b] note"], skipped=3), width=200)
    assert "note: one [b] note" in text and "note: 3 unreadable calibration files were skipped" in text


def test_steps_that_were_kept_are_told_with_what_they_did() -> None:
    steps = [
        {"name": "fit", "before": 0.5, "after": 0.6, "kept": False},
        {"name": "sequential refit", "before": 0.71234, "after": 0.54321, "kept": True},
    ]
    lines = shown(terminal.pruning, record(steps=steps), width=200).splitlines()
    told = [line.strip() for line in lines if "loss on unseen samples" in line]
    assert told == ["sequential refit: loss on unseen samples 0.7123 → 0.5432"]


def test_a_dry_run_does_not_claim_a_model() -> None:
    bare = record(output=None, after={"params": 1, "macs": 1, "bytes": None})
    del bare["verification"], bare["agreement"]
    text = shown(terminal.pruning, bare)
    assert "wrote" not in text and "proved" not in text and "file" not in text
    assert shown(terminal.dry_run, None) == "dry run, no model was written; -o FILE.json keeps the plan\n"
    assert "wrote the plan p.json; apply it with --plan" in shown(terminal.dry_run, Path("p.json"))


def test_a_long_path_stays_on_one_line() -> None:
    long = "/".join(["folder name"] * 12) + "/[b] :smile: small.onnx"
    assert f"wrote {long} in 3.5 s\n" in shown(terminal.pruning, record(output=long))


def test_inspection_lists_sites_groups_and_what_is_left_alone() -> None:
    data = {
        "params": 10_866,
        "macs": 190_032,
        "bytes": 67_867,
        "opset": 17,
        "inputs": {"image": ["batch", 3, 16, 16]},
        "sites": [
            {
                "name": "blocks.0[x].attn",
                "heads": 3,
                "qk_size": 8,
                "v_size": None,
                "prunable": {"qk": True, "v": False, "head": True},
            }
        ],
        "groups": [
            {"id": "qk.0", "kind": "qk", "size": 8, "macs": 10, "prunable": True},
            {"id": "ffn.0", "kind": "ffn", "size": 40, "macs": 32_640, "prunable": False},
        ],
        "skipped": [{"node": "/soft[max]", "reason": "its scores are no product"}],
    }
    text = shown(terminal.inspection, data)
    assert "10.87 k parameters, 190.03 k MACs per sample" in text and "batch×3×16×16" in text
    row = next(line for line in text.splitlines() if line.startswith("blocks.0[x].attn"))
    assert row.split() == ["blocks.0[x].attn", "3", "8", "–", "Q–K,", "heads"]
    assert "ffn.0" in text and "qk.0" not in text and "/soft[max]: its scores are no product" in text
    assert "no attention site found" in shown(terminal.inspection, {**data, "sites": []})
