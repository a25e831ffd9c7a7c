"""Plots are elements of a page: with its colours, ids of their own, and names as text."""

from __future__ import annotations

import re

import pytest

from onnxsnp.report.charts import Plotter, front

GROUP = {"id": "ffn.0", "kind": "ffn", "before": 8, "after": 3}
CURVE = {"width": [0, 3, 8], "error": [2.0, 1.0, 0.0]}


def test_a_plot_has_no_colour_of_its_own_and_loads_nothing() -> None:
    svg = Plotter().curve(GROUP, CURVE)
    assert svg.startswith("<svg") and svg.endswith("</svg>") and "<metadata" not in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}  # of the drawing's defs, which nothing shows
    assert "var(--ffn)" in svg and "currentColor" in svg
    assert not re.search(r"(?:href|src)=\"(?!#)", svg)


def test_plots_of_a_page_do_not_share_ids() -> None:
    plotter = Plotter()
    one, other = (set(re.findall(r'\bid="([^"]+)"', plotter.curve(GROUP, CURVE))) for _ in range(2))
    assert one and not one & other


@pytest.mark.parametrize("name", ["<script>", "$\\frac{1}{0}$", 'a" onload="b', "&amp;"])
def test_names_are_text(name: str) -> None:
    svg = Plotter().curve({**GROUP, "id": name}, CURVE)
    assert "<script" not in svg and f"{name}: 8 → 3" in __import__("html").unescape(svg)


def test_the_front_holds_what_no_other_beats() -> None:
    assert front([(1, 1), (2, 3), (3, 2), (2, 2), (4, 3)]) == {0, 1}
    assert front([(1, 1), (1, 1)]) == {0, 1}
