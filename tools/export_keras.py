"""Write a small vision transformer of Keras, through tf2onnx, to ``tests/exports/families``, for the tests.

The file is compared with Keras in onnxruntime, and described beside it from the hyper-parameters.
Needs tensorflow, keras 3, tf2onnx, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx
from keras import layers

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "exports" / "families"
IMAGE, PATCH, WIDTH, HEADS, SIZE, VALUE, FFN, CLASSES, DEPTH = 16, 4, 20, 2, 8, 10, 36, 5, 2


@keras.saving.register_keras_serializable()
class Positions(layers.Layer):
    """A learned vector per patch."""

    def build(self, shape: tuple[int | None, ...]) -> None:
        """One weight for all of them."""
        self.table = self.add_weight(shape=shape[1:], name="table")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Add it to the patches."""
        return x + self.table


def _gelu(x: tf.Tensor) -> tf.Tensor:
    """With tanh; tf2onnx has no operator for the erfc of the exact one."""
    return keras.activations.gelu(x, approximate=True)


def network() -> keras.Model:
    """Patches, pre-norm blocks, the average over the patches, a classifier; channels last."""
    image = keras.Input((IMAGE, IMAGE, 3), name="image")
    x = layers.Conv2D(WIDTH, PATCH, strides=PATCH, name="patches")(image)
    x = Positions(name="positions")(layers.Reshape((-1, WIDTH))(x))
    for block in range(DEPTH):
        y = layers.LayerNormalization(epsilon=1e-6, name=f"norm1_{block}")(x)
        attention = layers.MultiHeadAttention(HEADS, SIZE, VALUE, name=f"attention_{block}")
        x = layers.Add()([x, attention(y, y)])
        y = layers.LayerNormalization(epsilon=1e-6, name=f"norm2_{block}")(x)
        y = layers.Dense(FFN, activation=_gelu, name=f"first_{block}")(y)
        x = layers.Add()([x, layers.Dense(WIDTH, name=f"second_{block}")(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization(epsilon=1e-6, name="norm")(x))
    model = keras.Model(image, layers.Dense(CLASSES, name="head")(x))
    rng = np.random.default_rng(0)
    model.set_weights([_random(array, rng) for array in model.get_weights()])
    return model


def _random(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Values at which errors of pruning show: no two parameters equal, attention far from uniform."""
    if array.ndim < 2:
        return (1.0 if array.all() else 0.0) + 0.2 * rng.standard_normal(array.shape)
    return rng.standard_normal(array.shape) * np.prod(array.shape[:-1]) ** -0.5


def convert(model: keras.Model, opset: int) -> onnx.ModelProto:
    """The model in ONNX, with a free batch."""
    signature = [tf.TensorSpec((None, IMAGE, IMAGE, 3), tf.float32, name="image")]

    @tf.function(input_signature=signature)
    def logits(image: tf.Tensor) -> tf.Tensor:
        return tf.identity(model(image, training=False), name="logits")

    exported, _ = tf2onnx.convert.from_function(logits, signature, opset=opset)
    return exported


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write a small vision transformer of Keras as ONNX.")
    parser.add_argument("-o", "--output", type=Path, default=FOLDER, help="folder (default: tests/exports/families)")
    parser.add_argument("--opset", type=int, default=17, help="ONNX opset (default: 17)")
    options = parser.parse_args(arguments)
    model = network()
    exported = convert(model, options.opset)
    session = onnxruntime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
    images = np.random.default_rng(1).standard_normal((3, IMAGE, IMAGE, 3)).astype(np.float32)
    wanted, got = model(images).numpy(), session.run(None, {"image": images})[0]
    gap = float(np.abs(wanted - got).max() / np.abs(wanted).max())
    if not gap < 1e-4:
        raise SystemExit(f"export_keras: the export differs from Keras by {gap:.1e}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "format_keras_vit.onnx").write_bytes(exported.SerializeToString())
    described = {
        "source": f"own vision transformer (keras {keras.__version__})",
        "exporter": f"tf2onnx {tf2onnx.__version__}",
        "inputs": {"image": {"shape": [2, IMAGE, IMAGE, 3], "type": "float32"}},
        "dynamic_batch": True,
        "sites": DEPTH,
        "groups": {"qk": DEPTH, "v": DEPTH, "head": DEPTH, "ffn": DEPTH, "residual": 1},
    }
    (options.output / "format_keras_vit.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    print(f"format_keras_vit  {exported.ByteSize() / 1000:.1f} kB  {len(exported.graph.node)} nodes  {gap:.1e}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
