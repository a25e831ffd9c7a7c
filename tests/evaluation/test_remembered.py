"""Outputs that are remembered: the same as computed ones, and no more of them than allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxsnp.evaluation.remembered import Memory, RememberedSession


class Doubling:
    """Stands in for a session."""

    def __init__(self) -> None:
        self.runs = 0

    def get_inputs(self) -> list[Any]:
        return ["in"]

    def get_outputs(self) -> list[Any]:
        return ["out"]

    def run(self, outputs: Any, feeds: Any) -> list[np.ndarray]:
        self.runs += 1
        return [2 * feeds["x"]]


def test_equal_inputs_run_once_and_others_again() -> None:
    inner = Doubling()
    session = RememberedSession(inner, Memory())
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    first, again = session.run(None, {"x": x}), session.run(None, {"x": x.copy()})
    np.testing.assert_array_equal(first[0], again[0])
    assert inner.runs == 1
    for other in (x + 1, x.reshape(3, 2), x.view(np.int32)):
        np.testing.assert_array_equal(session.run(None, {"x": other})[0], 2 * other)
    assert inner.runs == 4 and session.get_inputs() == ["in"] and session.get_outputs() == ["out"]
    session.run(["out"], {"x": x})
    assert inner.runs == 5


def test_memory_ends_where_its_limit_is() -> None:
    inner, memory = Doubling(), Memory(limit=100)
    session = RememberedSession(inner, memory)
    feeds = [np.full(16, value, np.float32) for value in range(3)]  # 64 bytes each: one fits
    for _ in range(2):
        for x in feeds:
            np.testing.assert_array_equal(session.run(None, {"x": x})[0], 2 * x)
    assert memory.held == 64 and inner.runs == 5
