"""Write the ONNX of a transformers image classifier, with its preprocessing, and check it against torch.

Needs torch, transformers, onnx and onnxruntime (and onnxscript for ``--exporter dynamo``).  NAME is a model of the
Hugging Face hub or a local folder.  With ``--no-pretrained`` nothing is downloaded: NAME may then also be a local
folder with only a ``config.json``, or a model type such as ``vit``, ``deit``, ``beit`` or ``dinov2``, built with
that type's default configuration and random weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from export_timm import ExportError, add_export_options, export_checked, join_numbers, run_command

RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


class Logits(torch.nn.Module):
    """A transformers model that takes the pixels and returns its logits alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of images."""
        return self.model(pixel_values=pixel_values).logits


def _transformers() -> Any:
    """The transformers package, or an error a person can act on."""
    try:
        import transformers
    except ImportError as error:
        raise ExportError(f"transformers is needed: {error}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _config(name: str, options: argparse.Namespace) -> Any:
    """The model's configuration: from a folder, from the hub, or the default of a model type."""
    library = _transformers()
    if not options.pretrained and not os.path.exists(name) and name in library.CONFIG_MAPPING:
        return library.AutoConfig.for_model(name)
    try:
        return library.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "" if options.pretrained else " (with --no-pretrained a model type such as vit also works)"
        raise ExportError(f"cannot read the configuration of {name!r}{hint}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _load(name: str, options: argparse.Namespace) -> torch.nn.Module:
    """The image classifier, pretrained or with random weights."""
    library, config = _transformers(), _config(name, options)
    kind = library.AutoModelForImageClassification
    try:
        if options.pretrained:
            model = kind.from_pretrained(name, attn_implementation=options.attention)
        else:
            config.architectures = config.architectures or []  # None breaks types with several classifiers
            model = kind.from_config(config, attn_implementation=options.attention)
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot make an image classifier of {name!r}: {_first_line(error)}") from error
    return model.eval()


def _image(model: torch.nn.Module, override: int | None) -> tuple[int, int, int]:
    """Channels, height and width of the input."""
    size = override or getattr(model.config, "image_size", None)
    if size is None:
        raise ExportError("the configuration does not say the image size; give --image N")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return getattr(model.config, "num_channels", 3), height, width


def _preprocessing(name: str, options: argparse.Namespace) -> dict[str, str]:
    """Metadata from the model's image processor, if it has one that can be read."""
    if not options.pretrained and not os.path.exists(os.path.join(name, "preprocessor_config.json")):
        return {}
    library = _transformers()
    try:
        processor = library.AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        print(f"note: no preprocessing written: {_first_line(error)}", file=sys.stderr)
        return {}
    return describe_processor(processor)


def describe_processor(processor: Any) -> dict[str, str]:
    """Mean and std on RGB / 255, interpolation, and the share of the image kept by a centre crop."""
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    normalised = getattr(processor, "do_normalize", True) and mean is not None and std is not None
    metadata = {
        "mean": join_numbers(mean if normalised else [0.0, 0.0, 0.0]),
        "std": join_numbers(std if normalised else [1.0, 1.0, 1.0]),
    }
    resampling = getattr(processor, "resample", None)
    if resampling is not None:
        metadata["interpolation"] = RESAMPLING.get(int(resampling), str(resampling))
    return metadata


def _export(options: argparse.Namespace) -> str:
    """Body of the command line."""
    output = options.output or Path(f"{Path(options.name).name}.onnx")
    torch.manual_seed(0)
    model = _load(options.name, options)
    image = _image(model, options.image)
    metadata = _preprocessing(options.name, options)
    metadata |= {"size": join_numbers(image[1:]), "source": f"transformers {options.name}"}
    difference = export_checked(Logits(model), image, options, metadata, output, input_name="pixel_values")
    return f"{output}: {output.stat().st_size / 1e6:.1f} MB, relative difference from torch at most {difference:.1g}"


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the ONNX of a transformers image classifier.")
    parser.add_argument("name", help="hub name or local folder, e.g. facebook/deit-small-patch16-224")
    parser.add_argument("--image", type=int, help="input height and width (default: the model's own)")
    add_export_options(parser)
    options = parser.parse_args(arguments)
    return run_command(lambda: _export(options), parser.prog)


if __name__ == "__main__":
    raise SystemExit(main())
