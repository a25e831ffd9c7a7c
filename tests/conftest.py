"""Shared fixtures: the exports folder, its expected structures, and the real models where they are present."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for `import graphs`


@pytest.fixture(scope="session")
def exports() -> Path:
    """Folder of the small real exports."""
    return HERE / "exports"


@pytest.fixture(scope="session")
def expected(exports: Path) -> dict[str, dict[str, Any]]:
    """What each export was built with, by file name."""
    return json.loads((exports / "expected.json").read_text())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with `models/` and `data/` of real size: ONNXSNP_DATA, or `shared` beside the repository."""
    folder = Path(os.environ.get("ONNXSNP_DATA") or HERE.parent.parent / "shared")
    if not (folder / "models").is_dir():
        pytest.skip("no real models: set ONNXSNP_DATA to a folder with models/ and data/")
    return folder


@pytest.fixture(scope="session")
def real_models(real_data: Path) -> list[Path]:
    """The real models' files."""
    found = sorted((real_data / "models").rglob("*.onnx"))
    if not found:
        pytest.skip("the folder of real models holds no .onnx file")
    return found
