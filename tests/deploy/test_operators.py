"""The table of what importers take, against facts of the release notes that it was not made from."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxsnp.deploy.operators import _TAKEN, element_kinds, kind_of, taken_since, takes


@pytest.mark.parametrize(
    ("op", "since"),
    [  # changelog of the parser: 8.4, 8.5, 8.6, 10.1 and 10.14
        ("Shrink", (8, 4)),
        ("Xor", (8, 4)),
        ("Trilu", (8, 5)),
        ("NonZero", (8, 5)),
        ("GridSample", (8, 5)),
        ("LayerNormalization", (8, 6)),
        ("GroupNormalization", (8, 6)),
        ("IsInf", (8, 6)),
        ("DeformConv", (10, 1)),
        ("Attention", (10, 14)),
        ("Einsum", (8, 2)),
        ("MatMulInteger", None),
        ("NoSuchOperator", None),
    ],
)
def test_operators_are_taken_from_the_release_that_announced_them(op: str, since: tuple[int, ...] | None) -> None:
    assert taken_since(op) == since
    assert takes(op, (99,)) == (since is not None)
    assert not takes(op, (8, 1))


def test_releases_between_two_are_as_the_one_before() -> None:
    assert not takes("LayerNormalization", (8, 5, 2)) and takes("LayerNormalization", (8, 6, 1))
    assert not takes("Attention", (10, 13)) and takes("Attention", (11,))


def test_int32_came_to_argmax_and_topk_with_8_6() -> None:
    for op in ("ArgMax", "ArgMin", "TopK"):
        assert "i" not in element_kinds(op, (8, 5)) and "i" in element_kinds(op, (8, 6))


def test_every_entry_is_an_operator_of_onnx_and_of_known_releases_in_order() -> None:
    releases = [(8, 2), (8, 4), (8, 5), (8, 6), (10, 0), (10, 1), (10, 14)]
    for op, text in _TAKEN.items():
        assert onnx.defs.has(op), op
        steps = [step.split(" ") for step in text.split(", ")]
        order = [releases.index(tuple(map(int, release.split(".")))) for release, _ in steps]
        assert order == sorted(set(order))
        assert all(kinds and set(kinds) <= set("fibq") for _, kinds in steps)


def test_element_types_have_letters() -> None:
    kinds = {"f4": "f", "f2": "f", "f8": "", "i4": "i", "i8": "i", "?": "b", "i1": "q", "u1": "", "i2": ""}
    assert {name: kind_of(np.dtype(name)) for name in kinds} == kinds
