"""A program that is stopped at any moment leaves old files or new ones, whole, and nothing that is in the way."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import pytest

from onnxsnp import atomic
from onnxsnp import model as files
from onnxsnp.atomic import whole_file, whole_folder
from onnxsnp.errors import ModelError
from onnxsnp.model import load, save
from onnxsnp.pruning import prune

ROOT = Path(__file__).resolve().parent.parent
CHEAP: dict[str, Any] = {
    "allocation": "uniform",
    "compensation": "none",
    "criterion": "l2",
    "samples": 2,
    "latency": False,
    "threads": 1,
}
# For every step N of a run that writes, a child that ends itself there as a kill would. A step is what it does to a
# file below its folder: opening for writing, changing rights, renaming, removing. Audit events come before the deed.
DYING = """
import os, shutil, sys
import onnxsnp.pruning
from onnxsnp import model
folder, apart = sys.argv[1], sys.argv[2] == "apart"
if apart:
    model._PROTO_LIMIT = 100
options = dict(allocation="uniform", compensation="none", criterion="l2", samples=2, latency=False, threads=1)

def run(here, last):
    done = 0
    def watch(event, arguments):
        nonlocal done
        if event not in ("open", "os.rename", "os.remove", "os.chmod") or not str(arguments[0]).startswith(here):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        done += 1
        if done == last:
            os._exit(9)
    sys.addaudithook(watch)
    onnxsnp.pruning.prune(here + "/model.onnx", 0.5, output=here + "/out.onnx", **options)
    os._exit(0)

for step in range(1, 100):
    here = shutil.copytree(folder + "/first", f"{folder}/{step}")
    child = os.fork()
    if not child:
        run(here, step)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 9:
        break
"""


def state(folder: Path) -> tuple[int, int]:
    """Width of the FFN in the model that is there, which must open and run, and in the record beside it."""
    model = onnx.load(folder / "out.onnx")
    assert np.isfinite(graphs.run(model, graphs.inputs_for(model))[0]).all()
    record = json.loads((folder / "out.json").read_text())
    width = graphs.initializers(model)["/blocks.0/mlp/fc1.w"].shape[1]
    return width, next(group["after"] for group in record["groups"] if group["id"] == "ffn.0")


def write_model(folder: Path) -> None:
    """A model some of whose weights are large enough to lie beside it."""
    (folder / "model.onnx").write_bytes(graphs.transformer(blocks=1, ffn=60).SerializeToString())


OLD, NEW, BETWEEN = (45, 45), (30, 30), (30, 45)


@pytest.mark.parametrize("kind", ["inside", "apart"])
def test_a_run_that_dies_between_any_two_steps_leaves_whole_files(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "apart":  # the path that models of more than 2 GiB take
        monkeypatch.setattr(files, "_PROTO_LIMIT", 100)
    first = tmp_path / "first"
    first.mkdir()
    write_model(first)
    prune(first / "model.onnx", 0.25, output=first / "out.onnx", **CHEAP)
    assert state(first) == OLD and no_litter(first)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DYING, str(tmp_path), kind]
    subprocess.run(command, check=True, timeout=120, env=environment)
    steps = len(os.listdir(tmp_path)) - 1  # the last one was not reached
    assert 6 < steps < 25 and state(tmp_path / str(steps)) == NEW and no_litter(tmp_path / str(steps))
    seen = [state(tmp_path / str(step)) for step in range(1, steps)]
    assert seen == sorted(seen, reverse=True) and seen[0] == OLD
    # between the two last renames the record is still the old one
    assert set(seen) <= {OLD, NEW, BETWEEN} and seen.count(BETWEEN) <= 4
    for step in range(1, steps):
        folder = tmp_path / str(step)
        prune(folder / "model.onnx", 0.5, output=folder / "out.onnx", **CHEAP)
        assert state(folder) == NEW and no_litter(folder), f"after step {step}"


def no_litter(folder: Path) -> bool:
    """No temporary file, and no weights that the model there does not use."""
    named = {
        entry.value
        for tensor in onnx.load(folder / "out.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return set(os.listdir(folder)) == {"model.onnx", "out.onnx", "out.json"} | named


def test_a_killed_command_leaves_the_old_output_or_the_new_one(tmp_path: Path) -> None:
    """SIGKILL from outside, at times spread over the run, the write among them."""
    write_model(tmp_path)
    prune(tmp_path / "model.onnx", 0.25, output=tmp_path / "out.onnx", **CHEAP)
    script = "import sys; from onnxsnp.cli import main; sys.argv = ['onnxsnp', *sys.argv[1:]]; main()"
    options = ["--ratio=0.5", "--allocation=uniform", "--compensation=none", "--criterion=l2", "--samples=2"]
    command = [sys.executable, "-c", script, "prune", str(tmp_path / "model.onnx"), "-o", str(tmp_path / "out.onnx")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for delay in (0.0, 0.002, 0.01):
        process = subprocess.Popen(
            [*command, *options, "--no-latency"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and not any(name.endswith(".part") for name in os.listdir(tmp_path)):
            time.sleep(0.0005)  # the write begins with a temporary file
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state(tmp_path) in (OLD, NEW, BETWEEN)
    prune(tmp_path / "model.onnx", 0.5, output=tmp_path / "out.onnx", **CHEAP)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "out.json", "out.onnx"]


class Full(io.FileIO):
    """A file on a disk that is full after so many bytes."""

    room = 0

    def write(self, data: Any) -> int:
        Full.room -= len(bytes(data))
        if Full.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("kind", ["inside", "apart"])
def test_a_full_disk_leaves_the_old_output_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Wherever it is that the disk is full: in the weights, in the graph, in the record."""
    if kind == "apart":
        monkeypatch.setattr(files, "_PROTO_LIMIT", 100)
    write_model(tmp_path)
    prune(tmp_path / "model.onnx", 0.25, output=tmp_path / "out.onnx", **CHEAP)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    real = io.open

    def limited(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if not str(file).endswith(".part") or "w" not in mode:
            return real(file, mode, *rest, **options)
        raw = Full(file, "w")
        return raw if "b" in mode else io.TextIOWrapper(io.BufferedWriter(raw, 1), write_through=True)

    monkeypatch.setattr("builtins.open", limited)
    monkeypatch.setattr("io.open", limited)
    failures = 0
    for room in (0, 10, 300, 3000, 6000, 9000, 12_000, 10**9):
        Full.room = room
        try:
            prune(tmp_path / "model.onnx", 0.5, output=tmp_path / "out.onnx", **CHEAP)
        except ModelError as error:
            failures += 1
            assert "cannot write" in str(error) and "No space left on device" in str(error)
            assert str(tmp_path) in str(error) and str(error).isprintable()
            assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before, room
    assert 4 <= failures < 8
    monkeypatch.undo()
    assert state(tmp_path) == NEW


def test_a_record_that_does_not_fit_the_disk_keeps_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path)
    prune(tmp_path / "model.onnx", 0.25, output=tmp_path / "out.onnx", **CHEAP)

    def full(self: Path, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ModelError, match="No space left on device"):
        prune(tmp_path / "model.onnx", 0.5, output=tmp_path / "out.onnx", **CHEAP)
    monkeypatch.undo()
    assert state(tmp_path) == OLD and len(os.listdir(tmp_path)) == 3


def test_what_a_killed_program_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    (tmp_path / ".out.onnx.dead.part").write_bytes(b"half")
    (tmp_path / ".other.onnx.dead.part").write_bytes(b"of another output")
    (tmp_path / ".out.onnx.link.part").symlink_to(tmp_path / "elsewhere")
    with whole_file(target) as running:
        running.write_text("first")
        with whole_file(target) as other:
            other.write_text("second")
        assert running.read_text() == "first" and target.read_text() == "second"
    assert target.read_text() == "first"
    left = [".other.onnx.dead.part", ".out.onnx.link.part", "out.onnx"]
    assert sorted(os.listdir(tmp_path)) == left


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_locked", lambda handle: False)
    (tmp_path / ".out.onnx.dead.part").write_bytes(b"half")
    with whole_file(tmp_path / "out.onnx") as part:
        part.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".out.onnx.dead.part", "out.onnx"]


def test_the_new_file_has_the_rights_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    with whole_file(tmp_path / "out") as part:
        part.write_text("x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_weights_beside_a_model_change_names_with_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is there never points to weights that are not its own."""
    monkeypatch.setattr(files, "_PROTO_LIMIT", 100)
    for width, names in ((30, ["data"]), (40, ["2.data"]), (50, ["data"])):
        save(graphs.mlp(40, width, 3), tmp_path / "big.onnx")
        assert sorted(os.listdir(tmp_path)) == sorted(["big.onnx", *(f"big.onnx.{name}" for name in names)])
        assert load(tmp_path / "big.onnx").weights["fc0.w"].shape == (40, width)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def check(part: Path) -> None:
        assert load(part).weights["fc0.w"].shape == (40, 60)  # the weights are in place when it is looked at
        raise ModelError("does not run")

    with pytest.raises(ModelError, match="does not run"):
        save(graphs.mlp(40, 60, 3), tmp_path / "big.onnx", check)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_folder_appears_whole_or_the_old_one_stays(tmp_path: Path) -> None:
    def write(text: str) -> None:
        with whole_folder(tmp_path / "out") as part:
            (part / "inner").mkdir()
            (part / "inner" / "file").write_text(text)
            if text == "broken":
                raise KeyboardInterrupt

    write("first")
    with pytest.raises(KeyboardInterrupt):
        write("broken")
    assert (tmp_path / "out/inner/file").read_text() == "first"
    write("second")
    assert (tmp_path / "out/inner/file").read_text() == "second"
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "plain"]
    with pytest.raises(ModelError, match="output folder does not exist"), whole_folder(tmp_path / "none" / "out"):
        pass


@pytest.mark.parametrize("moved", [False, True])
def test_a_folder_whose_writer_was_killed_is_put_right_by_the_next(tmp_path: Path, moved: bool) -> None:
    """`moved`: the kill came between the two renames at the end."""
    with whole_folder(tmp_path / "out") as part:
        (part / "file").write_text("old")
    script = f"""
        import os
        from onnxsnp.atomic import whole_folder
        from pathlib import Path
        with whole_folder({str(tmp_path / "out")!r}) as part:
            (part / "file").write_text("new")
            if {moved}:
                os.replace({str(tmp_path / "out")!r}, part.parent / "old")
            os._exit(9)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert len(list(tmp_path.glob(".out.*.part"))) == 1
    with whole_folder(tmp_path / "out") as one, pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out"):
        assert one.exists()  # of a writer that runs
        assert (tmp_path / "out/file").read_text() == "old"
        raise ZeroDivisionError
    assert not (tmp_path / "out/file").exists() and not list(tmp_path.glob(".*"))
