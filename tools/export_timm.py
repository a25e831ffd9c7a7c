"""Write the ONNX of a timm image model, with its preprocessing, and check it against torch.

Needs torch, timm, onnx and onnxruntime (and onnxscript for ``--exporter dynamo``).  Preprocessing goes into the
file's metadata: ``mean`` and ``std`` (comma-separated, for RGB divided by 255), ``size`` (height,width),
``interpolation`` and ``crop_pct``.

The functions that export and check know nothing of timm; the other export scripts of this folder use them too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

TOLERANCE = 1e-3
EXPORTERS = ("torchscript", "dynamo")
LARGEST_PROTOBUF = 2**31 - 1


class ExportError(Exception):
    """Something the user can act on; printed as one line."""


@contextlib.contextmanager
def _silent_output() -> Iterator[None]:
    """Send standard output nowhere, also that of compiled code (the TorchScript exporter dumps graphs there)."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            with contextlib.redirect_stdout(io.StringIO()):
                yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' progress and warnings off the terminal; use the parts of fused modules, which export."""
    previous, fast = logging.root.manager.disable, torch.backends.mha.get_fastpath_enabled()
    logging.disable(logging.WARNING)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), _silent_output():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        logging.disable(previous)


def export_onnx(
    model: torch.nn.Module,
    example: torch.Tensor,
    *,
    exporter: str,
    opset: int,
    dynamic: bool,
    optimize: bool = True,
    input_name: str = "image",
    output_name: str = "logits",
) -> onnx.ModelProto:
    """Export ``model`` and return the ONNX model with all weights inside.

    Args:
        model: a module in evaluation mode with one tensor in and one tensor out.
        example: an input; its first axis is the batch (2 or more if ``dynamic``).
        exporter: ``torchscript`` or ``dynamo``.
        opset: ONNX opset version.
        dynamic: leave the batch free.
        optimize: run the dynamo exporter's own optimisation step.
        input_name: name of the graph input.
        output_name: name of the graph output.
    """
    names = {"input_names": [input_name], "output_names": [output_name], "opset_version": opset}
    with quiet(), torch.no_grad():
        if exporter == "torchscript":
            axes = {input_name: {0: "batch"}, output_name: {0: "batch"}} if dynamic else None
            buffer = io.BytesIO()
            torch.onnx.export(model, (example,), buffer, dynamo=False, dynamic_axes=axes, **names)
            return onnx.load_from_string(buffer.getvalue())
        shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
        program = torch.onnx.export(
            model, (example,), dynamo=True, dynamic_shapes=shapes, optimize=optimize, verbose=False, **names
        )
        return program.model_proto


def largest_difference(
    exported: onnx.ModelProto, model: torch.nn.Module, inputs: Sequence[torch.Tensor], *, relative: bool = False
) -> float:
    """Largest absolute difference between onnxruntime and torch over the inputs.

    With ``relative`` it is divided by the largest output of torch, which matters for random weights: the outputs of
    an untrained classifier can be so small that every absolute difference looks good.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(exported.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    worst = 0.0
    for tensor in inputs:
        with torch.no_grad():
            wanted = model(tensor).numpy()
        got = session.run(None, {name: tensor.numpy()})[0]
        if got.shape != wanted.shape:
            raise ExportError(f"the exported model returns shape {got.shape}, torch returns {wanted.shape}")
        difference = float(np.abs(got - wanted).max())
        if relative:
            difference /= max(float(np.abs(wanted).max()), float(np.finfo(np.float32).tiny))
        worst = max(worst, difference if np.isfinite(difference) else float("inf"))
    return worst


def check_inputs(batch: int | None, image: Sequence[int]) -> list[torch.Tensor]:
    """Random inputs for the check: one of a fixed batch, or several of a free one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, *image, generator=generator) for size in ([batch] if batch else [1, 3])]


def set_metadata(model: onnx.ModelProto, values: Mapping[str, str]) -> None:
    """Add or replace entries of the model's metadata."""
    merged = {entry.key: entry.value for entry in model.metadata_props} | dict(values)
    onnx.helper.set_model_props(model, merged)


def join_numbers(values: Sequence[float]) -> str:
    """Numbers as comma-separated text."""
    return ",".join(f"{value:g}" for value in values)


def save_whole(model: onnx.ModelProto, path: Path) -> None:
    """Write the model so that ``path`` appears complete or not at all."""
    if model.ByteSize() > LARGEST_PROTOBUF:
        raise ExportError("the model is larger than 2 GB and does not fit in a single ONNX file")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def parse_batch(text: str) -> int | None:
    """``dynamic`` or a positive number."""
    if text == "dynamic":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'dynamic' nor a positive number")
    return int(text)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options that every export script shares."""
    parser.add_argument("-o", "--output", type=Path, help="file to write (default: made from the name)")
    parser.add_argument("--opset", type=int, default=17, help="ONNX opset; dynamo needs 18 or more (default: 17)")
    parser.add_argument("--exporter", choices=EXPORTERS, default="torchscript", help="default: torchscript")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--eager", dest="attention", action="store_const", const="eager", default="eager",
                      help="attention as plain MatMul / Softmax / MatMul (default)")  # fmt: skip
    kind.add_argument("--sdpa", dest="attention", action="store_const", const="sdpa",
                      help="attention through scaled_dot_product_attention")  # fmt: skip
    parser.add_argument("--batch", type=parse_batch, default=None, metavar="dynamic|N", help="default: dynamic")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True,
                        help="download trained weights, or keep random ones (default: pretrained)")  # fmt: skip


def export_checked(
    model: torch.nn.Module,
    image: Sequence[int],
    options: argparse.Namespace,
    metadata: Mapping[str, str],
    output: Path,
    *,
    input_name: str = "image",
) -> float:
    """Export, compare with torch, write; returns the largest relative difference.

    Nothing is written if that difference is too large.
    """
    if options.exporter == "dynamo" and options.opset < 18:
        raise ExportError(f"--exporter dynamo needs --opset 18 or more, not {options.opset}")
    if not output.parent.is_dir():
        raise ExportError(f"the folder {output.parent} does not exist")
    example = torch.randn(options.batch or 2, *image)
    exported = export_onnx(
        model, example, exporter=options.exporter, opset=options.opset,
        dynamic=options.batch is None, input_name=input_name,
    )  # fmt: skip
    if exported.ByteSize() > LARGEST_PROTOBUF:
        raise ExportError("the model is larger than 2 GB and does not fit in a single ONNX file")
    difference = largest_difference(exported, model, check_inputs(options.batch, image), relative=True)
    if not difference < TOLERANCE:
        raise ExportError(f"the export differs from torch by {difference:.2g} of its range; nothing was written")
    set_metadata(exported, metadata)
    save_whole(exported, output)
    return difference


def run_command(work: Callable[[], str], program: str) -> int:
    """Run the body of a command line: print its last line, or one line about what went wrong."""
    logging.disable(logging.WARNING)
    try:
        print(work())
    except ExportError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except Exception as error:  # whatever the libraries raise becomes one line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"{program}: {type(error).__name__}: {lines[0] if lines else 'no details'}", file=sys.stderr)
        return 1
    finally:
        logging.disable(logging.NOTSET)
    return 0


def _load(name: str, options: argparse.Namespace) -> torch.nn.Module:
    """Create the timm model, with its attention switched to the wanted kind."""
    try:
        import timm
        from timm.layers import set_fused_attn
    except ImportError as error:
        raise ExportError(f"timm is needed: {error}") from error
    if not timm.is_model(name.split(".")[0]):
        raise ExportError(f"timm has no model {name!r}; see timm.list_models()")
    set_fused_attn(options.attention == "sdpa")
    extra = {} if options.image is None else {"img_size": options.image}
    # exportable=True would switch fused attention off again
    eager = options.attention == "eager"
    return timm.create_model(name, pretrained=options.pretrained, exportable=eager, **extra).eval()


def _preprocessing(model: torch.nn.Module) -> tuple[tuple[int, int, int], dict[str, str]]:
    """Input shape without the batch, and the metadata, from the model's own configuration."""
    from timm.data import resolve_model_data_config

    config = resolve_model_data_config(model)
    metadata = {
        "mean": join_numbers(config["mean"]),
        "std": join_numbers(config["std"]),
        "size": join_numbers(config["input_size"][1:]),
        "interpolation": str(config["interpolation"]),
        "crop_pct": f"{config['crop_pct']:g}",
    }
    return tuple(config["input_size"]), metadata


def _export(options: argparse.Namespace) -> str:
    """Body of the command line."""
    output = options.output or Path(f"{options.name.replace('/', '_')}.onnx")
    torch.manual_seed(0)
    model = _load(options.name, options)
    image, metadata = _preprocessing(model)
    if options.image is not None:
        image = (image[0], options.image, options.image)
        metadata["size"] = join_numbers(image[1:])
    difference = export_checked(model, image, options, metadata | {"source": f"timm {options.name}"}, output)
    return f"{output}: {output.stat().st_size / 1e6:.1f} MB, relative difference from torch at most {difference:.1g}"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the ONNX of a timm image model.")
    parser.add_argument("name", help="timm model name, e.g. deit_small_patch16_224 or deit_tiny_patch16_224.fb_in1k")
    parser.add_argument("--image", type=int, help="input height and width (default: the model's own)")
    add_export_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _export(options), parser.prog)


if __name__ == "__main__":
    raise SystemExit(main())
