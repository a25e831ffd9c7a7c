"""What `onnxsnp engine` prints of a record: what was measured side by side, and never more than that."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console

from onnxsnp.deploy.targets import BUILT_IN
from onnxsnp.report import deployment

PARITY = {"difference": 3e-7, "tolerance": 2e-5, "same_top1": True}


def record(**changes: Any) -> dict[str, Any]:
    common = {
        "changes": [],
        "lint": [],
        "warnings": [],
        "fused_attention": [],
        "notes": [],
        "next": [],
        "label": "pruned",
        "source": "small.onnx",
        "parity": PARITY,
        "parity_fp16": None,
        "original": None,
    }
    built = {"built": False, "engine": None, "latency": None, "outputs": None}
    where = {"output": "out", "precision": "fp32", "target": BUILT_IN["jetson-nano"].to_dict()}
    return {**common, **built, **where, "files": [{"name": "a", "bytes": 2_000_000}], **changes}


def printed(**changes: Any) -> str:
    stream = StringIO()
    deployment.engine(Console(file=stream, width=200, markup=False), record(**changes))
    return stream.getvalue()


ENGINE = {"file": "pruned.engine", "bytes": 5_000_000, "built_with": "TensorRT 8.2.1 on nano", "seconds": None}
TIMES = {"median": 10.0, "p90": 11.0, "p99": 14.0}


def test_without_an_engine_none_is_claimed_and_no_time_is_quoted() -> None:
    text = printed(next=["scp -r out USER@DEVICE:"])
    assert "no engine was built here" in text and "wrote out (1 files, 2.0 MB) and out.engine.json" in text
    assert (
        " ms" not in text and "built pruned.engine" not in text and text.rstrip().endswith("  scp -r out USER@DEVICE:")
    )


def test_times_before_and_after_stand_side_by_side() -> None:
    after = {name: value / 2 for name, value in TIMES.items()}
    engine_of = {**ENGINE, "fused_attention": "no (6 softmax layers)"}
    text = printed(built=True, engine=engine_of, latency={"before": TIMES, "after": after, "speedup": 2.0})
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.endswith("%")}
    assert rows == {
        "median": ["10.00", "ms", "5.00", "ms", "-50.0%"],
        "p90": ["11.00", "ms", "5.50", "ms", "-50.0%"],
        "p99": ["14.00", "ms", "7.00", "ms", "-50.0%"],
    }
    assert "built pruned.engine: 5.00 MB, with TensorRT 8.2.1 on nano\n" in text and "no engine" not in text
    assert "fused attention, by the device's log: no (6 softmax layers)" in text


def test_a_model_alone_has_its_times_and_no_change() -> None:
    text = printed(built=True, engine=ENGINE, latency={"before": None, "after": TIMES, "speedup": None})
    assert "10.00 ms" in text and "%" not in text


def test_outputs_that_differ_are_said_to() -> None:
    common = {"name": "y", "tolerance": 1e-3}
    rows = [{**common, "relative_difference": 2e-4, "passed": True}]
    rows.append({**common, "name": "z", "relative_difference": 0.5, "passed": False})
    text = printed(built=True, engine=ENGINE, outputs=rows)
    assert "output y of the engine agrees with onnxruntime's: 2.0e-04" in text
    assert "output z of the engine DIFFERS from onnxruntime's: 5.0e-01" in text


def test_half_precision_has_a_line_of_its_own() -> None:
    half = {"difference": 7e-4, "tolerance": 2e-2, "same_top1": False}
    text = printed(precision="fp16", parity_fp16=half)
    assert "same top-1; largest difference 3.0e-07 of the largest value, 2e-05 allowed" in text
    assert "pruned, in half precision in onnxruntime, another top-1; largest difference 7.0e-04, 2e-02 allowed" in text
