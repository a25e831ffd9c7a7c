"""Block outputs and outputs of two models are paired by what they are."""

from __future__ import annotations

import numpy as np
from graphs import transformer

from onnxsnp.analysis import analyse_model
from onnxsnp.recovery.matching import Pair, block_outputs, kind_of_output, match


def test_the_last_sum_of_each_block_is_its_output():
    analysis = analyse_model(transformer(blocks=3))
    found = block_outputs(analysis)
    assert len(found) == 3
    made = {name: index for index, node in enumerate(analysis.graph.nodes) for name in node.output}
    scores = sorted(made[f"{site.score}.out"] for site in analysis.structure.sites)
    assert [sum(made[name] > score for score in scores) for name in found] == [1, 2, 3]
    sums = [node.output[0] for node in analysis.graph.nodes if node.op_type == "Add"]
    assert set(found) <= set(sums)


def test_models_of_one_structure_are_paired_and_others_are_not():
    original = analyse_model(transformer(blocks=2))
    smaller = match(analyse_model(transformer(blocks=2, ffn=10, qk=2)), original)
    assert [pair.output for pair in smaller.pairs] == [False, False, True]
    assert smaller.pairs[0] == Pair(block_outputs(original)[0], block_outputs(original)[0], False)
    narrower = match(analyse_model(transformer(blocks=2, width=8)), original)
    assert [pair.output for pair in narrower.pairs] == [True]
    assert set(narrower.left_out) == set(block_outputs(original))
    assert "8" in next(iter(narrower.left_out.values()))


def test_a_model_without_a_residual_stream_has_no_block_outputs(exports):
    analysis = analyse_model(exports / "families" / "efficientformerv2_timm_ts17_dyn.onnx")
    assert analysis.structure.sites and block_outputs(analysis) == []


def test_embeddings_of_one_length_are_not_logits():
    values = np.random.default_rng(0).standard_normal((4, 6))
    assert kind_of_output(values) == "logits"
    assert kind_of_output(values / np.linalg.norm(values, axis=1, keepdims=True)) == "squares"
    assert kind_of_output(values.reshape(2, 2, 6)) == "squares"
