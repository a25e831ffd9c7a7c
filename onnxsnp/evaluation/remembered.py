"""Outputs of a model on inputs it has seen before: where many models are compared with one, that one runs once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxsnp.runtime import Session

_LIMIT = 256 << 20  # bytes of outputs


@dataclass
class Memory:
    """Outputs by a digest of the inputs, as many as fit.

    Attributes:
        limit: bytes of outputs that are kept at most; what comes later is computed each time.
    """

    limit: int = _LIMIT
    held: int = 0
    outputs: dict[bytes, list[np.ndarray]] = field(default_factory=dict)


class RememberedSession:
    """A session that runs only on inputs that are not in its memory (which must be of this model alone)."""

    def __init__(self, session: Session, memory: Memory) -> None:
        self._session, self._memory = session, memory

    def get_inputs(self) -> Any:
        return self._session.get_inputs()

    def get_outputs(self) -> Any:
        return self._session.get_outputs()

    def run(self, outputs: Any, feeds: Mapping[str, np.ndarray]) -> Any:
        """All outputs (`outputs` is None), or the ones named, which are computed each time."""
        if outputs is not None:
            return self._session.run(outputs, feeds)
        memory, key = self._memory, _digest(feeds)
        if key in memory.outputs:
            return list(memory.outputs[key])
        found = list(self._session.run(None, feeds))
        size = sum(array.nbytes for array in found)
        if memory.held + size <= memory.limit:
            memory.held += size
            memory.outputs[key] = found
        return list(found)


def _digest(feeds: Mapping[str, np.ndarray]) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(feeds):
        array = np.ascontiguousarray(feeds[name])
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.digest()
