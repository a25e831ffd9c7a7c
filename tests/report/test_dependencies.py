"""The page of the dependency graph: what it finds is what the analysis says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import networkx as nx
import onnx
import pytest
from typer.testing import CliRunner

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.cli import app
from onnxsnp.report.dependencies import graph_data, write_page

MODEL = Path(__file__).parents[2] / "models" / "deit_cifar10.onnx"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    return analyse_model(MODEL)


def test_the_data_holds_every_place_and_every_tie_of_a_group(analysis: Analysis) -> None:
    data = graph_data(analysis)
    by_id = {one["id"]: one for one in data["components"] if one["id"]}
    assert by_id.keys() == {group.id for group in analysis.structure.groups}
    for group in analysis.structure.groups:
        found = by_id[group.id]
        places = [(data["names"][tensor], axis, position) for tensor, axis, position in found["places"]]
        assert sorted(places) == sorted(analysis.dependencies.places[group.atom])
        network = nx.Graph([(places[left], places[right]) for left, right, _ in found["ties"]])
        assert nx.utils.edges_equal(network.edges, analysis.dependencies.graph.subgraph(places).edges)


def test_a_tensor_leads_to_its_group_its_members_and_the_operators_between(
    analysis: Analysis, tmp_path: Path, open_page: Any
) -> None:
    file = tmp_path / "graph.html"
    write_page(analysis, file)
    assert file.stat().st_size < 1e6
    opened = open_page(file)
    page = opened.page
    page.fill("#search", "blocks.0.attn.proj.bias")
    page.locator("#results .item").first.click()
    assert page.locator("#detail h2").inner_text() == "blocks.0.attn.proj.bias"
    page.locator("#detail .item").first.click()
    assert page.locator("#detail h2").inner_text() == "residual"
    page.fill("#detail input", "blocks.5.norm1.bias")
    page.locator("#detail .item").first.click()
    shown = page.locator("#detail .chain .op").all_inner_texts()
    ends = (("blocks.0.attn.proj.bias", 0, 0), ("blocks.5.norm1.bias", 0, 0))
    assert len(shown) == len(analysis.dependencies.why(*ends)) > 5
    assert any(text.startswith("Add ") for text in shown) and "LayerNormalization" in shown[-1]
    page.fill("#search", "ffn.3")
    assert page.locator("#results .item").count() == 1
    page.click("[data-kind=qk]")
    assert page.locator("#results .item").count() == 6
    assert opened.said == [] and [url for url in opened.asked if not url.startswith(("data:", "file:"))] == []


def test_it_fits_a_narrow_screen(analysis: Analysis, tmp_path: Path, open_page: Any) -> None:
    file = tmp_path / "graph.html"
    write_page(analysis, file)
    opened = open_page(file, 360, "dark")
    opened.page.click("[data-kind=residual]")
    opened.page.locator("#results .item").first.click()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_hostile_name_is_shown_as_text(tmp_path: Path, open_page: Any) -> None:
    model = onnx.load_from_string(graphs.transformer().SerializeToString())
    old = model.graph.initializer[0].name
    model.graph.initializer[0].name = HOSTILE
    for node in model.graph.node:
        node.input[:] = [HOSTILE if name == old else name for name in node.input]
    file = tmp_path / "graph.html"
    write_page(analyse_model(model), file)
    opened = open_page(file)
    opened.page.fill("#search", "alert(1)")
    opened.page.locator("#results .item").first.click()
    assert HOSTILE in opened.page.locator("#detail h2").inner_text()
    assert opened.said == [] and opened.count("img") == 0 and opened.count("script") == 2


def test_inspect_writes_the_page_and_not_over_the_model(tmp_path: Path) -> None:
    file = tmp_path / "graph.html"
    result = CliRunner().invoke(app, ["inspect", str(MODEL), "--html", str(file), "--json"])
    assert result.exit_code == 0 and file.read_text().startswith("<!DOCTYPE html>")
    copy = tmp_path / "model.onnx"
    copy.write_bytes(MODEL.read_bytes())
    result = CliRunner().invoke(app, ["inspect", str(copy), "--html", str(copy)])
    assert result.exit_code == 1 and copy.read_bytes() == MODEL.read_bytes()
