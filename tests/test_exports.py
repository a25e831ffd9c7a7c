"""Every small real export: the structure found, exact cuts, valid files, and a proof that notices wrong ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.errors import VerificationError
from onnxsnp.evaluation.verify import difference, masked, prove
from onnxsnp.graph.normalize import as_graph
from onnxsnp.planning.plan import Plan, as_cuts
from onnxsnp.pruning import prune
from onnxsnp.surgery.apply import Applied, apply, to_model

FOLDER = Path(__file__).resolve().parent / "exports"
FILES = sorted(path.name for path in FOLDER.glob("*.onnx"))
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())
KINDS = {
    "qk": ("qk",),
    "v": ("v",),
    "ffn": ("ffn",),
    "head": ("head",),
    "residual": ("residual",),
    "all": ("qk", "v", "ffn", "head", "residual"),
}

every_file = pytest.mark.parametrize("name", FILES, ids=[name.removesuffix(".onnx") for name in FILES])


@functools.cache
def analysed(name: str) -> Analysis:
    return analyse_model(FOLDER / name)


def feeds(name: str) -> list[dict[str, np.ndarray]]:
    """Inputs at batch 1 and 3 where the batch is free, else at the file's own."""
    held = EXPECTED[name]["input"]
    rng = np.random.default_rng(5)
    shape = held["shape"]
    sizes = (1, 3) if EXPECTED[name]["dynamic_batch"] else (shape[0],)
    return [{held["name"]: rng.standard_normal((size, *shape[1:])).astype(np.float32)} for size in sizes]


def plan_for(name: str, kind: str, least: int = 1) -> Plan:
    chosen = [group for group in analysed(name).structure.groups if group.kind in KINDS[kind]]
    return graphs.random_plan(chosen, np.random.default_rng([FILES.index(name), *kind.encode()]), least=least)


def test_expectations_cover_exactly_the_files() -> None:
    assert sorted(EXPECTED) == FILES


@every_file
def test_structure_is_what_the_model_was_built_with(name: str) -> None:
    found, want = analysed(name).structure, EXPECTED[name]
    assert found.skipped == []
    assert [(group.id, group.reasons) for group in found.groups if not group.prunable] == []
    assert len(found.sites) == want["sites"]
    for index in range(want["sites"]):
        qk, v, head = (found.group(kind, index) for kind in ("qk", "v", "head"))
        assert qk is not None and v is not None and head is not None
        assert (qk.size, qk.heads, v.size, v.heads) == (want["qk_size"], want["heads"], want["v_size"], want["heads"])
        assert (head.size, head.heads) == (want["heads"], 1)
    assert [group.size for group in found.groups if group.kind == "ffn"] == want["ffn"]
    assert [group.size for group in found.groups if group.kind == "residual"] == [want["width"]]
    assert {group.kind for group in found.groups} == set(KINDS["all"])


@every_file
@pytest.mark.parametrize("kind", KINDS)
def test_cut_model_equals_the_masked_original(name: str, kind: str) -> None:
    analysis = analysed(name)
    plan = plan_for(name, kind)
    applied = apply(analysis, plan)
    assert applied.cuts
    original = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, applied.cuts, {})
    assert difference(original, applied.graph, feeds(name), threads=1) < 1e-5
    sizes = {cut.atom: cut.keep.shape[1] for cut in applied.cuts}
    for group in analysis.structure.groups:  # each factor has the new size in every weight the cut graph kept a name of
        for weight, axis, _ in group.places:
            if group.atom in sizes and weight in applied.graph.weights:
                want = np.prod(
                    [
                        sizes.get(atom, analysis.dependencies.size(atom))
                        for atom in analysis.dependencies.atoms(weight, axis)
                    ]
                )
                assert applied.graph.weights[weight].shape[axis] == want


@every_file
def test_normalised_forms_equal_the_original(name: str) -> None:
    analysis = analysed(name)
    original = as_graph(analysis.model)
    for form in (analysis.normalized.base, analysis.packed.graph, analysis.graph):
        assert difference(original, form, feeds(name), threads=1) < 1e-5


@every_file
def test_cut_file_is_valid_smaller_and_keeps_its_interface(name: str) -> None:
    analysis = analysed(name)
    before = onnx.load(str(FOLDER / name))
    before.metadata_props.add(key="classes", value="a, b")
    analysis = analyse_model(before)
    after = to_model(apply(analysis, plan_for(name, "all")).graph)
    onnx.checker.check_model(after, full_check=True)
    onnx.shape_inference.infer_shapes(after, check_type=True, strict_mode=True, data_prop=True)
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)
    assert list(after.metadata_props) == list(before.metadata_props)
    weights = [sum(array.nbytes for array in graphs.initializers(model).values()) for model in (before, after)]
    assert weights[1] < weights[0]


@every_file
def test_one_wrong_index_in_one_weight_fails_the_proof(name: str) -> None:
    kind = ("ffn", "v", "qk")[FILES.index(name) % 3]
    if kind == "qk" and "fresh" in name:
        kind = "v"  # its attention is uniform but for round-off, so query and key hardly show
    analysis = analysed(name)
    plan = plan_for(name, kind, least=2)
    entry = plan.groups[0]
    missing = next(index for index in range(entry.size) if index not in entry.keep[0])
    keep = [sorted([*entry.keep[0][1:], missing]), *entry.keep[1:]]
    other = Plan(plan.model, [graphs.keeping(analysis.groups[entry.id], keep), *plan.groups[1:]])
    right, wrong = apply(analysis, plan), apply(analysis, other)
    matrix = next(
        weight
        for weight, array in right.graph.weights.items()
        if array.ndim > 1 and not np.array_equal(array, wrong.graph.weights.get(weight, array))
    )
    assert prove(analysis, right, feeds(name), 1).passed
    graph = right.graph.copy()
    graph.weights[matrix] = wrong.graph.weights[matrix]
    with pytest.raises(VerificationError, match="differs from the masked original"):
        prove(analysis, Applied(graph, right.cuts, {}), feeds(name), 1)


@every_file
def test_nothing_cut_returns_the_model_unchanged(name: str) -> None:
    result = prune(analysed(name), 0.0, samples=1, calibration=_samples(name), threads=1)
    source = onnx.load(str(FOLDER / name))
    assert result.model is not None
    assert list(result.model.graph.node) == list(source.graph.node)
    before, after = graphs.initializers(source), graphs.initializers(result.model)
    assert list(before) == list(after)
    assert all(np.array_equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert result.record["after"]["macs"] == result.record["before"]["macs"]


def _samples(name: str) -> list[dict[str, np.ndarray]]:
    """Two batches of calibration inputs at the file's own batch size."""
    held = EXPECTED[name]["input"]
    rng = np.random.default_rng(9)
    return [{held["name"]: rng.standard_normal(held["shape"]).astype(np.float32)} for _ in range(2)]


@every_file
def test_planted_dead_neurons_are_found_and_cost_nothing(name: str) -> None:
    analysis = analysed(name)
    rng = np.random.default_rng(FILES.index(name))
    planted = []
    for group in analysis.structure.groups:
        if group.kind in ("qk", "v", "ffn"):
            kept = group.size - group.size // 4
            keep = [sorted(rng.permutation(group.size)[:kept].tolist()) for _ in range(group.heads)]
            planted.append(graphs.keeping(group, keep))
    cuts = as_cuts(Plan("", planted), analysis.groups)
    graph = masked(analysis.normalized.base, analysis.graph, analysis.dependencies, cuts, {})
    model = graph.to_proto()
    result = prune(
        model, 0.25, allocation="uniform", compensation="none", samples=1, calibration=_samples(name), threads=1
    )
    assert {entry.id: entry.keep for entry in result.plan.groups} == {entry.id: entry.keep for entry in planted}
    assert result.model is not None
    for feed in feeds(name):
        for want, got in zip(graphs.run(model, feed), graphs.run(result.model, feed), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
