"""The whole job: the number asked for, the record, plans that give the same file again, and requests refused."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp import pruning, timing
from onnxsnp.analysis import analyse_model
from onnxsnp.errors import OnnxSnpError, PlanError, VerificationError
from onnxsnp.planning.plan import Plan, fingerprint
from onnxsnp.pruning import PruneResult, prune

BIG: dict[str, Any] = {"blocks": 2, "heads": 4, "qk": 16, "v": 16, "width": 48, "ffn": 96, "tokens": 9}


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return graphs.transformer(**BIG)


def pruned(model: onnx.ModelProto, ratio: float | None = 0.3, **options: Any) -> PruneResult:
    options = {"calibration": graphs.calibration(model, 24), "samples": 16, **options}
    return prune(model, ratio, **options)


@pytest.fixture(scope="module")
def result(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> PruneResult:
    return pruned(model, output=tmp_path_factory.mktemp("out") / "small.onnx")


def outputs(model: onnx.ModelProto | None) -> np.ndarray:
    assert model is not None
    return graphs.run(model, graphs.inputs_for(model, 5, 77))[0]


def test_the_record_has_the_promised_fields(result: PruneResult) -> None:
    record = result.record
    assert json.loads(json.dumps(record))
    for side in ("before", "after"):
        assert {"params", "macs", "bytes"} <= record[side].keys() and min(record[side].values()) > 0
    assert all({"id", "kind", "before", "after"} <= group.keys() for group in record["groups"])
    assert record["verification"]["passed"] is True and record["verification"]["masked_equality"] < 1e-4
    assert record["agreement"]["samples"] > 0 and 0 < record["agreement"]["cosine"] <= 1
    assert record["seconds"] and all(value >= 0 for value in record["seconds"].values())


def test_the_output_and_its_record_are_written(result: PruneResult) -> None:
    path = Path(result.record["output"])
    assert sorted(os.listdir(path.parent)) == ["small.json", "small.onnx"]
    assert path.stat().st_size == result.record["after"]["bytes"] < result.record["before"]["bytes"]
    written = json.loads(path.with_suffix(".json").read_text())
    assert written["after"] == result.record["after"] and written["plan"]["groups"]
    np.testing.assert_array_equal(outputs(onnx.load(str(path))), outputs(result.model))


@pytest.mark.parametrize("what", ["macs", "params"])
@pytest.mark.parametrize("ratio", [0.2, 0.3, 0.5])
def test_the_share_that_was_asked_for_is_what_the_file_lacks(model: onnx.ModelProto, ratio: float, what: str) -> None:
    found = pruned(model, ratio, of=what, compensation="none", criterion="l2")
    assert found.model is not None
    totals = [analyse_model(one).cost.total(what) for one in (model, found.model)]
    assert 1 - totals[1] / totals[0] == pytest.approx(ratio, rel=0.01)
    assert [round(total) for total in totals] == [found.record[side][what] for side in ("before", "after")]


def by_macs(*options: Any) -> Any:
    """Stands in for the timer: a machine that does a million multiply-accumulates in 1 ms."""

    def timed(models: Any, progress: Any = None) -> np.ndarray:
        return np.asarray([[analyse_model(one.graph.to_proto()).cost.total("macs") / 1e6 for one in models]])

    return timed


def measured(speedup: float) -> Any:
    """Stands in for the measurement of both models."""
    return lambda *args, **options: {"before_ms": speedup, "after_ms": 1.0, "speedup": speedup, "rounds": 1, "batch": 1}


@pytest.mark.parametrize("compensation", ["none", "full"])
def test_the_share_of_latency_that_was_asked_for_is_what_the_table_gives(
    model: onnx.ModelProto, compensation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "local_timer", by_macs)
    monkeypatch.setattr(timing, "compare_latency", measured(1 / 0.7))
    options: dict[str, Any] = {"of": "latency", "compensation": compensation, "latency_table": tmp_path / "t.json"}
    found = pruned(model, 0.3, **options)
    before, after = (found.record[side]["macs"] for side in ("before", "after"))
    assert 1 - after / before == pytest.approx(0.3, rel=0.011)
    assert found.record["latency"]["expected_speedup"] == pytest.approx(before / after)
    assert found.record["settings"]["of"] == "latency" and "measure layers" in found.record["seconds"]
    assert not any("latency" in note for note in found.record["notes"])
    monkeypatch.setattr(pruning, "local_timer", None)  # the file is used from here on
    assert pruned(model, 0.3, dry_run=True, **options).plan.groups == found.plan.groups


@pytest.mark.parametrize(("speedup", "noted"), [(1 / 0.66, False), (1 / 0.76, True), (1.0, True), (1 / 0.6, True)])
def test_a_saving_that_is_not_the_one_asked_for_is_noted(
    model: onnx.ModelProto, speedup: float, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "local_timer", by_macs)
    monkeypatch.setattr(timing, "compare_latency", measured(speedup))
    notes = pruned(model, 0.3, of="latency", compensation="none", criterion="l2").record["notes"]
    told = [note for note in notes if "the table expected 30." in note or "the table expected 29." in note]
    assert len(told) == noted and all(f"measured are {1 - 1 / speedup:.1%}" in note for note in told)


def test_times_of_another_machine_are_not_compared(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "local_timer", by_macs)
    monkeypatch.setattr(timing, "compare_latency", measured(1.0))
    options: dict[str, Any] = {"of": "latency", "compensation": "none", "latency_table": tmp_path / "t.json"}
    pruned(model, 0.3, dry_run=True, **options)
    data = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**data, "machine": "a Jetson"}))
    notes = pruned(model, 0.3, **options).record["notes"]
    assert any(note.startswith("latency was planned for a Jetson, and measured on ") for note in notes)
    assert not any("the table expected" in note for note in notes)


def test_every_cut_model_is_timed_beside_the_original(result: PruneResult, model: onnx.ModelProto) -> None:
    found = result.record["latency"]
    assert min(found["before_ms"], found["after_ms"], found["speedup"]) > 0 and found["rounds"] >= 1
    assert found["batch"] == 1 and "cpu" in found["machine"] and "expected_speedup" not in found
    assert "time" in result.record["seconds"]
    assert "latency" not in pruned(model, latency=False).record
    assert "latency" not in pruned(model, dry_run=True).record
    assert "latency" not in pruned(model, 0.0).record


@pytest.mark.parametrize("allocation", ["uniform", "plan"])
def test_what_is_not_allocated_needs_no_table(
    model: onnx.ModelProto, allocation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "local_timer", None)
    plan = pruned(model, dry_run=True, allocation="uniform").plan if allocation == "plan" else None
    options = {"plan": plan} if plan is not None else {"allocation": allocation}
    assert "measure layers" not in pruned(model, None if plan else 0.3, of="latency", **options).record["seconds"]


def test_uniform_allocation_takes_the_same_share_of_each_group(model: onnx.ModelProto) -> None:
    record = pruned(model, 0.25, allocation="uniform", scope="qk,ffn").record
    sizes = {group["id"]: (group["before"], group["after"]) for group in record["groups"]}
    assert sizes["qk.0"] == (16, 12) and sizes["ffn.1"] == (96, 72)
    assert sizes["v.0"] == (16, 16) and sizes["residual"] == (48, 48)


def test_ratios_from_a_file_need_no_ratio(model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "ratios.json").write_text(json.dumps({"query_key": [0.5, 0.25], "residual": 0.25}))
    record = pruned(model, None, allocation=str(tmp_path / "ratios.json"), compensation="none").record
    after = {group["id"]: group["after"] for group in record["groups"]}
    assert (after["qk.0"], after["qk.1"], after["residual"], after["ffn.0"]) == (8, 12, 36, 96)


def test_sizes_are_rounded_to_multiples(model: onnx.ModelProto) -> None:
    record = pruned(model, 0.4, allocation="uniform", multiple_of=8).record
    assert all(group["after"] % 8 == 0 for group in record["groups"])


def test_a_ratio_of_zero_changes_nothing(model: onnx.ModelProto) -> None:
    found = pruned(model, 0.0)
    assert found.plan.groups == [] and found.model is not None
    assert list(found.model.graph.node) == list(model.graph.node)
    np.testing.assert_array_equal(outputs(found.model), outputs(model))


@pytest.mark.parametrize("criterion", ["snp", "l2", "gm", "random", "reverse"])
def test_every_criterion_prunes(model: onnx.ModelProto, criterion: str) -> None:
    found = pruned(
        model, 0.3, criterion=criterion, compensation="none", scope="qk,v,ffn,residual", allocation="uniform"
    )
    assert found.record["verification"]["passed"] and found.record["settings"]["criterion"] == criterion


def test_snp_and_its_reverse_keep_different_neurons(model: onnx.ModelProto) -> None:
    kept = [
        {
            entry.id: entry.keep
            for entry in pruned(
                model, 0.5, allocation="uniform", criterion=criterion, compensation="none", dry_run=True
            ).plan.groups
        }
        for criterion in ("snp", "reverse")
    ]
    assert kept[0].keys() == kept[1].keys() and all(kept[0][name] != kept[1][name] for name in kept[0])


def test_the_seed_decides_what_chance_decides(model: onnx.ModelProto) -> None:
    plans = [pruned(model, 0.3, criterion="random", seed=seed, dry_run=True).plan.groups for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_the_same_request_gives_the_same_file(model: onnx.ModelProto) -> None:
    files = [pruned(model).model for _ in range(2)]
    assert files[0] is not None and files[1] is not None
    assert files[0].SerializeToString(deterministic=True) == files[1].SerializeToString(deterministic=True)


@pytest.mark.parametrize("compensation", ["none", "refit"])
def test_a_plan_gives_the_same_file_again(model: onnx.ModelProto, compensation: str, tmp_path: Path) -> None:
    first = pruned(model, compensation=compensation, output=tmp_path / "first.onnx")
    sources = [first.plan, tmp_path / "first.json"]
    (tmp_path / "plan.json").write_text(first.plan.to_json())
    for plan in [*sources, tmp_path / "plan.json"]:
        again = pruned(model, None, plan=plan, compensation=compensation)
        assert again.model is not None and first.model is not None
        assert again.model.SerializeToString(deterministic=True) == first.model.SerializeToString(deterministic=True)
        assert again.record["after"] == first.record["after"]


def test_a_plan_of_another_model_is_refused(model: onnx.ModelProto) -> None:
    plan = pruned(model, dry_run=True).plan
    with pytest.raises(PlanError, match="made for another model"):
        pruned(graphs.transformer(**BIG, seed=5), None, plan=plan)


def test_a_dry_run_plans_and_writes_nothing(model: onnx.ModelProto, tmp_path: Path) -> None:
    found = pruned(model, dry_run=True, output=tmp_path / "out.onnx")
    assert found.model is None and found.plan.groups and os.listdir(tmp_path) == []
    real = pruned(model)
    assert found.plan.groups == real.plan.groups
    assert found.record["after"]["macs"] == real.record["after"]["macs"]


def test_the_refit_comes_closer_than_the_selection(model: onnx.ModelProto) -> None:
    gaps = []
    for compensation in ("none", "refit"):
        found = pruned(
            model,
            0.5,
            allocation="uniform",
            scope="v,ffn",
            compensation=compensation,
            samples=200,
            calibration=graphs.calibration(model, 240),
        )
        gaps.append(np.linalg.norm(outputs(found.model) - outputs(model)))
    assert gaps[1] < 0.8 * gaps[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qkv": "flat"},
        {"qkv": "packed", "v": 4},
        {"gate": "pair"},
        {"gate": "packed", "qkv": "flat"},
        {"activation": "gelu_tanh"},
        {"opset": 11},
        {"scale": "shape"},
    ],
    ids=str,
)
def test_planted_dead_neurons_are_what_goes(options: dict[str, Any]) -> None:
    """Zero columns in the producers alone; the consumers still read them."""
    model = graphs.transformer(**options)
    analysis = analyse_model(model)
    rng = np.random.default_rng(0)
    values = {name: np.array(array) for name, array in graphs.initializers(model).items()}
    alive: dict[str, list[list[int]]] = {}
    for group in analysis.structure.groups:
        if group.kind not in ("qk", "v", "ffn"):
            continue
        dead = [rng.permutation(group.size)[: group.size // 4] for _ in range(group.heads)]
        alive[group.id] = [sorted(set(range(group.size)) - set(row.tolist())) for row in dead]
        for weight, axis in group.producers:
            bias = analysis.linears[weight].bias
            for name, along in ((weight, axis), (bias, 0)):
                assert name is not None
                zero(values, analysis.graph, name, along, dead, group.size)
    planted = graphs.set_weights(model, values)
    kept = {name: len(rows[0]) for name, rows in alive.items()}
    ratio = 0.25 if kept["v.0"] == 3 else None
    for kind in ("qk", "v", "ffn"):
        size = analysis.groups[f"{kind}.0"].size
        found = pruned(planted, ratio or (size // 4) / size, allocation="uniform", scope=kind, compensation="none")
        chosen = {entry.id: entry.keep for entry in found.plan.groups}
        assert chosen == {name: rows for name, rows in alive.items() if name.startswith(kind + ".")}
        np.testing.assert_allclose(outputs(found.model), outputs(planted), rtol=1e-4, atol=1e-5)


def zero(values: dict[str, np.ndarray], graph: Any, name: str, axis: int, dead: list[np.ndarray], size: int) -> None:
    """Zero some neurons per head in a weight of the file, also where the analysis took it out of a packed one."""
    places = np.concatenate([head * size + row for head, row in enumerate(dead)])
    if name in graph.parts:
        places = graph.parts[name].indices[places]
        assert graph.parts[name].source in values
        name = graph.parts[name].source
    name = graph.origin.get(name, name)
    index: list[Any] = [slice(None)] * values[name].ndim
    index[axis] = places
    values[name][tuple(index)] = 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "snap"}, "unknown criterion 'snap'"),
        ({"scope": "qk,foo"}, "unknown scope 'foo'"),
        ({"scope": "heads"}, "unknown scope 'heads'"),
        ({"ratio": 1.0}, "at least 0 and below 1"),
        ({"ratio": -0.1}, "at least 0 and below 1"),
        ({"ratio": math.nan}, "at least 0 and below 1, got nan"),
        ({"ratio": None}, "no ratio was given"),
        ({"ratio": 0.99}, "can remove at most"),
        ({"compensation": "magic"}, "unknown compensation 'magic'"),
        ({"of": "time"}, "unknown cost 'time'"),
        ({"latency_table": "t.json"}, "a latency table says nothing about macs; add --of latency"),
        ({"of": "latency", "scope": "qk,residual"}, "'residual' cannot be measured layer by layer"),
        ({"multiple_of": 0}, "must be 1 or more"),
        ({"allocation": "absent.json", "ratio": None}, "no such allocation"),
        ({"plan": "absent.json", "ratio": None}, "cannot read plan"),
        ({"scope": "channel"}, "nothing to cut in scope channel"),
    ],
)
def test_impossible_requests_are_one_clear_error(model: onnx.ModelProto, options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        pruned(model, options.pop("ratio", 0.3), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("samples", [0, -3])
def test_a_number_of_samples_below_one_is_refused(model: onnx.ModelProto, samples: int) -> None:
    with pytest.raises(OnnxSnpError):
        pruned(model, samples=samples)


def test_a_model_without_attention_is_pruned_by_its_widths() -> None:
    model = graphs.mlp(30, 256, 192, 10)
    found = pruned(model, 0.3, criterion="l2")
    assert {group["kind"] for group in found.record["groups"]} == {"ffn"} and found.record["verification"]["passed"]
    assert found.record["after"]["macs"] / found.record["before"]["macs"] == pytest.approx(0.7, abs=0.004)


def test_a_small_model_is_pruned_as_near_as_whole_neurons_allow() -> None:
    assert pruned(graphs.mlp(30, 64, 48, 10), 0.3, criterion="l2").record["verification"]["passed"]


def test_a_model_with_nothing_to_cut_says_so() -> None:
    net = graphs.Net()
    net.output(net.op("Relu", net.linear(net.input("x", ["N", 4]), "a", 4, 3)), ["N", 3])
    with pytest.raises(PlanError, match="nothing to cut in scope qk,v,ffn"):
        pruned(net.proto())


def test_nothing_is_written_when_the_proof_fails(
    model: onnx.ModelProto, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise VerificationError("not equal")

    monkeypatch.setattr(pruning, "prove", refuse)
    (tmp_path / "out.onnx").write_text("old")
    with pytest.raises(VerificationError, match="not equal"):
        pruned(model, output=tmp_path / "out.onnx")
    assert os.listdir(tmp_path) == ["out.onnx"] and (tmp_path / "out.onnx").read_text() == "old"


def test_a_given_plan_is_not_changed(model: onnx.ModelProto) -> None:
    plan = Plan(fingerprint(analyse_model(model).model), pruned(model, dry_run=True).plan.groups)
    before = plan.to_json()
    pruned(model, None, plan=plan)
    assert plan.to_json() == before


def test_interface_and_metadata_survive(model: onnx.ModelProto) -> None:
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    marked.metadata_props.add(key="license", value="free")
    found = pruned(marked).model
    assert found is not None
    assert list(found.metadata_props) == list(marked.metadata_props)
    assert list(found.graph.input) == list(model.graph.input) and list(found.graph.output) == list(model.graph.output)
    assert list(found.opset_import) == list(model.opset_import) and found.ir_version == model.ir_version


def test_without_data_inputs_are_generated_and_the_record_says_so(model: onnx.ModelProto) -> None:
    record = prune(model, 0.3, samples=8).record
    assert any("generated" in note for note in record["notes"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_types_are_kept(dtype: type) -> None:
    model = graphs.transformer(dtype=dtype)
    found = pruned(model, 0.3, allocation="uniform")
    assert found.model is not None
    kinds = {name: array.dtype for name, array in graphs.initializers(found.model).items() if array.dtype.kind == "f"}
    assert set(kinds.values()) == {np.dtype(dtype)}


def test_initializers_that_are_listed_as_inputs_stay_out_of_the_way() -> None:
    model = graphs.mlp(4, 8, 3)
    for tensor in model.graph.initializer:
        kind = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        model.graph.input.add(name=tensor.name).type.CopyFrom(kind)
    found = pruned(model, 0.25, allocation="uniform")
    assert found.model is not None and found.record["verification"]["passed"]
    np.testing.assert_array_equal(outputs(found.model).shape, (5, 3))


def test_automatic_allocation_measures_kinds_without_closed_forms() -> None:
    name = Path(__file__).resolve().parent / "exports" / "families" / "levit_timm_ts17_dyn.onnx"
    found = prune(name, 0.5, scope="qk,v,ffn,head,channel,residual", samples=16, threads=1, latency=False)
    assert found.record["verification"]["passed"]
    assert found.record["after"]["macs"] == pytest.approx(0.5 * found.record["before"]["macs"], rel=0.02)
    assert any(group.startswith("channel") for group in found.record["allocation"]["sensitivity"])
