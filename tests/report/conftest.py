"""Runs of the model in `models/`, made once for all tests of pages, and a browser to look at these."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from onnxsnp.pruning import prune
from onnxsnp.report.html import write_page

MODEL = Path(__file__).parents[2] / "models" / "deit_cifar10.onnx"


@pytest.fixture(scope="session")
def _run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("run")
    options = {"samples": 8, "threads": 1, "attention_maps": 2, "compensation": "refit", "scope": "qk,v,ffn,head"}
    result = prune(MODEL, 0.3, allocation="uniform", output=folder / "small.onnx", **options)
    return dict(result.record)


@pytest.fixture(scope="session")
def _allocated() -> dict[str, Any]:
    return dict(prune(MODEL, 0.3, samples=8, threads=1, dry_run=True, scope="qk,ffn").record)


@pytest.fixture
def run(_run: dict[str, Any]) -> dict[str, Any]:
    """The record of a run in which neurons and heads were ranked by their scores."""
    return copy.deepcopy(_run)


@pytest.fixture
def allocated(_allocated: dict[str, Any]) -> dict[str, Any]:
    """The record of a dry run whose widths come from error curves and sensitivities."""
    return copy.deepcopy(_allocated)


@pytest.fixture(scope="session")
def run_page(_run: dict[str, Any], _recovery: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that run, as if it had been recovered."""
    file = tmp_path_factory.mktemp("page") / "run.html"
    write_page([_run | {"recovery": _recovery}], file)
    return file


@pytest.fixture(scope="session")
def _recovery() -> dict[str, Any]:
    """What a record says about a recovery."""
    held = [{"loss": loss, "hidden": None, "outputs": {}, "agreement": 90.0 + step} for step, loss in enumerate((2, 1))]
    return {
        "curve": [
            {"step": 0, "seconds": 0.0, "training": None, "held": held[0]},
            {"step": 10, "seconds": 3.0, "training": 1.5, "held": held[1]},
        ],
        "before": held[0],
        "after": held[1],
        "best_step": 10,
        "steps": 10,
        "data": "32 images",
        "notes": ["more images would have helped"],
    }


class Opened:
    """A page in a browser, and what it said and asked for while it loaded."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.said: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def count(self, selector: str) -> int:
        return int(self.page.locator(selector).count())


@pytest.fixture(scope="session")
def _browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium here to open pages with")
    api = pytest.importorskip("playwright.sync_api", reason="no playwright here to drive a browser with")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(_browser: Any) -> Iterator[Callable[..., Opened]]:
    """Opens a file in a real browser; `width` in pixels, `scheme` light or dark."""
    contexts = []

    def opened(path: Path, width: int = 1200, scheme: str = "light") -> Opened:
        contexts.append(_browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}))
        found = Opened(contexts[-1].new_page())
        found.page.goto(path.resolve().as_uri())
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a record, or any data, as JSON."""

    def write(data: Any, name: str = "run.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(data))
        return path

    return write
