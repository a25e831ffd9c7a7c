"""Every architecture and exporter of tests/exports/families: what is found, what is not cut and why, exact cuts.

Beside each `NAME.onnx` lies `NAME.json`, written by hand from the architecture:

- `source`, `exporter`: where the file comes from.
- `inputs`: by name `{"shape", "type"}`, and for integers `"below"` (exclusive); `"mask": true` marks a padding mask;
  `"length"` is an axis whose size is free and may be tried larger, the same in all inputs that have one.
- `dynamic_batch`: the leading axis of every input is free.
- `sites`: number of attention sites.
- `groups`: number of prunable groups by kind; kinds that are not there are 0.
- `fixed`: by kind, parts of the reasons of groups that are found but not cut; kinds that are not there have none.
- `skipped`: parts of the reasons of what is skipped, in order.
- `tolerance`: of differences, relative to the largest output, where half precision or integers need more.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.calibration.data import open_dataset
from onnxsnp.calibration.lengths import settled
from onnxsnp.evaluation.verify import difference, masked
from onnxsnp.graph.inputs import graph_inputs
from onnxsnp.graph.normalize import as_graph
from onnxsnp.model import load
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.pruning import prune
from onnxsnp.surgery.apply import apply, to_model

FOLDER = Path(__file__).resolve().parent / "exports" / "families"
FILES = sorted(path.name for path in FOLDER.glob("*.onnx"))
KINDS = ("qk", "v", "ffn", "head", "channel", "residual")
TOLERANCE = 2e-5

every_file = pytest.mark.parametrize("name", FILES, ids=[name.removesuffix(".onnx") for name in FILES])


@functools.cache
def analysed(name: str) -> Analysis:
    return analyse_model(FOLDER / name)


@functools.cache
def expected(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / name).with_suffix(".json").read_text())
    return found


def feed(name: str, batch: int | None = None, longer: int = 0) -> dict[str, np.ndarray]:
    """Random inputs that fit, the same for the same sizes; `batch` replaces the leading axis, lengths are `longer`."""
    rng = np.random.default_rng(batch or 0)
    found = {}
    for tensor, spec in expected(name)["inputs"].items():
        shape = [batch, *spec["shape"][1:]] if batch else list(spec["shape"])
        if "length" in spec:
            shape[spec["length"]] += longer
        if spec.get("mask"):
            array = np.ones(shape)
            array[0, shape[-1] - 1 :] = 0  # one sample is shorter
        elif "below" in spec:
            array = rng.integers(0, spec["below"], shape)
        else:
            array = rng.standard_normal(shape)
        found[tensor] = np.asarray(array).astype(spec["type"])
    return found


def feeds(name: str) -> list[dict[str, np.ndarray]]:
    found = [feed(name, 1), feed(name, 3)] if expected(name)["dynamic_batch"] else [feed(name)]
    if any("length" in spec for spec in expected(name)["inputs"].values()):
        found.append(feed(name, longer=3))
    return found


def tolerance(name: str) -> float:
    return float(expected(name).get("tolerance", TOLERANCE))


def weight_bytes(model: onnx.ModelProto) -> int:
    """Operators that stood for several make the rest of a file larger, but never its weights."""
    return sum(array.nbytes for array in as_graph(load(model)).weights.values())


def plan_for(name: str, kinds: tuple[str, ...]) -> Plan:
    chosen = [group for group in analysed(name).structure.groups if group.kind in kinds and group.prunable]
    rng = np.random.default_rng([*name.encode(), *"".join(kinds).encode()])
    plan = graphs.random_plan([group for group in chosen if group.kind != "residual"], rng)
    # of a stream of one channel a normalisation leaves nothing but rounding
    residual = graphs.random_plan([group for group in chosen if group.kind == "residual"], rng, least=2)
    return Plan(plan.model, plan.groups + residual.groups)


def test_each_file_has_its_expectations() -> None:
    assert [path.stem for path in sorted(FOLDER.glob("*.json"))] == [name.removesuffix(".onnx") for name in FILES]


@every_file
def test_structure_is_what_the_architecture_has(name: str) -> None:
    found, want = analysed(name).structure, expected(name)
    assert len(found.sites) == want["sites"]
    assert dict(Counter(group.kind for group in found.groups if group.prunable)) == want["groups"]
    fixed = {
        kind: [group.reasons for group in found.groups if group.kind == kind and not group.prunable] for kind in KINDS
    }
    assert {kind for kind, reasons in fixed.items() if reasons} == set(want.get("fixed", {}))
    for kind, part in want.get("fixed", {}).items():
        assert all(any(part in reason for reason in reasons) for reasons in fixed[kind]), fixed[kind]
    assert len(found.skipped) == len(want.get("skipped", []))
    for skipped, part in zip(found.skipped, want.get("skipped", []), strict=True):
        assert part in skipped.reason


@every_file
@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_cut_model_equals_the_masked_original(name: str, kind: str) -> None:
    kinds = KINDS if kind == "all" else (kind,)
    if not set(kinds) & expected(name)["groups"].keys():
        pytest.skip(f"no {kind} group to cut, by its expectations")
    analysis = analysed(name)
    applied = apply(analysis, plan_for(name, kinds))
    assert applied.cuts
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, feeds(name), threads=1) < tolerance(name)


@every_file
def test_normalised_forms_equal_the_original(name: str) -> None:
    analysis = analysed(name)
    original = as_graph(analysis.model)
    for form in (analysis.normalized.base, analysis.packed.graph, analysis.graph):
        assert difference(original, form, feeds(name), threads=1) < tolerance(name)


@every_file
def test_cut_file_is_valid_smaller_and_keeps_its_interface(name: str) -> None:
    before = onnx.load(str(FOLDER / name))
    plan = plan_for(name, KINDS)
    if not plan.groups:
        pytest.skip("nothing to cut, by its expectations")
    after = to_model(apply(analysed(name), plan).graph)
    onnx.checker.check_model(after)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert weight_bytes(after) < weight_bytes(before)


@every_file
def test_planted_dead_neurons_are_found_and_cost_nothing(name: str) -> None:
    analysis = analysed(name)
    rng = np.random.default_rng(list(name.encode()))
    planted = []
    for group in analysis.structure.groups:
        if group.kind in ("qk", "v", "ffn") and group.prunable and group.size > 1:
            kept = max(1, group.size - group.size // 4)
            keep = [sorted(rng.permutation(group.size)[:kept].tolist()) for _ in range(group.heads)]
            planted.append(graphs.keeping(group, keep))
    if not planted:
        pytest.skip("nothing to cut, by its expectations")
    cuts = as_cuts(Plan("", planted), analysis.groups)
    model = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, cuts, {}).to_proto()
    result = prune(
        model,
        0.25,
        allocation="uniform",
        compensation="none",
        samples=1,
        calibration=[feed(name), feed(name)],
        threads=1,
    )
    assert result.model is not None
    for inputs in feeds(name):
        for want, got in zip(graphs.run(model, inputs), graphs.run(result.model, inputs), strict=True):
            loose = tolerance(name) / TOLERANCE
            np.testing.assert_allclose(got, want, rtol=1e-4 * loose, atol=1e-5 * loose * np.abs(want).max())


@every_file
def test_generated_inputs_fit_the_model(name: str) -> None:
    session = analysed(name).original.session(threads=1)
    specs = settled(graph_inputs(analysed(name).graph), lambda inputs: session.run(None, inputs))
    batches = list(open_dataset(None, specs, samples=4, batch_size=2))
    assert all(np.isfinite(output).all() for batch in batches for output in session.run(None, batch.inputs))
    for tensor, spec in expected(name)["inputs"].items():
        values = np.concatenate([batch.inputs[tensor] for batch in batches])
        assert "below" not in spec or values.max() < spec["below"]
        assert not spec.get("mask") or set(np.unique(values)) == {0, 1}


@every_file
def test_full_compensation_runs_and_proves_its_work(name: str) -> None:
    if not {"qk", "v", "ffn"} & expected(name)["groups"].keys():
        pytest.skip("nothing to cut in the default scope, by its expectations")
    calibration = [feed(name) for _ in range(12)]
    result = prune(FOLDER / name, 0.3, allocation="uniform", samples=8, calibration=calibration, threads=1)
    assert result.record["verification"]["passed"]
    assert result.record["after"]["macs"] < result.record["before"]["macs"]
