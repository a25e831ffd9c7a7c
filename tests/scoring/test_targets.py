"""What groups offer for scoring: filters with biases, and neurons that are dead."""

from __future__ import annotations

import graphs
import numpy as np
import pytest

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.scoring.criteria import ScoringTarget
from onnxsnp.scoring.targets import scoring_target


def target(analysis: Analysis, name: str, qk: np.ndarray | None = None) -> ScoringTarget:
    return scoring_target(analysis.graph, analysis.dependencies, analysis.groups[name], analysis.linears, qk)


def edited(changes: dict[str, object], **options: object) -> Analysis:
    """A transformer in which index expressions of some weights are zero."""
    model = graphs.transformer(blocks=1, **options)  # type: ignore[arg-type]
    values = {name: np.array(array) for name, array in graphs.initializers(model).items()}
    for name, where in changes.items():
        values[name][where] = 0
    return analyse_model(graphs.set_weights(model, values))


def test_filters_are_the_producers_with_the_bias_as_last_column() -> None:
    model = graphs.transformer(blocks=1)
    weights = graphs.initializers(model)
    found = target(analyse_model(model), "ffn.0")
    (filters,) = found.filters
    assert (found.kind, found.heads, found.size) == ("ffn", 1, 20)
    np.testing.assert_array_equal(filters[:, :-1], weights["/blocks.0/mlp/fc1.w"].T)
    np.testing.assert_array_equal(filters[:, -1], weights["/blocks.0/mlp/fc1.b"])


def test_query_and_key_are_two_layers_and_carry_their_scores() -> None:
    scores = np.arange(12.0).reshape(3, 4)
    found = target(analyse_model(graphs.transformer(blocks=1)), "qk.0", scores)
    assert [layer.shape for layer in found.filters] == [(12, 13), (12, 13)]
    assert (found.kind, found.heads, found.size) == ("qk", 3, 4) and found.qk is scores


def test_parts_of_a_packed_projection_are_scored_like_separate_ones() -> None:
    model = graphs.transformer(blocks=1, qkv="flat")
    packed = graphs.initializers(model)["/blocks.0/attn/qkv.w"]
    (filters,) = target(analyse_model(model), "v.0").filters
    np.testing.assert_array_equal(filters[:, :-1], packed[:, 24:].T)


def test_the_residual_has_every_layer_that_writes_to_it_and_nothing_that_passes_by() -> None:
    found = target(analyse_model(graphs.transformer(blocks=2)), "residual")
    assert len(found.filters) == 5 and all(layer.shape[0] == 12 for layer in found.filters)  # embed, 2 proj, 2 fc2


def test_a_pair_is_dead_when_either_side_is() -> None:
    analysis = edited(
        {
            "/blocks.0/attn/q.w": np.s_[:, 5],
            "/blocks.0/attn/q.b": 5,
            "/blocks.0/attn/k.w": np.s_[:, 10],
            "/blocks.0/attn/k.b": 10,
        }
    )
    assert np.argwhere(target(analysis, "qk.0").dead).tolist() == [[1, 1], [2, 2]]


def test_a_neuron_with_a_bias_is_alive() -> None:
    assert not target(edited({"/blocks.0/mlp/fc1.w": np.s_[:, 4]}), "ffn.0").dead.any()
    both = {"/blocks.0/mlp/fc1.w": np.s_[:, 4], "/blocks.0/mlp/fc1.b": 4}
    assert np.argwhere(target(edited(both), "ffn.0").dead).tolist() == [[0, 4]]


def test_a_neuron_that_nothing_reads_is_dead() -> None:
    assert np.argwhere(target(edited({"/blocks.0/mlp/fc2.w": 7}), "ffn.0").dead).tolist() == [[0, 7]]
    assert np.argwhere(target(edited({"/blocks.0/attn/proj.w": 13}), "v.0").dead).tolist() == [[2, 1]]


def test_a_gated_neuron_is_dead_when_either_factor_is() -> None:
    analysis = edited({"/blocks.0/mlp/up.w": np.s_[:, 3], "/blocks.0/mlp/up.b": 3}, gate="pair")
    assert np.argwhere(target(analysis, "ffn.0").dead).tolist() == [[0, 3]]


@pytest.mark.parametrize("all_layers", [False, True])
def test_a_residual_channel_is_dead_only_when_no_layer_writes_it(all_layers: bool) -> None:
    changes = {"embed.w": np.s_[:, 2], "embed.b": 2}
    if all_layers:
        changes.update(
            {
                "/blocks.0/attn/proj.w": np.s_[:, 2],
                "/blocks.0/attn/proj.b": 2,
                "/blocks.0/mlp/fc2.w": np.s_[:, 2],
                "/blocks.0/mlp/fc2.b": 2,
            }
        )
    assert target(edited(changes), "residual").dead.any() == all_layers
