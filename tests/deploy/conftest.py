"""Bundles of tiny models, devices with a stand-in trtexec, and a way to reach them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from devices import Device, small_model
from loopback import Loopback, serve

from onnxsnp.deploy.bundle import BundleModel


@pytest.fixture(scope="session")
def pair() -> list[BundleModel]:
    return [small_model("pruned", 64), small_model("original", 128)]


@pytest.fixture
def device(tmp_path: Path) -> Device:
    folder = tmp_path / "device"
    folder.mkdir()
    one = Device(folder)
    one.memory(3000)
    one.play()
    return one


@pytest.fixture
def make_device(tmp_path: Path) -> Callable[..., Device]:
    """Devices of other versions."""

    def make(**settings: Any) -> Device:
        folder = tmp_path / f"device{settings.get('version', '')}"
        folder.mkdir()
        one = Device(folder)
        one.memory(3000)
        one.play(**settings)
        return one

    return make


@pytest.fixture
def loopback(tmp_path: Path, device: Device) -> Iterator[Loopback]:
    """The device, reached by ssh."""
    with serve(tmp_path / "server", device.environment()) as server:
        yield server
