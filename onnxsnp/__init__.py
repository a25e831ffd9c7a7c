"""onnxsnp: structured neuron-level pruning of exported ONNX transformers, without a training framework.

    >>> import onnxsnp
    >>> result = onnxsnp.prune("model.onnx", 0.3, calibration="images/", output="model.pruned.onnx")
    >>> result.record["after"]["macs"]

The verbs of the command line are functions here, with the same option names: `inspect`, `prune`, `sweep`, `recover`,
`evaluate`, `bench`, `engine` as `build_engine`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxsnp._version import __version__

if TYPE_CHECKING:
    from onnxsnp.analysis import Analysis, Inspection, analyse_model, inspect
    from onnxsnp.deploy.engine import EngineResult, build_engine
    from onnxsnp.deploy.targets import Target, get_target
    from onnxsnp.errors import DataError, ModelError, OnnxSnpError, PlanError, VerificationError
    from onnxsnp.evaluation.accuracy import Evaluation
    from onnxsnp.evaluation.latency import Latency
    from onnxsnp.model import Model, load
    from onnxsnp.planning.plan import Plan, read_plan
    from onnxsnp.pruning import PruneResult, prune
    from onnxsnp.recovery.recover import RecoverResult, recover
    from onnxsnp.sweeps.run import SweepResult, sweep
    from onnxsnp.verbs import bench, evaluate

_WHERE = {
    "Analysis": "analysis",
    "Inspection": "analysis",
    "analyse_model": "analysis",
    "inspect": "analysis",
    "EngineResult": "deploy.engine",
    "build_engine": "deploy.engine",
    "Target": "deploy.targets",
    "get_target": "deploy.targets",
    "DataError": "errors",
    "ModelError": "errors",
    "OnnxSnpError": "errors",
    "PlanError": "errors",
    "VerificationError": "errors",
    "Evaluation": "evaluation.accuracy",
    "Latency": "evaluation.latency",
    "Model": "model",
    "load": "model",
    "Plan": "planning.plan",
    "read_plan": "planning.plan",
    "PruneResult": "pruning",
    "prune": "pruning",
    "RecoverResult": "recovery.recover",
    "recover": "recovery.recover",
    "SweepResult": "sweeps.run",
    "sweep": "sweeps.run",
    "bench": "verbs",
    "evaluate": "verbs",
}

__all__ = ["__version__", *sorted(_WHERE)]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for, so that `import onnxsnp` stays fast."""
    if name in _WHERE:
        return getattr(import_module(f"onnxsnp.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'onnxsnp' has no attribute '{name}'")
