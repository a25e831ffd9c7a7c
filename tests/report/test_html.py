"""The page of a run opens in a browser, is whole, and lets nothing in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from onnxsnp.cli import app
from onnxsnp.report import extra
from onnxsnp.report.extra import ReportError
from onnxsnp.report.html import page, read_records, write_page

HOSTILE = "</code><script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (360, "light")])
def test_the_page_of_a_run_is_whole(
    run: dict[str, Any], run_page: Path, open_page: Any, width: int, scheme: str
) -> None:
    file = run_page
    assert file.stat().st_size < 5e6
    opened = open_page(file, width, scheme)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("data:", file.as_uri()))] == []
    cut = [group for group in run["groups"] if group["after"] < group["before"]]
    assert opened.count("figure[data-plot=scores] svg") == len(cut) > 18
    assert opened.count("figure[data-plot=recovery] svg") == 1
    assert opened.count(".cell") == len(run["groups"])
    assert opened.count("figure[data-plot=attention]") == 6 and opened.count("figure[data-plot=rollout] img") == 2 * 3
    loaded = "[...document.images].every((one) => one.complete && one.naturalWidth > 0)"
    assert opened.page.evaluate(loaded) and opened.page.evaluate("document.images.length") > 60
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    paper = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    ink = opened.page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert ink == opened.page.evaluate("getComputedStyle(document.body).color")


def test_hovering_over_a_group_says_why_it_has_its_width(run_page: Path, open_page: Any) -> None:
    opened = open_page(run_page)
    cell = opened.page.locator(".cell.k-ffn").first
    assert not cell.locator(".tip").is_visible()
    cell.hover()
    text = cell.locator(".tip").inner_text()
    assert cell.locator(".tip").is_visible() and "ffn.0" in text and "scores from" in text


def test_error_curves_and_sensitivities_are_drawn_with_the_chosen_width(
    allocated: dict[str, Any], tmp_path: Path, open_page: Any
) -> None:
    file = tmp_path / "run.html"
    write_page([allocated], file)
    opened = open_page(file)
    assert opened.count("figure[data-plot=curve] svg") == 12 and opened.count("figure[data-plot=sensitivity] svg") == 1
    group = next(one for one in allocated["groups"] if one["id"] == "qk.2")
    titles = opened.page.locator("figure[data-plot=curve] svg").all_text_contents()
    assert any(f"qk.2: 32 → {group['after']}" in title for title in titles)
    assert "a dry run, no model was written" in opened.page.inner_text("body")


def test_several_runs_are_compared(run: dict[str, Any], tmp_path: Path, open_page: Any) -> None:
    del run["details"]
    worse = run | {"output": "worse.onnx", "agreement": run["agreement"] | {"top1": 1.0}}
    file = tmp_path / "runs.html"
    write_page([run, worse], file)
    opened = open_page(file)
    assert opened.said == [] and opened.count("figure[data-plot=tradeoff] svg") == 2
    assert opened.count("article") == 2 and "worse" in opened.page.inner_text("table >> nth=0")


def test_the_runs_of_a_sweep_are_compared_and_the_best_shown_whole(
    run: dict[str, Any], written: Callable[..., Path]
) -> None:
    run |= {"details": {}, "attention": None}
    for index in range(9):  # each costs less and is as good or worse; those after the sixth are beaten
        macs, top1 = (100 - 10 * index, 90 - index) if index < 6 else (95, 10)
        changed = {"before": run["before"] | {"macs": 100}, "after": run["after"] | {"macs": macs}}
        changed |= {"output": f"p{index}.onnx", "agreement": run["agreement"] | {"top1": top1}}
        written(run | changed, f"p{index}.json")
    names = [*(f"p{index}" for index in range(9)), "sweep"]  # a sweep that names itself is not read twice
    rows = [*({"name": name, "error": None} for name in names), {"name": "absent", "error": "too much"}]
    sweep = written({"rows": rows, "verdict": ""}, "sweep.json")
    records = read_records([sweep, sweep.with_name("p3.json")])
    assert len(records) == 9
    text = page(records)
    assert "9 pruned models" in text and text.count("<article") == 6 and "<h1>p7</h1>" not in text


def test_names_from_a_file_are_text(run: dict[str, Any], tmp_path: Path, open_page: Any) -> None:
    first = next(group for group in run["groups"] if group["kind"] == "ffn")
    run["details"] = {HOSTILE: run["details"][first["id"]]}
    first["id"] = HOSTILE
    run["left_alone"] = [{"node": HOSTILE, "reason": HOSTILE}]
    run["attention"]["sites"][0]["name"] = HOSTILE
    run |= {"input": HOSTILE, "notes": [HOSTILE], "inputs": {HOSTILE: [1, HOSTILE]}}
    file = tmp_path / "run.html"
    write_page([run], file)
    opened = open_page(file)
    assert opened.said == [] and opened.count("script") == 0 and opened.count("img[src=x]") == 0
    assert opened.page.inner_text("body").count(HOSTILE) >= 5
    assert opened.count("figure[data-plot=scores] svg") == 1
    assert HOSTILE in "".join(opened.page.locator("figure[data-plot=scores] svg").all_text_contents())


def test_pictures_of_a_record_must_be_pictures(run: dict[str, Any]) -> None:
    run["details"] = {}
    run["attention"]["images"][0] = '" onload="alert(1)'
    with pytest.raises(ReportError, match="no run record"):
        page([run])


@pytest.mark.parametrize(
    "data",
    [[], 3, {}, {"plan": {}}, {"before": 1, "after": 2, "groups": [], "settings": {}}, {"sites": [], "groups": []}],
)
def test_a_foreign_json_is_one_clear_line(written: Callable[..., Path], data: Any) -> None:
    with pytest.raises(ReportError, match=r"run\.json is no run record"):
        read_records([written(data)])


def test_what_is_no_json_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    for text in ("{", '{"x": NaN}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(ReportError, match="it is not JSON"):
            read_records([file])
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="it is not JSON"):
        read_records([file])
    with pytest.raises(ReportError, match="No such file"):
        read_records([tmp_path / "absent.json"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("groups", [{"id": "qk.0"}]),
        ("before", {"params": "many", "macs": 1, "bytes": 2}),
        ("latency", {"speedup": 2}),
        ("details", {"ffn.0": {"curve": 3}}),
        ("steps", [{}]),
        ("seconds", {"analyse": "long"}),
    ],
)
def test_a_record_with_something_else_in_a_field_is_one_clear_line(run: dict[str, Any], field: str, value: Any) -> None:
    with pytest.raises(ReportError, match=r"no run record does|cannot be shown"):
        page([run | {"details": {}, field: value}])


def test_an_old_record_has_a_page(run: dict[str, Any]) -> None:
    for field in ("details", "left_alone", "sites", "inputs", "attention", "steps", "planned_for", "target", "latency"):
        run.pop(field, None)
    text = page([run])
    assert "made by an earlier version" in text and "data-plot" not in text


def test_an_engine_record_is_shown_beside_its_run(run: dict[str, Any]) -> None:
    run["details"] = {}
    times = {"median": 3.25, "p90": 4.0, "p99": 5.0}
    engine = {
        "target": {"name": "jetson-nano"},
        "precision": "fp16",
        "backend": "ssh",
        "latency": {"before": {**times, "median": 6.5}, "after": times},
        "notes": [],
    }
    text = page([run, engine])
    assert "On jetson-nano, fp16" in text and "6.50 ms" in text and "3.25 ms" in text
    with pytest.raises(ReportError, match="no run record was given"):
        page([engine])


def test_the_command_writes_the_page(run: dict[str, Any], written: Callable[..., Path], tmp_path: Path) -> None:
    run["details"] = {}
    record, file = written(run), tmp_path / "page.html"
    result = CliRunner().invoke(app, ["report", str(record), "-o", str(file)])
    assert result.exit_code == 0 and "<!DOCTYPE html>" in file.read_text()
    before = record.read_text()
    result = CliRunner().invoke(app, ["report", str(record), "-o", str(record)])
    assert result.exit_code == 1 and record.read_text() == before


def test_a_missing_library_is_one_clear_line_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(extra.importlib, "import_module", absent)
    with pytest.raises(ReportError, match=r"pages need jinja2.*pip install 'onnxsnp\[report\]'"):
        extra.check_installed()
    page_file = tmp_path / "page.html"
    result = CliRunner().invoke(app, ["prune", str(tmp_path / "absent.onnx"), "-r", "0.3", "--report", str(page_file)])
    assert result.exit_code == 1 and not page_file.exists()
