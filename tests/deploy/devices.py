"""Tiny models for bundles, and devices to run them on: folders with a stand-in trtexec."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxsnp.deploy.bundle import BundleModel

STAND_IN = Path(__file__).with_name("stand_in_trtexec.py")


def small_model(label: str, width: int, seed: int = 0) -> BundleModel:
    """Token ids and a mask-like float input, one hidden layer; its reference from onnxruntime."""
    rng = np.random.default_rng(seed)
    weights = {
        "table": rng.normal(size=(11, 8)).astype(np.float32),
        "first": rng.normal(size=(8, width)).astype(np.float32),
        "second": rng.normal(size=(width, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids:0"], ["rows"]),
        helper.make_node("Add", ["rows", "x"], ["sum"]),
        helper.make_node("MatMul", ["sum", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"], name="/layer/fmha_like/Relu"),
        helper.make_node("MatMul", ["active", "second"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [
            helper.make_tensor_value_info("ids:0", TensorProto.INT64, [1, 4]),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 5])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(proto)
    feeds = {"ids:0": rng.integers(0, 11, (1, 4)), "x": rng.normal(size=(1, 4, 8)).astype(np.float32)}
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return BundleModel(label, proto, feeds, {"y": session.run(None, feeds)[0]})


@dataclass
class Process:
    """A line of the system's list."""

    pid: int
    parent: int
    environment: str


def processes() -> list[Process]:
    """All that run now."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().decode(errors="replace")
            found.append(Process(int(folder.name), parent, environment))
    return found


@dataclass
class Device:
    """A place with a stand-in trtexec and its own facts about memory."""

    folder: Path
    shell: str = "dash"

    def play(self, **settings: Any) -> Path:
        """A trtexec that behaves as given; see the stand-in."""
        settings = {"version": "8.2.1", "log": str(self.folder / "calls.txt"), **settings}
        path = self.folder / "bin" / "trtexec"
        path.parent.mkdir(exist_ok=True)
        given = shlex.quote(json.dumps(settings))
        path.write_text(f'#!/bin/sh\nSTAND_IN={given} exec {sys.executable} -E {STAND_IN} "$@"\n')
        path.chmod(0o755)
        return path

    def calls(self) -> list[str]:
        """The options of every call but --help, in order."""
        path = self.folder / "calls.txt"
        return [line for line in path.read_text().splitlines() if line != "--help"] if path.exists() else []

    def memory(self, free: int, swap: int = 4000) -> Path:
        path = self.folder / "meminfo"
        path.write_text(f"MemTotal: 4000000 kB\nMemAvailable: {free * 1024} kB\nSwapFree: {swap * 1024} kB\n")
        return path

    def environment(self, **more: str) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "MEMINFO": str(self.folder / "meminfo"),
            "HOME": str(self.folder),
            **more,
        }

    def running(self) -> list[int]:
        """What still runs there, after a moment to end."""
        deadline = time.monotonic() + 10
        while True:
            found = [one.pid for one in processes() if str(self.folder) in one.environment]
            if not found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def build(self, bundle: Path, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
        if shutil.which(self.shell) is None:
            pytest.skip(f"no {self.shell} here")
        return subprocess.run(
            [self.shell, str(bundle / "build.sh"), *options],
            env=self.environment(**more),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
