"""Batches side by side: results in order, items taken as needed, errors that come through, threads shared out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from onnxsnp.parallel import Crew


def crew(workers: int) -> Crew:
    return Crew(workers, {})


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_items_whoever_is_done_first(workers: int) -> None:
    def late(item: int) -> int:
        time.sleep(0.002 * (5 - item % 5))
        return item * item

    assert list(crew(workers).map(late, range(20))) == [item * item for item in range(20)]


def test_as_many_items_are_worked_on_at_once_as_there_are_workers() -> None:
    together = threading.Barrier(3, timeout=20)  # breaks unless three come
    assert list(crew(3).map(lambda item: together.wait() >= 0, range(3))) == [True] * 3


def test_no_more_items_are_taken_than_are_soon_needed() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(50):
            taken.append(item)
            yield item

    results = crew(2).map(lambda item: item, items())
    assert next(results) == 0
    assert len(taken) <= 3
    results.close()  # type: ignore[attr-defined]
    assert len(taken) <= 3


def test_an_error_comes_out_where_its_result_would_have() -> None:
    def broken(item: int) -> int:
        if item == 3:
            raise ValueError("the fourth")
        return item

    results = crew(2).map(broken, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(results)


@pytest.mark.parametrize(
    ("threads", "batches", "workers", "each"), [(1, 4, 1, 1), (2, 4, 2, 1), (2, 1, 1, 2), (16, 4, 4, 4), (3, 2, 2, 1)]
)
def test_threads_are_shared_out_over_the_batches(threads: int, batches: int, workers: int, each: int) -> None:
    found = Crew.of(threads, "cpu", batches)
    assert (found.workers, found.opened) == (workers, {"threads": each, "provider": "cpu"})


def test_an_accelerator_has_one_worker() -> None:
    assert Crew.of(8, "cuda") == Crew.whole(8, "cuda") == Crew(1, {"threads": 8, "provider": "cuda"})
