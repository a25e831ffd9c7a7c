"""The coverage table: what a file's row says, what shares a row, and that a wrong cut would show."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import coverage as tool
import pytest

FAMILIES = Path(__file__).resolve().parents[1] / "exports" / "families"


def test_a_row_has_the_groups_their_error_and_the_reasons() -> None:
    row = tool.measure(FAMILIES / "hf_detr_ts17_dyn.onnx")
    assert (row.sites, row.cut["qk"], row.found["qk"]) == (3, 3, 3)
    assert (row.cut["residual"], row.found["residual"]) == (3, 4)
    assert row.error is not None and 0 < row.error < 1e-4
    assert any("put together by Concat" in reason for reason in row.reasons)
    text = tool.table([row])
    assert "qk, v, head, ffn, channel, residual 3/4" in text
    assert "put together by Concat" in text and "(at" not in text


def test_a_quantised_model_has_no_error_but_a_reason() -> None:
    row = tool.measure(FAMILIES / "format_static_quantised_vit.onnx")
    assert row.error is None and not row.cut and "quantise" in row.reasons[0]


def test_exports_of_one_source_that_are_treated_alike_share_a_row() -> None:
    one = tool.Row("a", "timm X", "opset 17", 2, Counter(qk=2), Counter(qk=2), 1e-7, ())
    same, other = replace(one, name="b", exporter="opset 18", error=3e-6), replace(one, name="c", sites=1)
    lines = tool.table([one, same, other]).splitlines()[2:]
    assert len(lines) == 2
    assert "opset 17, opset 18" in lines[0] and "3e-06" in lines[0]


def test_a_file_that_is_no_model_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.onnx").write_bytes(b"nothing")
    assert tool.main([str(tmp_path / "x.onnx")]) == 1
    assert "x.onnx" in capsys.readouterr().err
