"""A stand-in for NVIDIA's trtexec, for tests where there is no TensorRT. It builds nothing and measures nothing.

It knows the options of TensorRT 8.2, 8.5, 8.6, 10 and 11 and refuses all others as trtexec does, writes files in
trtexec's formats (with made-up times: one millisecond per kilobyte of model), runs the model in onnxruntime where
outputs are asked for, and fails in the ways that devices do. What it plays comes as JSON in STAND_IN:

    version     "8.2.1"
    banner      false: the first line names no version
    oom_above   MB of workspace above which the build runs out of memory; oom: "killed" or "error"
    build       "killed", "error", "no_disk", "slow": what the build does instead
    run         "killed", "error", "slow", "wrong_output", "nan_output", "broken_times", "empty_times"
    layers      what --exportLayerInfo says
    ms          milliseconds of every run
    log         a file to which every call's options are added
"""

import json
import os
import signal
import sys
import time

SETTINGS = json.loads(os.environ.get("STAND_IN", "{}"))
VERSION = tuple(int(part) for part in SETTINGS.get("version", "8.2.1").split("."))

# As in samples/common/sampleOptions.cpp of the releases; True: takes a value.
COMMON = {
    "--onnx": True,
    "--saveEngine": True,
    "--loadEngine": True,
    "--loadInputs": True,
    "--exportTimes": True,
    "--exportOutput": True,
    "--exportLayerInfo": True,
    "--exportProfile": True,
    "--profilingVerbosity": True,
    "--warmUp": True,
    "--duration": True,
    "--iterations": True,
    "--avgRuns": True,
    "--noTF32": False,
    "--dumpLayerInfo": False,
    "--verbose": False,
    "--useSpinWait": False,
    "--useCudaGraph": False,
    "--noDataTransfers": False,
}
SINCE = {  # first and last version that knows it
    "--workspace": ((8, 0), (9,), True),
    "--buildOnly": ((8, 0), (9,), False),
    "--memPoolSize": ((8, 4), (99,), True),
    "--skipInference": ((8, 6), (99,), False),
    "--fp16": ((8, 0), (11,), False),
    "--layerPrecisions": ((8, 4), (11,), True),
    "--precisionConstraints": ((8, 4), (11,), True),
    "--stronglyTyped": ((10,), (99,), False),
    "--includeDataTransfers": ((11,), (99,), False),
    "--noCudaGraph": ((11,), (99,), False),
    "--noSpinWait": ((11,), (99,), False),
}


def known_options():
    return {**COMMON, **{name: value for name, (low, high, value) in SINCE.items() if low <= VERSION < high}}


def fail(message):
    print("[11/20/2026-19:50:58] [E] " + message)
    print("&&&& FAILED TensorRT.trtexec")
    sys.exit(1)


def parse(arguments):
    known, given = known_options(), {}
    for one in arguments:
        name, _, value = one.partition("=")
        if name not in known:
            fail(f"Unknown option: {name} {value}")
        if known[name] != bool(value):
            fail("Invalid argument: " + one)
        given[name] = value
    return given


def workspace_of(given):
    """MB; without the option 16 in 8.2, all memory later."""
    if "--memPoolSize" in given:
        name, _, size = given["--memPoolSize"].partition(":")
        if name != "workspace":
            fail("Unknown memory pool: " + name)
        return float(size)
    if "--workspace" in given:
        return int(given["--workspace"])
    return 16 if VERSION < (8, 4) else float("inf")


def build(given):
    if not os.path.exists(given["--onnx"]):
        fail("Could not open file " + given["--onnx"])
    with open(given["--onnx"], "rb") as stream:
        model = stream.read()
    how = SETTINGS.get("build")
    with open(given["--saveEngine"], "wb") as stream:
        stream.write(b"half an ")
        stream.flush()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "error":
            fail('ModelImporter.cpp:773: While parsing node number 3 [LayerNormalization -> "y"]:')
        if how == "no_disk":
            fail("Write error: No space left on device")
        if how == "slow":
            time.sleep(60)
        if workspace_of(given) > SETTINGS.get("oom_above", float("inf")):
            if SETTINGS.get("oom", "killed") == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            fail("2: [virtualMemoryBuffer.cpp::resizePhysical::144] Error Code 2: OutOfMemory (no further information)")
        stream.seek(0)
        stream.write(f"stand-in engine {VERSION}\n".encode() + model)
    if "--exportLayerInfo" in given:
        with open(given["--exportLayerInfo"], "w") as stream:
            json.dump(SETTINGS.get("layers", {"Layers": [], "Bindings": []}), stream)


def read_engine(path):
    with open(path, "rb") as stream:
        head, _, model = stream.read().partition(b"\n")
    if head != f"stand-in engine {VERSION}".encode():
        fail("1: [stdArchiveReader.cpp::StdArchiveReader::35] Error Code 1: Serialization (Version tag does not match)")
    return model


def read_inputs(spec):
    """Split as trtexec does: at commas, then at the last colon."""
    pairs = [one.rpartition(":") for one in spec.split(",")]
    found = {}
    for name, _, path in pairs:
        if not os.path.exists(path):
            fail("Cannot open file " + path + "!")
        with open(path, "rb") as stream:
            found[name] = stream.read()
    return found


def outputs(model, inputs):
    """What the model gives in onnxruntime, for inputs in the types that TensorRT's importer gives them."""
    import numpy as np
    import onnx
    import onnxruntime as ort

    proto = onnx.load_from_string(model)
    feeds = {}
    for entry in proto.graph.input:
        kind = onnx.helper.tensor_dtype_to_np_dtype(entry.type.tensor_type.elem_type)
        shape = [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        bound = np.dtype(np.int32) if kind == np.int64 and VERSION < (10,) else kind
        content = inputs[entry.name] if entry.name in inputs else fail("no input " + entry.name)
        if len(content) != int(np.prod(shape)) * bound.itemsize:
            fail(f"Note also trtexec expects {int(np.prod(shape)) * bound.itemsize} bytes for {entry.name}")
        feeds[entry.name] = np.frombuffer(content, bound).reshape(shape).astype(kind)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    return dict(zip([entry.name for entry in session.get_outputs()], session.run(None, feeds), strict=True))


def write_outputs(path, found):
    """Six digits, as C++ streams write them; dimensions with x between."""
    how, sep = SETTINGS.get("run"), "  "
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("[\n")
        for name, values in found.items():
            flat = [float(value) for value in values.reshape(-1)]
            if how == "wrong_output":
                flat[0] += max(map(abs, flat)) / 2
            listed = [f"{value:g}" for value in flat]
            if how == "nan_output":
                listed[-1] = "-nan"
            shape = "x".join(map(str, values.shape))
            stream.write(f'{sep}{{ "name" : "{name}"\n  , "dimensions" : "{shape}"\n')
            stream.write('  , "values" : [ {} ]\n  }}\n'.format(", ".join(listed)))
            sep = ", "
        stream.write("]\n")


def write_times(path, given, model):
    """Up to 8.4 with the runs of the warm-up, which are slow."""
    base = SETTINGS.get("ms", len(model) / 1000)
    warm, start, lines, counted = float(given.get("--warmUp", 200)), 0.0, [], 0
    while counted < int(given.get("--iterations", 10)):
        timed = start >= warm
        counted += timed
        compute = base * (1 + 0.01 * (counted % 7)) if timed else 10 * base + warm / 3
        if timed or VERSION < (8, 5):
            end = start + compute
            stamps = [start, start + 0.1, start, start + 0.1, start, end, end, end + 0.1]
            keys = ["startEnqMs", "endEnqMs", "startH2dMs", "endH2dMs", "startComputeMs", "endComputeMs", "startD2hMs"]
            keys += ["endD2hMs", "h2dMs", "computeMs", "d2hMs", "latencyMs"]
            values = [*stamps, 0.1, compute, 0.1, compute + 0.2]
            if VERSION < (8, 4):
                keys, values = [*keys, "endToEndMs"], [*values, compute + 0.2]
            lines.append(", ".join(f'"{key}" : {value:g}' for key, value in zip(keys, values, strict=True)))
        start += compute
    how = SETTINGS.get("run")
    if how == "empty_times":
        lines = []
    text = "[\n" + "\n".join("{}{{ {} }}".format(", " if n else "  ", line) for n, line in enumerate(lines)) + "\n]\n"
    with open(path, "w") as stream:
        stream.write(text[: len(text) // 2] if how == "broken_times" else text)


def infer(given):
    model = read_engine(given["--loadEngine"])
    inputs = read_inputs(given["--loadInputs"]) if "--loadInputs" in given else {}
    how = SETTINGS.get("run")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "error":
        fail("Cuda failure: an illegal memory access was encountered")
    if how == "slow":
        time.sleep(60)
    if "--exportTimes" in given:
        write_times(given["--exportTimes"], given, model)
    if "--exportOutput" in given:
        write_outputs(given["--exportOutput"], outputs(model, inputs))


def main(arguments):
    major, minor, patch = (*VERSION, 0, 0)[:3]
    number = major * 10000 + minor * 100 + patch if major >= 10 else major * 1000 + minor * 100 + patch
    name = f" [TensorRT v{number}]" if SETTINGS.get("banner", True) else ""
    print("&&&& RUNNING TensorRT.trtexec{} # trtexec {}".format(name, " ".join(arguments)), flush=True)
    if "log" in SETTINGS:
        with open(SETTINGS["log"], "a") as stream:
            stream.write(" ".join(arguments) + "\n")
    if "--help" in arguments or not arguments:
        print("=== Model Options ===\n" + "\n".join("  " + option for option in known_options()))
        return
    given = parse(arguments)
    if "--onnx" in given:
        build(given)
    if not {"--buildOnly", "--skipInference"} & given.keys():
        infer(given)
    print("&&&& PASSED TensorRT.trtexec" + name)


main(sys.argv[1:])
