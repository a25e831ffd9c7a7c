"""Bounds on the first runs of a model that nobody has run here before.

What a graph computes can be far larger than its file: a kilobyte can ask for a tensor that fills the machine, or for a
loop that never ends. onnxruntime can be held to an amount of memory (of its arena, where all tensors lie that a run
computes), and be told to stop after the operator it is at.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnxruntime as ort

SECONDS = 300.0  # for one run
_CONTAINERS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit() -> int:
    """Bytes a bounded run may use: half of what this machine, container or process has; 0 where that is not known."""
    found = []
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in map(Path, _CONTAINERS):
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdigit() else []
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        found += [soft] if soft != resource.RLIM_INFINITY else []
    except ImportError:  # not on this system
        pass
    return min((size for size in found if size > 0), default=0) // 2


@cache
def bound_memory() -> None:
    """Set up the arena of the sessions that are opened with `bounded`; there is one in a process."""
    import onnxruntime as ort

    exactly = 1  # take from the system what is asked for, not the next power of two
    limits = {"max_mem": memory_limit(), "arena_extend_strategy": exactly}
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg(limits))


@contextmanager
def limited(seconds: float | None = None) -> Iterator[ort.RunOptions]:
    """Options of a run that fails once it has taken too long (`SECONDS`), and gives its memory back at the end.

    The operator that is running is not interrupted.
    """
    import onnxruntime as ort

    options = ort.RunOptions()
    options.log_severity_level = 4
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    timer = threading.Timer(SECONDS if seconds is None else seconds, setattr, (options, "terminate", True))
    timer.daemon = True
    timer.start()
    try:
        yield options
    finally:
        timer.cancel()
