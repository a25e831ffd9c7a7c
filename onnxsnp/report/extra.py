"""Libraries that only the pages need, imported when a page is made."""

from __future__ import annotations

import importlib
from typing import Any

from onnxsnp.errors import OnnxSnpError


class ReportError(OnnxSnpError):
    """A page cannot be made: a library is missing, or a file is no run record."""


def needed(name: str) -> Any:
    """Import a library of the `report` extra.

    Raises:
        ReportError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReportError(
            f"pages need {name.partition('.')[0]}, which is not installed", hint="pip install 'onnxsnp[report]'"
        ) from error


def check_installed() -> None:
    """Find out before any work whether pages can be made.

    Raises:
        ReportError: a library is missing.
    """
    for name in ("jinja2", "matplotlib"):
        needed(name)
