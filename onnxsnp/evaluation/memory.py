"""Peak memory of a model in onnxruntime: what opening and running it adds to a fresh process.

Measured in a process of its own, since memory that other models have touched stays with a process. What is counted is
the resident set (weights as onnxruntime keeps them, packed copies, activations); Python, numpy and onnxruntime
themselves, and the inputs, are not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.errors import ModelError
from onnxsnp.runtime import open_session, run_session

_RUNS = 3
_SECONDS = 600
_CHILD = "from onnxsnp.evaluation.memory import child; child()"


def peak_memory(
    model: str | Path, inputs: Mapping[str, np.ndarray], *, threads: int | None = None, provider: str = "cpu"
) -> int | None:
    """Bytes that a model needs at most, above what a process without it needs.

    Args:
        inputs: of one run.

    Returns:
        None where it cannot be measured (not on Linux, or no Python to start).

    Raises:
        ModelError: the model failed in its own process.
    """
    if not sys.executable or not Path("/proc/self/status").exists():
        return None
    with tempfile.TemporaryDirectory() as folder:
        feed = Path(folder) / "inputs.npz"
        np.savez(feed, *inputs.values())
        job = {"model": str(model), "inputs": str(feed), "names": list(inputs), "threads": threads}
        root = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=json.dumps(job | {"provider": provider}),
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        raise ModelError(f"{model} failed in a process of its own: {said}", hint="leave memory out with --no-memory")
    found: int | None = json.loads(done.stdout)["bytes"]
    return found


def child() -> None:
    """What the other process does: open and run the model of the job on its standard input, and say what it took."""
    job = json.loads(sys.stdin.read())
    with np.load(job["inputs"]) as arrays:
        inputs = {name: arrays[f"arr_{number}"] for number, name in enumerate(job["names"])}
    import onnxruntime  # noqa: F401  (its libraries are not the model's)

    before, peak = _start()
    session = open_session(job["model"], threads=job["threads"], provider=job["provider"])
    for _ in range(_RUNS):
        run_session(session, inputs)
    after = _status("VmHWM")
    known: dict[str, Any] = {"bytes": after - before if after > peak else None}
    print(json.dumps(known))


def _start() -> tuple[int, int]:
    """Resident memory now, and the peak so far, which is set back to it where the system allows that."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _status("VmRSS"), _status("VmHWM")
    return _status("VmRSS"), _status("VmRSS")


def _status(name: str) -> int:
    """A size of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
