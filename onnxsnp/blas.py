"""Keep BLAS to one thread where many small matrices are worked on: its threads only wait for each other there."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from threadpoolctl import ThreadpoolController


@cache
def _controller() -> ThreadpoolController:
    # finding the loaded libraries takes milliseconds, so they are looked for once, after scipy has brought its own
    import scipy.linalg  # noqa: F401

    return ThreadpoolController()


def single_threaded() -> Any:
    """A context in which every BLAS library runs with one thread; the setting before is restored behind it."""
    return _controller().limit(limits=1, user_api="blas")


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
