"""Write a small vision transformer of flax (nnx), through jax2onnx, to ``tests/exports/families``, for the tests.

The file is compared with flax in onnxruntime, and described beside it from the hyper-parameters.
Needs jax, flax, jax2onnx, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import onnxruntime
from flax import nnx
from jax import numpy as jnp
from jax2onnx import to_onnx

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports" / "families"
IMAGE, PATCH, WIDTH, HEADS, FFN, CLASSES, DEPTH = 16, 4, 24, 3, 36, 5, 2


class Block(nnx.Module):
    """Pre-norm attention and a feed-forward network."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.first, self.second = nnx.Linear(WIDTH, FFN, rngs=rngs), nnx.Linear(FFN, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """One block over ``(batch, tokens, width)``."""
        x = x + self.attention(self.norm1(x))
        return x + self.second(nnx.gelu(self.first(self.norm2(x)), approximate=False))


class Network(nnx.Module):
    """Patches, positions, blocks, the average over the patches, a classifier; channels last."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        size = (PATCH, PATCH)
        self.patches = nnx.Conv(3, WIDTH, size, strides=size, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(jnp.zeros((1, (IMAGE // PATCH) ** 2, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(DEPTH)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Logits of a batch of images."""
        x = self.patches(image)
        x = x.reshape(x.shape[0], -1, WIDTH) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(axis=1))


def network() -> Network:
    """The network with values at which errors of pruning show: no two parameters equal, attention far from uniform."""
    model, rng = Network(nnx.Rngs(0)), np.random.default_rng(0)

    def random(array: jax.Array) -> jax.Array:
        noise = rng.standard_normal(array.shape).astype(np.float32)
        if array.ndim < 2 or not array.any():
            return jnp.asarray((1.0 if array.ndim == 1 and array.all() else 0.0) + 0.2 * noise)
        return jnp.asarray(noise * WIDTH**-0.5)

    nnx.update(model, jax.tree.map(random, nnx.state(model, nnx.Param)))
    return model


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a small vision transformer of flax as ONNX.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports/families)")
    options = parser.parse_args(arguments)
    model = network()
    exported = to_onnx(model, [("B", IMAGE, IMAGE, 3)], model_name="network")
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((3, IMAGE, IMAGE, 3)).astype(np.float32)
    name = session.get_inputs()[0].name
    wanted, got = np.asarray(model(jnp.asarray(images))), session.run(None, {name: images})[0]
    gap = float(np.abs(wanted - got).max() / np.abs(wanted).max())
    if not gap < 1e-4:
        raise SystemExit(f"export_flax: the export differs from flax by {gap:.1e}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "format_flax_vit.onnx").write_bytes(exported.SerializeToString())
    described = {
        "source": f"own vision transformer (flax {version('flax')}, nnx)",
        "exporter": f"jax2onnx {version('jax2onnx')}",
        "inputs": {name: {"shape": [2, IMAGE, IMAGE, 3], "type": "float32"}},
        "dynamic_batch": True,
        "sites": DEPTH,
        "groups": {"qk": DEPTH, "v": DEPTH, "head": DEPTH, "ffn": DEPTH, "residual": 1},
    }
    (options.output / "format_flax_vit.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(f"format_flax_vit  {exported.ByteSize() / 1000:.1f} kB  {len(exported.graph.node)} nodes  {gap:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
