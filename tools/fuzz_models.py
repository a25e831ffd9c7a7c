"""Damage small real models in ten thousand ways and see what the package makes of them: an error in words or a result.

A model is data from a stranger. Every mutated file is loaded, analysed and, if that works, pruned to half its width
with the usual proof, in a process of its own with limits on memory and time. Seven kinds of damage take turns:
truncation, flipped bits anywhere, flipped bits outside the weights (where the structure is), stretches that are
deleted, repeated or overwritten, bytes replaced by extreme values, and edits of the decoded message that stay valid
protobuf (a node dropped, an edge renamed, an attribute, size, type, constant or operator changed). A mutation follows
from its number alone.

Outcomes: `fine` (a proven smaller model), `clean error` (an OnnxSnpError), `CRASH` (any other exception), `memory`
(MemoryError), `killed` (a signal: a fault in native code), `timed out`. Everything but the first two is listed with the
place it came from; `--keep FOLDER` saves those files.

Run: python tools/fuzz_models.py [--count 10000] [--first 0] [--only 17,212] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ROOT / "tests" / "exports"
MEMORY = 4 * 2**30  # bytes of address space of a worker
SECONDS = 30.0
_EXTREME = (0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF)
_SIZES = (-(2**63), -1, 0, 1, 2, 3, 7, 2**16, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
_NAMES = ("", "x", "/", "..", "\u00e9\u4e2d", "a" * 300, "missing")


@dataclass(frozen=True)
class Outcome:
    """What became of one file: the kind, and where or why."""

    kind: str
    detail: str


# --- mutations --------------------------------------------------------------------------------------------------


def mutation(number: int, files: Sequence[Path] | None = None) -> tuple[str, bytes]:
    """The mutated file of a number, and what was done to what."""
    rng = random.Random(number)
    path = rng.choice(files or seed_files())
    name, damage = KINDS[number % len(KINDS)]
    return f"{name} of {path.name}", damage(path.read_bytes(), rng)


def seed_files() -> list[Path]:
    """The models that are damaged."""
    return sorted(SEEDS.rglob("*.onnx"))


def _truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flipped(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng, range(len(data)))


def _flipped_structure(data: bytes, rng: random.Random) -> bytes:
    return _flip(data, rng, _structure(data))


def _flip(data: bytes, rng: random.Random, places: Sequence[int]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _extreme(data: bytes, rng: random.Random) -> bytes:
    changed, places = bytearray(data), _structure(data)
    for _ in range(rng.choice((1, 1, 3))):
        changed[rng.choice(places)] = rng.choice(_EXTREME)
    return bytes(changed)


def _stretched(data: bytes, rng: random.Random) -> bytes:
    start = rng.choice(_structure(data))
    stop = min(len(data), start + rng.choice((1, 2, 8, 64, 1000)))
    middle = rng.choice((b"", data[start:stop] * 2, bytes(stop - start), b"\xff" * (stop - start)))
    return data[:start] + middle + data[stop:]


def _structure(data: bytes) -> list[int]:
    """Positions outside the weights' own bytes."""
    free = bytearray(b"\1") * len(data)
    graph = onnx.load_from_string(data).graph
    at = 0
    for tensor in graph.initializer:
        raw = tensor.raw_data
        if len(raw) >= 64 and (found := data.find(raw, at)) >= 0:
            free[found : found + len(raw)] = bytes(len(raw))
    return [index for index, value in enumerate(free) if value]


def _edited(data: bytes, rng: random.Random, count: int = 1) -> bytes:
    model = onnx.load_from_string(data)
    for _ in range(count):
        rng.choice(_EDITS)(model, rng)
    return model.SerializeToString()


def _edited_twice(data: bytes, rng: random.Random) -> bytes:
    return _edited(data, rng, 2)


def _drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.node:
        del model.graph.node[rng.randrange(len(model.graph.node))]


def _rename_edge(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    names = rng.choice([node.input, node.output])
    if names:
        names[rng.randrange(len(names))] = rng.choice((*_NAMES, *rng.choice(model.graph.node).output))


def _drop_edge(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    names = rng.choice([node.input, node.output])
    if names:
        del names[rng.randrange(len(names))]


def _change_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node, other = rng.choice(model.graph.node), rng.choice(model.graph.node)
    node.op_type = rng.choice((other.op_type, "Softmax", "Conv", "Attention", "Split", "Loop", "Nonesuch"))
    node.domain = rng.choice(("", "", "", "com.microsoft", "nowhere"))


def _change_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    entry = rng.choice([entry for node in model.graph.node for entry in node.attribute] or [onnx.AttributeProto()])
    if entry.ints:
        entry.ints[rng.randrange(len(entry.ints))] = rng.choice(_SIZES)
    elif rng.random() < 0.2:
        entry.name = rng.choice(("axis", "axes", "perm", "epsilon", "value", ""))
    elif rng.random() < 0.2:
        entry.type = rng.choice(list(onnx.AttributeProto.AttributeType.values()))
    else:
        entry.i = rng.choice(_SIZES)


def _add_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    name = rng.choice(("axis", "keepdims", "num_outputs", "group", "transA", "q_num_heads", "to", "allowzero"))
    node.attribute.append(onnx.helper.make_attribute(name, rng.choice(_SIZES)))


def _change_size(model: onnx.ModelProto, rng: random.Random) -> None:
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    dims = rng.choice(values).type.tensor_type.shape.dim
    if dims:
        dims[rng.randrange(len(dims))].dim_value = rng.choice(_SIZES)


def _change_type(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    value.type.tensor_type.elem_type = rng.randrange(0, 26)


def _change_weight(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer or [onnx.TensorProto()])
    if rng.random() < 0.3:
        tensor.data_type = rng.randrange(0, 26)
    elif tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_SIZES)


def _change_constant(model: onnx.ModelProto, rng: random.Random) -> None:
    """An entry of an integer tensor: Reshape targets, axes, indices, slice bounds."""
    tensors = [*model.graph.initializer, *(entry.t for node in model.graph.node for entry in node.attribute)]
    whole = [tensor for tensor in tensors if tensor.data_type == onnx.TensorProto.INT64 and tensor.raw_data]
    if whole:
        tensor = rng.choice(whole)
        raw = bytearray(tensor.raw_data)
        at = 8 * rng.randrange(len(raw) // 8)
        raw[at : at + 8] = rng.choice(_SIZES).to_bytes(8, "little", signed=True)
        tensor.raw_data = bytes(raw)


def _change_version(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.opset_import and rng.random() < 0.7:
        model.opset_import[0].version = rng.choice((0, 1, 7, 11, 13, 17, 18, 21, 23, 99, *_SIZES))
    else:
        model.ir_version = rng.choice((0, 1, 3, 8, 10, 99, 2**40))


def _repeat(model: onnx.ModelProto, rng: random.Random) -> None:
    field = rng.choice([model.graph.node, model.graph.initializer, model.graph.input, model.graph.output])
    if field:
        field.append(rng.choice(field))


_EDITS: list[Callable[[onnx.ModelProto, random.Random], None]] = [
    _drop_node,
    _rename_edge,
    _drop_edge,
    _change_operator,
    _change_attribute,
    _add_attribute,
    _change_size,
    _change_type,
    _change_weight,
    _change_constant,
    _change_version,
    _repeat,
]

KINDS: list[tuple[str, Callable[[bytes, random.Random], bytes]]] = [
    ("truncation", _truncated),
    ("flipped bits", _flipped),
    ("flipped structure", _flipped_structure),
    ("extreme bytes", _extreme),
    ("stretch", _stretched),
    ("edit", _edited),
    ("two edits", _edited_twice),
]


# --- one file in a process of its own ---------------------------------------------------------------------------


def outcome(data: bytes, memory: int = MEMORY, seconds: float = SECONDS) -> Outcome:
    """What the package makes of a file, in a child process with limits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(path, write, memory, seconds / 3)
        os.close(write)
        said, late = _listen(read, child, seconds)
        _, status = os.waitpid(child, 0)
        left = sorted(os.listdir(folder))
    if late:
        return Outcome("timed out", f"{seconds:.0f} s")
    if os.WIFSIGNALED(status):
        return Outcome("killed", signal.Signals(os.WTERMSIG(status)).name)
    kind, _, detail = said.partition("\n")
    stray = [name for name in left if name not in ("model.onnx", "out.onnx", "out.json")]
    if stray or (kind != "fine" and left != ["model.onnx"]):
        return Outcome("CRASH", f"left behind: {left}")
    return Outcome(kind or "CRASH", detail or f"exit status {os.WEXITSTATUS(status)}")


def _listen(read: int, child: int, seconds: float) -> tuple[str, bool]:
    """What the child wrote, and whether it had to be stopped."""
    said, end = b"", time.monotonic() + seconds
    with os.fdopen(read, "rb") as stream:
        while select.select([stream], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(stream.fileno(), 65536)
            if not part:
                return said.decode(errors="replace"), False
            said += part
    os.kill(child, signal.SIGKILL)
    return "", True


def _child(path: Path, write: int, memory: int, seconds: float) -> None:
    """Limits, the work, one report; never returns."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    gc.freeze()
    found = attempt(path, seconds)
    with contextlib.suppress(BrokenPipeError):
        os.write(write, f"{found.kind}\n{found.detail}".encode(errors="replace")[:60000])
    os._exit(0)


def attempt(path: Path, seconds: float) -> Outcome:
    """What the package makes of a file; a run of the model may take so many seconds."""
    from onnxsnp import limits
    from onnxsnp.analysis import analyse_model, inspect
    from onnxsnp.errors import OnnxSnpError
    from onnxsnp.pruning import prune

    limits.SECONDS = seconds

    step = "inspect"
    try:
        analysis = analyse_model(path)
        inspect(analysis)
        step = "prune"
        options = {"allocation": "uniform", "compensation": "none", "criterion": "l2", "samples": 2, "latency": False}
        prune(analysis, 0.5, output=path.with_name("out.onnx"), threads=1, **options)
    except OnnxSnpError as error:
        said = str(error)
        return Outcome("clean error" if "\n" not in said and len(said) < 1000 else "CRASH", f"{step}: {said}")
    except MemoryError:
        return Outcome("memory", f"{step}: {_place()}")
    except Exception as error:
        return Outcome("CRASH", f"{step}: {type(error).__name__}: {str(error)[:200]!r} {_place()}")
    return Outcome("fine", "")


def _place() -> str:
    """The innermost frames of the exception being handled."""
    frames = traceback.extract_tb(sys.exc_info()[2])
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[::-1][:5])


# --- the table --------------------------------------------------------------------------------------------------


def run(numbers: Sequence[int], keep: Path | None = None, verbose: bool = False) -> Counter[tuple[str, str]]:
    """Outcomes by (kind of damage, kind of outcome); what is neither fine nor a clean error is printed."""
    import onnxsnp.analysis
    import onnxsnp.pruning  # noqa: F401  (loaded before the forks)

    table: Counter[tuple[str, str]] = Counter()
    files = seed_files()
    for number in numbers:
        what, data = mutation(number, files)
        found = outcome(data)
        table[(what.split(" of ")[0], found.kind)] += 1
        if verbose or found.kind not in ("fine", "clean error"):
            print(f"{number}: {found.kind}: {what}: {found.detail}", flush=True)
            if keep is not None:
                (keep / f"{number}.onnx").write_bytes(data)
    return table


def print_table(table: Counter[tuple[str, str]]) -> None:
    """One row for each kind of damage."""
    outcomes = ("fine", "clean error", "CRASH", "memory", "killed", "timed out")
    print(f"{'damage':<20}" + "".join(f"{name:>13}" for name in outcomes))
    for row in [name for name, _ in KINDS]:
        print(f"{row:<20}" + "".join(f"{table[(row, name)]:>13}" for name in outcomes))
    print(f"{'all':<20}" + "".join(f"{sum(table[(row, name)] for row, _ in KINDS):>13}" for name in outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="how many files")
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument("--only", help="numbers, separated by commas; every outcome is shown")
    parser.add_argument("--keep", type=Path, help="folder for the files that did not come out clean")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
    numbers = range(options.first, options.first + options.count)
    if options.only:
        numbers = [int(part) for part in options.only.split(",")]
    start = time.monotonic()
    table = run(numbers, options.keep, bool(options.only))
    print_table(table)
    print(f"{len(numbers)} files in {time.monotonic() - start:.0f} s")
    return int(any(kind not in ("fine", "clean error") for _, kind in table))


if __name__ == "__main__":
    sys.exit(main())
