"""Several batches at a time, each on a thread of its own.

The operators of a transformer seldom keep all cores busy with one batch, and what is done between two runs keeps one
busy at most. Sessions that run on one thread each, side by side, leave no core without work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from onnxsnp.blas import available_cores

_MOST = 4  # batches at a time: each takes memory of its own

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Crew:
    """How the cores are shared out.

    Attributes:
        workers: batches at a time.
        opened: arguments of a session that one worker runs: its `threads` and the `provider`.
    """

    workers: int
    opened: dict[str, Any]

    @staticmethod
    def of(threads: int | None, provider: str, batches: int = _MOST) -> Crew:
        """The workers for so many threads (all cores if None) and so many batches; on an accelerator one."""
        if provider != "cpu":
            return Crew.whole(threads, provider)
        cores = threads or available_cores()
        workers = max(1, min(cores, batches, _MOST))
        return Crew(workers, {"threads": cores // workers, "provider": provider})

    @staticmethod
    def whole(threads: int | None, provider: str) -> Crew:
        """One worker with all threads."""
        return Crew(1, {"threads": threads, "provider": provider})

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of the items, which are taken as they are needed.

        Close it, or exhaust it, before what the function uses is let go of.
        """
        waiting: deque[Future[Result]] = deque()
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > self.workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for one in waiting:
                    one.cancel()
