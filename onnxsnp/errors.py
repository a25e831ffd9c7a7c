"""Errors a user can cause or meet, each one clear line: what is wrong, where, and what to do."""

from __future__ import annotations


class OnnxSnpError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        message: what is wrong, in one sentence.
        node: the graph node (or tensor) it was found at, where there is one.
        hint: what the user can do about it.
    """

    def __init__(self, message: str, *, node: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.node = node
        self.hint = hint

    def __str__(self) -> str:
        where = f" (at {self.node})" if self.node else ""
        hint = f"; {self.hint}" if self.hint else ""
        return one_line(f"{self.message}{where}{hint}")


def one_line(text: str) -> str:
    """A text that may quote a stranger's file: white space is single, control characters are spelled out."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))


class ModelError(OnnxSnpError):
    """The model file cannot be read, is not valid ONNX, or cannot be run."""


class DataError(OnnxSnpError):
    """Calibration or evaluation data is missing, empty, broken or of the wrong shape."""


class PlanError(OnnxSnpError):
    """A pruning request that cannot be carried out: ratio, scope, ratios file, or a plan made for another model."""


class VerificationError(OnnxSnpError):
    """The rewritten model did not prove equal to what the plan says; nothing was written."""


class DeviceError(OnnxSnpError):
    """A device cannot be reached, or what was to be built or measured on it was not."""
