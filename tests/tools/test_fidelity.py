"""The fidelity bench: which cells there are, at which cost, and that a result is reused only where it may be."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import bench_fidelity
import graphs
import numpy as np
import onnx
import pytest
from fidelity_results import Cell, Results, Run, digest_of_data, table
from fidelity_rows import Row, chosen, has_published_shape, rows_for
from make_deit import make_deit

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.errors import PlanError


@pytest.fixture(scope="module")
def deit_tiny() -> Analysis:
    return analyse_model(make_deit("deit_tiny"))


def test_the_published_rows_cost_what_they_say(deit_tiny: Analysis) -> None:
    rows = {row.title: row for row in rows_for(deit_tiny)}
    ratios, budget = rows["published ratios, residual uncut"], rows["0.64 GMACs, residual uncut"]
    spent = {
        row.title: deit_tiny.cost.total(
            "macs",
            {deit_tiny.groups[name].atom: kept for name, kept in bench_fidelity.fixed_widths(deit_tiny, row).items()},
        )
        for row in (ratios, budget)
    }
    assert spent[budget.title] / 1e9 == pytest.approx(0.64, rel=1e-3)
    assert 1 - spent[ratios.title] / deit_tiny.cost.total("macs") == pytest.approx(0.38, abs=0.01)
    widths = bench_fidelity.fixed_widths(deit_tiny, ratios)
    assert (widths["qk.0"], widths["v.5"], widths["ffn.11"], len(widths)) == (39, 19, 383, 36)


def test_other_models_have_no_published_rows() -> None:
    analysis = analyse_model(graphs.transformer())
    assert not has_published_shape(analysis)
    assert [row.title for row in rows_for(analysis)][-1] == "all, 60 % of MACs"


def test_cells_are_empty_where_a_method_has_no_answer() -> None:
    ffn, all_three = Row("ffn", ("ffn",), ratio=0.5), Row("all", ("qk", "v", "ffn"), share=0.3)
    given = Row("given", ("qk", "v", "ffn"), counts={})
    table = {
        one: [bench_fidelity.applies(one, row) for row in (ffn, all_three, given)] for one in bench_fidelity.METHODS
    }
    assert table.pop("VBP") == [True, False, False]
    assert table.pop("full, auto") == [False, True, False]
    assert table.pop("no rotation of query and key") == table.pop("no rotation of values") == [False, True, True]
    assert table.pop("no rotation of the residual") == [False, False, False]
    assert all(all(cells) for cells in table.values()) and len(table) == 8


def test_rows_and_methods_are_chosen_by_parts_of_their_names() -> None:
    assert chosen(["query-key 50 %", "value 50 %", "FFN 50 %"], ["ffn", "key"], "row") == ["query-key 50 %", "FFN 50 %"]
    assert chosen(["none", "refit"], None, "method") == ["none", "refit"]
    with pytest.raises(PlanError, match="no method has 'corb' in its name; there are: none; refit"):
        chosen(["none", "refit"], ["refit", "CORB"], "method")


def options_for(folder: Path, *extra: str) -> argparse.Namespace:
    """A small model and data for it, as the command line would name them."""
    model = graphs.transformer(blocks=1)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "fit.npz", **graphs.inputs_for(model, 40, 1))
    np.savez(folder / "val.npz", **graphs.inputs_for(model, 24, 2), labels=np.arange(24) % 5)
    files = ["--model", "model.onnx", "--calibration", "fit.npz", "--data", "val.npz", "--out", "out.json"]
    paths = [str(folder / part) if "." in part else part for part in files]
    return bench_fidelity.parse([*paths, "--samples", "16", "--unseen", "8", *extra])


def test_a_second_run_measures_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[str, list[str]]] = []
    whole = bench_fidelity.measure_row

    def counted(bench: Any, row: Row, methods: list[str], *rest: Any) -> None:
        measured.append((row.title, list(methods)))
        whole(bench, row, methods, *rest)

    def fill(*extra: str) -> Run:
        options = options_for(tmp_path, *extra)
        return bench_fidelity.fill(options, Results(options.out))

    monkeypatch.setattr(bench_fidelity, "measure_row", counted)
    fill("--rows", "FFN", "30 %", "--methods", "none", "VBP")
    assert measured == [("FFN 50 %", ["none", "VBP"]), ("all, 30 % of MACs", ["none"])]
    measured.clear()
    run = fill("--rows", "FFN", "30 %", "--methods", "none", "CORP", "auto")
    corp = ["CORP", "CORP, weighted"]
    assert measured == [("FFN 50 %", corp), ("all, 30 % of MACs", [*corp, "full, auto"])]
    assert [cell.macs for cell in run.cells if cell.row["share"]] == pytest.approx([0.3] * 4, abs=0.01)
    measured.clear()
    run = fill("--rows", "key", "--methods", "none")
    assert list(dict.fromkeys(cell.row["title"] for cell in run.cells))[::3] == ["query-key 50 %", "all, 30 % of MACs"]
    measured.clear()
    fill("--rows", "FFN", "--methods", "none", "--eval-samples", "16")
    assert measured == [("FFN 50 %", ["none"])]
    held = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert [len(run["cells"]) for run in held] == [10, 1]
    assert [run["dense"]["count"] for run in held] == [24, 16]


def test_a_change_of_the_methods_makes_old_results_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_for(tmp_path, "--rows", "FFN", "--methods", "none")
    first = bench_fidelity.fill(options, Results(options.out))
    monkeypatch.setattr(bench_fidelity, "digest_of_sources", lambda files: "edited")
    second = bench_fidelity.fill(options, Results(options.out))
    assert second.settings != first.settings and len(Results(options.out).runs) == 2


def test_the_sources_are_the_package_and_the_rules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []
    monkeypatch.setattr(bench_fidelity, "digest_of_sources", lambda files: seen.extend(file.name for file in files))
    bench_fidelity.settings(options_for(tmp_path), analyse_model(graphs.transformer(blocks=1)))
    assert {"rivals.py", "bench_fidelity.py", "ffn.py", "statistics.py", "apply.py"} <= set(seen)


def test_data_is_known_by_its_content(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    one, same, other = (digest_of_data(tmp_path / name) for name in "abc")
    assert one == same != other
    folder = digest_of_data(tmp_path)
    (tmp_path / "d").write_text("")
    assert digest_of_data(tmp_path) != folder


def test_a_cell_is_found_only_for_the_same_cut(tmp_path: Path) -> None:
    row, wider = Row("x", ("qk",), share=0.3), Row("x", ("qk", "v"), share=0.3)
    results = Results(tmp_path / "held.json")
    results.run({"samples": 1}).cells.append(Cell(row.definition(), "none", {"top1": 1.0}, 0.3, 0.1))
    results.save()
    run = Results(tmp_path / "held.json").run({"samples": 1})
    assert run.find(row.definition(), "none") is not None
    assert run.find(wider.definition(), "none") is None and run.find(row.definition(), "refit") is None


def test_the_table_leaves_what_was_not_measured_empty() -> None:
    rows = [Row("one", ("ffn",), ratio=0.5).definition(), Row("two", ("qk",), ratio=0.5).definition()]
    cells = [Cell(rows[0], "b", {"top1": 70.0}, 0, 0), Cell(rows[0], "a", {"top1": 60.5}, 0, 0)]
    run = Run({"samples": 8}, {"top1": 80.0, "count": 9}, [*cells, Cell(rows[1], "a", {"top1": 81.0}, 0, 0)])
    redefined = {**rows[1], "ratio": 0.7}
    run.cells.append(Cell(redefined, "b", {"top1": 50.0}, 0, 0))
    assert table(run, ["a", "b", "c"]).splitlines() == [
        "top-1 (points lost) on 9 images; dense 80.00 %; 8 calibration images",
        "",
        "| cut | a | b |",
        "|---|---|---|",
        "| one | 60.50 (19.50) | 70.00 (10.00) |",
        "| two | 81.00 (-1.00) | – |",
        "| two | – | 50.00 (30.00) |",
    ]
