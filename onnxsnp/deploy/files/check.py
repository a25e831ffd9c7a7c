"""Checks this folder's files and what its engines gave, and sums up the times. Python 3.6 and nothing else.

    python3 check.py          compare outputs, write results/results.json, print a table
    python3 check.py --files  only whether the files are those that were written

Ends with 0 if everything agrees, 1 if not.
"""

import hashlib
import json
import math
import os
import re
import struct
import sys
from typing import Any, Dict, List, Optional, Tuple

RESULTS = "results"
CODES = {
    "float16": "e",
    "float32": "f",
    "float64": "d",
    "int8": "b",
    "int16": "h",
    "int32": "i",
    "int64": "q",
    "uint8": "B",
    "bool": "?",
}


class Broken(Exception):
    """A file that is missing or cannot be read; one line for people."""


def read_json(path: str, what: str) -> Any:
    where = os.path.basename(path)
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
        # trtexec prints numbers that are none as C++ does, which is no JSON
        text = re.sub(r"(?<=[\[\s,])(-?)(nan|inf)(?=[\s,\]])", lambda found: spelled(found), text)
        return json.loads(text)
    except OSError as error:
        raise Broken("{} is missing ({})".format(what, where)) from error
    except ValueError as error:
        raise Broken("{} cannot be read: {} ({})".format(what, where, error)) from error


def spelled(found: Any) -> str:
    return found.group(1) + "Infinity" if found.group(2) == "inf" else "NaN"


def check_files(folder: str, manifest: Dict[str, Any]) -> List[str]:
    """Files that are not what they were when the folder was written."""
    wrong = []
    for entry in manifest["files"]:
        digest = hashlib.sha256()
        try:
            with open(os.path.join(folder, entry["name"]), "rb") as stream:
                for block in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(block)
        except OSError:
            wrong.append(entry["name"] + " is missing")
            continue
        if digest.hexdigest() != entry["sha256"]:
            wrong.append(entry["name"] + " is not what it was: copy the folder again")
    return wrong


def quantile(ordered: List[float], share: float) -> float:
    """With linear interpolation between the two nearest."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def summary(values: List[float]) -> Dict[str, float]:
    ordered = sorted(values)
    return {"median": quantile(ordered, 0.5), "p90": quantile(ordered, 0.9), "p99": quantile(ordered, 0.99)}


def read_times(folder: str, label: str, warm_up: float) -> Tuple[List[float], List[float], int]:
    """Milliseconds of all runs, whole and on the GPU alone, and the number of rounds."""
    place = os.path.join(folder, RESULTS, label)
    listed = os.listdir(place) if os.path.isdir(place) else []
    names = sorted(name for name in listed if re.match(r"times\.\d+\.json$", name))
    if not names:
        raise Broken("no times of {}".format(label))
    whole, alone = [], []
    for name in names:
        runs = read_json(os.path.join(place, name), "the times of " + label)
        try:  # up to 8.4 trtexec lists its warm-up among the runs
            counted = [run for run in runs if run["startComputeMs"] >= warm_up]
            whole += [float(run["latencyMs"]) for run in counted]
            alone += [float(run["computeMs"]) for run in counted]
        except (TypeError, KeyError, ValueError) as error:
            raise Broken("the times of {} are not what trtexec writes ({})".format(label, name)) from error
    if not whole or not all(math.isfinite(value) and value > 0 for value in whole + alone):
        raise Broken("the times of {} hold no run after the warm-up, or one of no time".format(label))
    return whole, alone, len(names)


def read_raw(folder: str, entry: Dict[str, Any]) -> List[float]:
    code = CODES.get(entry["dtype"])
    if code is None:
        raise Broken("the output {} has the type {}, which is not compared".format(entry["name"], entry["dtype"]))
    with open(os.path.join(folder, entry["file"]), "rb") as stream:
        content = stream.read()
    return list(struct.unpack("<{}{}".format(len(content) // struct.calcsize("<" + code), code), content))


def compare(folder: str, model: Dict[str, Any], tolerance: float) -> List[Dict[str, Any]]:
    """Each output against onnxruntime's: the largest difference by the reference's largest magnitude."""
    label = model["label"]
    found = read_json(os.path.join(folder, RESULTS, label, "output.json"), "the output of " + label)
    try:
        given = {entry["name"]: entry["values"] for entry in found}
    except (TypeError, KeyError) as error:
        raise Broken("the output of {} is not what trtexec writes".format(label)) from error
    compared = []
    for entry in model["outputs"]:
        wanted, values = read_raw(folder, entry), given.get(entry["name"])
        if values is None or len(values) != len(wanted):
            what = "is missing" if values is None else "has {} values instead of {}".format(len(values), len(wanted))
            raise Broken("the output {} of {} {}".format(entry["name"], label, what))
        largest = max([abs(value) for value in wanted] or [0.0])
        off = 0.0
        for value, other in zip(values, wanted):
            far = abs(value - other)
            off = far if not far <= off else off  # so that NaN stays
            if not math.isfinite(far):
                off = far
                break
        relative = off / largest if largest > 0 else off
        compared.append(
            {
                "name": entry["name"],
                "max_difference": off if math.isfinite(off) else None,
                "relative_difference": relative if math.isfinite(relative) else None,
                "tolerance": tolerance,
                "passed": math.isfinite(relative) and relative <= tolerance,
            }
        )
    return compared


def fused_attention(folder: str, model: Dict[str, Any], pattern: str) -> str:
    """What the list of the engine's layers says of kernels for whole attentions; "not said" where it does not tell."""
    try:
        layers = read_json(os.path.join(folder, RESULTS, model["label"], "layers.json"), "layers")
        listed = layers["Layers"] if isinstance(layers, dict) else layers
        named = sorted(model["names_like_kernels"], key=len, reverse=True)
        found, softmax = 0, 0
        for layer in listed:
            text = json.dumps(layer)
            for name in named:  # the model's own names say nothing of kernels
                text = text.replace(json.dumps(name)[1:-1], "")
            found += bool(re.search(pattern, text, re.IGNORECASE))
            kind = layer.get("LayerType", "") if isinstance(layer, dict) else ""
            softmax += kind.lower() == "softmax"
    except (Broken, TypeError, KeyError, AttributeError):
        return "not said"
    if found:
        return "yes ({} layers)".format(found)
    return "no ({} softmax layers of their own)".format(softmax) if softmax else "not said"


def device(folder: str) -> Dict[str, str]:
    facts = {}
    try:
        with open(os.path.join(folder, RESULTS, "device.txt"), encoding="utf-8", errors="replace") as stream:
            for line in stream:
                key, _, value = line.strip().partition(": ")
                facts[key] = value
    except OSError:
        pass  # nothing is claimed of a device that is not described
    return facts


def judge(
    folder: str, manifest: Dict[str, Any], model: Dict[str, Any], tolerance: float, problems: List[str]
) -> Dict[str, Any]:
    """Everything that was measured of one model; what was not is null."""
    label = model["label"]
    engine = os.path.join(folder, RESULTS, label, "model.engine")
    built = os.path.isfile(engine)
    result = {
        "built": built,
        "engine_bytes": os.path.getsize(engine) if built else None,
        "latency_ms": None,
        "gpu_ms": None,
        "runs": 0,
        "rounds": 0,
        "outputs": None,
        "outputs_passed": None,
        "fused_attention": fused_attention(folder, model, manifest["fused_names"]) if built else "not said",
    }  # type: Dict[str, Any]
    if not built:
        problems.append("no engine of " + label)
        return result
    try:
        whole, alone, rounds = read_times(folder, label, manifest["timing"]["warm_up_ms"])
        result.update(latency_ms=summary(whole), gpu_ms=summary(alone), runs=len(whole), rounds=rounds)
    except Broken as error:
        problems.append(str(error))
    if not model["outputs"]:
        return result
    try:
        result["outputs"] = compare(folder, model, tolerance)
        result["outputs_passed"] = all(entry["passed"] for entry in result["outputs"])
        for entry in result["outputs"]:
            if not entry["passed"]:
                problems.append(different(label, entry))
    except Broken as error:
        result["outputs_passed"] = False
        problems.append(str(error))
    return result


def different(label: str, entry: Dict[str, Any]) -> str:
    if entry["relative_difference"] is None:
        return "the output {} of {} is not finite".format(entry["name"], label)
    return "the output {} of {} differs from onnxruntime's by {:.2g} of its largest value, more than {:g}".format(
        entry["name"], label, entry["relative_difference"], entry["tolerance"]
    )


def ratio(models: Dict[str, Any], key: str) -> Optional[float]:
    """How many times faster the pruned model is, by the medians."""
    pair = [models.get(label, {}).get(key) for label in ("original", "pruned")]
    if None in pair:
        return None
    return float(pair[0]["median"] / pair[1]["median"])


def table(found: Dict[str, Any]) -> List[str]:
    lines = ["{:<10} {:>9} {:>9} {:>9} {:>9} {:>11}  {}".format("", "median", "p90", "p99", "GPU", "engine", "outputs")]
    for label, result in found["models"].items():
        cells = [label]
        times, alone = result["latency_ms"], result["gpu_ms"]
        cells += ["{:.3f}".format(times[key]) if times else "-" for key in ("median", "p90", "p99")]
        cells.append("{:.3f}".format(alone["median"]) if alone else "-")
        cells.append("{:.2f} MB".format(result["engine_bytes"] / 1e6) if result["built"] else "not built")
        cells.append({True: "agree", False: "DIFFER", None: "not compared"}[result["outputs_passed"]])
        lines.append("{:<10} {:>9} {:>9} {:>9} {:>9} {:>11}  {}".format(*cells))
    speedup = found["speedup"]
    if speedup["latency"] is not None:
        lines.append("speed-up   {:.2f}x (GPU alone {:.2f}x)".format(speedup["latency"], speedup["gpu"]))
    lines.append("milliseconds per run on {}, {}, TensorRT {}".format(*described(found)))
    for label, result in found["models"].items():
        lines.append("fused attention in {}: {}".format(label, result["fused_attention"]))
    return lines


def described(found: Dict[str, Any]) -> Tuple[str, str, str]:
    facts = found["device"]
    name = facts.get("model") or facts.get("gpu") or "this device"
    mode = ", power mode " + facts["power mode"] if facts.get("power mode") else ""
    tf32 = " with TF32" if found["tf32"] else ""
    return name + mode, found["precision"] + tf32, facts.get("tensorrt", "of unknown version")


def report(folder: str) -> Dict[str, Any]:
    """What was built, measured and compared in a bundle's folder; what was not is null."""
    manifest = read_json(os.path.join(folder, "manifest.json"), "the manifest")
    if not os.path.isdir(os.path.join(folder, RESULTS)):
        raise Broken("nothing was built here yet: run sh build.sh")
    problems = []  # type: List[str]
    facts = device(folder)
    tf32 = facts.get("tf32") == "1"
    tolerance = max(manifest["tolerance"], manifest["tolerance_tf32"]) if tf32 else manifest["tolerance"]
    models = {model["label"]: judge(folder, manifest, model, tolerance, problems) for model in manifest["models"]}
    return {
        "format": 1,
        "target": manifest["target"]["name"],
        "precision": manifest["precision"],
        "tf32": tf32,
        "tensorrt": facts.get("tensorrt"),
        "device": facts,
        "models": models,
        "speedup": {"latency": ratio(models, "latency_ms"), "gpu": ratio(models, "gpu_ms")},
        "passed": not problems,
        "problems": problems,
    }


def main(arguments: List[str]) -> int:
    folder = os.path.dirname(os.path.abspath(__file__))
    problems = check_files(folder, read_json(os.path.join(folder, "manifest.json"), "the manifest"))
    if not problems and arguments != ["--files"]:
        found = report(folder)
        path = os.path.join(folder, RESULTS, "results.json")
        with open(path + ".part", "w", encoding="utf-8") as stream:
            json.dump(found, stream, indent=1)
        os.replace(path + ".part", path)
        tell("\n".join(table(found)), sys.stdout)
        problems = found["problems"]
    for problem in problems:
        tell("check.py: " + problem, sys.stderr)
    return 1 if problems else 0


def tell(text: str, stream: Any) -> None:
    """Devices often have a terminal of plain ASCII, and names in models may be anything."""
    code = stream.encoding or "ascii"
    stream.write(text.encode(code, "backslashreplace").decode(code) + "\n")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Broken as trouble:
        tell("check.py: {}".format(trouble), sys.stderr)
        sys.exit(1)
