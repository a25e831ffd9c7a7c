"""Resampling and pooling in the form that importers read."""

from __future__ import annotations

import numpy as np

from onnxsnp.deploy.lowering.site import Rule, Site

# attributes that came with opset 18, and what was done before
_LATER = {"antialias": 0, "keep_aspect_ratio_policy": b"stretch"}


def _upsample(s: Site) -> str | None:
    """Upsample and Resize of opset 10: one input beside the image, coordinates divided by the scale, rounded down."""
    scales = np.asarray(s.attr("scales")) if s.source < 9 else s.value(1)
    if scales is None:
        return None
    factors = s.constant(scales.astype(np.float32))
    settings = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    mode = s.text("mode", "nearest")
    s.emit("Resize", [s.data, "", factors], [s.output_name], s.node.name, mode=mode, **settings)
    return "Resize has other inputs since opset 11"


def _resize(s: Site) -> str | None:
    """Scales or sizes for every axis; from opset 18 on a file may give them for some axes."""
    if s.source < 11:
        return _upsample(s)
    axes = s.attr("axes")
    if s.source < 18 or axes is None:
        return None
    inputs = [s.data, ""]
    for slot, usual in ((2, np.ones(s.rank(), np.float32)), (3, np.asarray(s.shape(), np.int64))):
        values = s.value(slot)
        if s.given(slot) and values is None:
            return None
        if values is None or not values.size:
            inputs.append("")
            continue
        usual[list(axes)] = values
        inputs.append(s.constant(usual))
    while not inputs[-1]:
        inputs.pop()
    s.again(*inputs, **s.settings("axes", *[name for name, usual in _LATER.items() if s.attr(name, usual) == usual]))
    return "for every axis"


def _pool(s: Site) -> str | None:
    """A pool over one axis as one over two, the second of size 1: importers pool over two or three."""
    if s.rank() != 3 or s.output(1):
        return None
    settings = s.settings("dilations") if set(s.attr("dilations") or [1]) == {1} else s.settings()
    for name, rest in (("kernel_shape", 1), ("strides", 1), ("dilations", 1)):
        if name in settings:
            settings[name] = [*settings[name], rest]
    if "pads" in settings:
        before, after = settings["pads"]
        settings["pads"] = [before, 0, after, 0]
    pooled = s.add(s.node.op_type, s.reshape(s.data, [*s.shape(), 1]), **settings)
    s.reshape(pooled, s.shapes[s.output_name], into=s.output_name)
    return "importers pool over two or three axes"


def _roi_align(s: Site) -> str | None:
    """Up to opset 15 without the shift by half a pixel, from 16 on with it unless told otherwise."""
    given = s.text("coordinate_transformation_mode", "half_pixel" if s.source >= 16 else "output_half_pixel")
    if (s.source >= 16) == (s.opset >= 16):
        return None
    settings = s.settings("coordinate_transformation_mode")
    if s.opset >= 16 or given != "output_half_pixel":  # below 16 there is no way to write it, and `lint` says so
        settings["coordinate_transformation_mode"] = given
    s.again(*s.node.input, **settings)
    return "its coordinates have another default"


RULES: dict[str, Rule] = {
    "AveragePool": _pool,
    "LpPool": _pool,
    "MaxPool": _pool,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "Upsample": _upsample,
}
