"""The paper's layer-wise ratios give the paper's cost on the DeiT shapes (SNP, ECCV 2024)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from onnxsnp.analysis import analyse_model
from onnxsnp.planning.allocation import from_file

# parameters (millions) and GMACs of the published models
BUDGETS = {
    "deit_tiny": ("deit_tiny", 3.01, 0.64),
    "deit_small": ("deit_small", 10.06, 2.04),
    "deit_small_1.3G": ("deit_small", 6.47, 1.27),
    "deit_base": ("deit_base", 31.59, 6.32),
}


@pytest.fixture(scope="module")
def make_deit() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "make_deit.py"
    spec = importlib.util.spec_from_file_location("make_deit", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_deit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("entry", BUDGETS)
def test_published_ratios_give_the_published_cost(entry: str, make_deit: ModuleType) -> None:
    reference = Path(__file__).parents[1] / "tools" / "snp_ratios.json"
    shape, params, macs = BUDGETS[entry]
    analysis = analyse_model(make_deit.make_deit(shape))
    counts = from_file(f"{reference}:{entry}", analysis.structure.groups)
    sizes = {analysis.groups[name].atom: kept for name, kept in counts.items()}
    assert analysis.cost.total("params", sizes) / 1e6 == pytest.approx(params, rel=0.01)
    assert analysis.cost.total("macs", sizes) / 1e9 == pytest.approx(macs, rel=0.01)
