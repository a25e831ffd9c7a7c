"""What a bundle gave on a device: latency, differences, engines. Nothing is here that was not measured there.

`results/results.json`, which check.py writes and `read_results` gives anew from the same files:

    format        1
    target        name of the profile; precision, tf32 (whether fp32 engines may use it)
    tensorrt      version that built and ran the engines
    device        facts as text: model, system, power mode, clocks, free memory
    models        by label: built, engine_bytes, latency_ms and gpu_ms {median, p90, p99} (with and without the copies
                  from and to the host), runs, rounds, outputs [{name, max_difference, relative_difference, tolerance,
                  passed}], outputs_passed, fused_attention ("yes (N layers)", "no (N softmax layers …)", "not said")
    speedup       latency, gpu: median of the original by the pruned one's
    passed        all were built, timed and gave what onnxruntime gives; problems: what not, one line each

Null stands for what was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxsnp.deploy.files import check
from onnxsnp.deploy.manifest import damaged_files
from onnxsnp.errors import DeviceError


def read_results(bundle: str | Path) -> dict[str, Any]:
    """What build.sh left in a bundle's results folder, compared with the reference here.

    Raises:
        DeviceError: nothing was built there, or the bundle's own files have changed since.
        ModelError: the folder is no bundle.
    """
    wrong = damaged_files(bundle)
    if wrong:
        raise DeviceError(f"{wrong[0]} in {bundle} is not what it was", hint="write the bundle again")
    try:
        return check.report(str(bundle))
    except check.Broken as error:
        raise DeviceError(f"{bundle}: {error}") from error


def latency_by_label(results: Mapping[str, Any]) -> dict[str, dict[str, float]] | None:
    """Latency {median, p90, p99} of each model, ms; None if not all were measured."""
    found = {label: model["latency_ms"] for label, model in results["models"].items()}
    return None if None in found.values() else found


def read_times(bundle: str | Path, label: str, warm_up: float) -> np.ndarray:
    """Milliseconds of all runs of a model, [runs, 2]: as a whole, and on the GPU alone.

    Args:
        warm_up: milliseconds from the start in which runs do not count.

    Raises:
        DeviceError: the times are missing or broken.
    """
    try:
        whole, alone, _ = check.read_times(str(bundle), label, warm_up)
    except check.Broken as error:
        raise DeviceError(f"{bundle}: {error}") from error
    return np.asarray([whole, alone]).T
