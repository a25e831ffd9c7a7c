#!/usr/bin/env python3
"""Train a small DeiT on CIFAR-10 from scratch on a CPU and export it to ONNX.

A short convolutional stem replaces the linear patch projection ("Early convolutions help transformers see better")
and Muon optimises the matrices of the blocks: both matter a lot when there is time for few epochs only.

Two choices keep the run useful on a machine that others use at the same time. The learning rate is a function of the
elapsed wall time, so that the schedule is complete after --minutes whatever the speed. And each batch is cut into
chunks that single-threaded workers take from a queue, so that a worker that loses its core for a while delays one
chunk instead of every operation, as it would with threads inside the operations.

No pre-trained weights and no data beside CIFAR-10's are used.

    python tools/train_cifar10.py --data data/cifar10 --out models/deit_cifar10.onnx --minutes 80

Needs torch, numpy, pillow, onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

# Per-channel mean and standard deviation of the CIFAR-10 training images, RGB divided by 255.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
IMAGE_SIZE = 32
CROP_PADDING = 4  # the usual CIFAR augmentation: reflect-pad by 4, crop back to 32 at random
LOG_STEPS = 25
CHECKPOINT_EPOCHS = 2
OPSET = 17  # the first opset with LayerNormalization as one operator


@dataclass(frozen=True)
class Config:
    """Shape of the model and settings of the training."""

    width: int = 128
    depth: int = 6
    heads: int = 4
    ffn_ratio: int = 4
    batch_size: int = 256
    chunk_size: int = 32  # images per forward and backward pass of one worker; also the unit of batch statistics
    muon_lr: float = 3e-3  # block matrices; update scaled to the RMS of an AdamW update
    adamw_lr: float = 2e-3  # everything else (stem, norms, biases, embeddings, head)
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warmup: float = 0.03  # share of the time with a rising learning rate


# ---------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Split:
    """Images as uint8 N x H x W x 3, labels as int64 N."""

    images: Tensor
    labels: Tensor


def load_zip(path: Path) -> tuple[Split, list[str]]:
    """Decode all images of a zip with one folder per class; classes are indexed in alphabetical order."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
        images = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(n))).convert("RGB")) for n in names])
    folders = [n.split("/")[-2] for n in names]
    classes = sorted(set(folders))
    labels = np.array([classes.index(f) for f in folders], dtype=np.int64)
    return Split(torch.from_numpy(images), torch.from_numpy(labels)), classes


def normalise(images: Tensor) -> Tensor:
    """Turn uint8 N x H x W x 3 into normalised float N x 3 x H x W (channels-last in memory)."""
    scaled = (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return scaled.permute(0, 3, 1, 2)


def reflect_pad(images: Tensor) -> Tensor:
    """Pad height and width by CROP_PADDING on each side with mirrored pixels."""
    pad = (CROP_PADDING, CROP_PADDING)
    return torch.from_numpy(np.pad(images.numpy(), ((0, 0), pad, pad, (0, 0)), mode="reflect"))


def random_crop_flip(padded: Tensor, index: Tensor) -> Tensor:
    """Take a random crop, mirrored with probability 1/2, of each padded image named in index: one gather."""
    count = len(index)
    steps = torch.arange(IMAGE_SIZE)
    columns = torch.where(torch.rand(count, 1) < 0.5, steps, steps.flip(0))
    rows = steps + torch.randint(2 * CROP_PADDING + 1, (count, 1))
    columns = columns + torch.randint(2 * CROP_PADDING + 1, (count, 1))
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]


def batches(train: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield augmented, normalised batches for ever, each epoch in a new order; the incomplete last one is dropped."""
    padded = reflect_pad(train.images)
    while True:
        order = torch.randperm(len(train.labels))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            yield normalise(random_crop_flip(padded, index)), train.labels[index]


# -------------------------------------------------------------------------------------------------------- models


def conv_bn(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution with batch normalisation (folded into the convolution on export)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs))


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection for query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_size = width // heads
        self.scale = self.head_size**-0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.heads, self.head_size)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        # Plain operators: with 65 tokens on a CPU they are faster than F.scaled_dot_product_attention (whose backward
        # pass is slow there), and they export to the MatMul - Mul - Softmax - MatMul pattern of other DeiTs.
        weights = (query @ key.transpose(-2, -1) * self.scale).softmax(dim=-1)
        mixed = weights @ value
        return self.proj(mixed.transpose(1, 2).reshape(count, tokens, width))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Deit(nn.Module):
    """DeiT for 32x32 images: convolutional stem to 8x8 tokens, class token, learned position embedding."""

    def __init__(self, config: Config, classes: int) -> None:
        super().__init__()
        width = config.width
        self.stem = nn.Sequential(
            conv_bn(3, width // 2),
            nn.ReLU(),
            conv_bn(width // 2, width, stride=2),
            nn.ReLU(),
            conv_bn(width, width, stride=2),
        )
        tokens = (IMAGE_SIZE // 4) ** 2 + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, config.heads, config.ffn_ratio * width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.apply(self._initialise)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.stem(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


# ------------------------------------------------------------------------------------------------------ training


def schedule(progress: float, warmup: float) -> float:
    """Factor on the learning rate after a share `progress` of the time: linear warm-up, then cosine to zero."""
    if progress < warmup:
        return max(progress, 0.01 * warmup) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def make_optimizers(model: Deit, config: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest (weight decay on matrices and kernels only)."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decayed = [p for p in rest if p.ndim in (2, 4)]
    plain = [p for p in rest if p.ndim not in (2, 4)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=config.adamw_lr, betas=(0.9, 0.98)),
    ]


class GradientPool:
    """Computes the gradient of a batch with several single-threaded workers.

    Each worker has a replica of the model that shares parameters and batch statistics with the model but has gradients
    of its own. The statistics are updated without a lock: a lost update of a running mean does no harm.
    """

    def __init__(self, model: Deit, workers: int, config: Config) -> None:
        self.model = model
        self.config = config
        self.replicas = [copy.deepcopy(model) for _ in range(workers)]
        for replica in self.replicas:
            for mine, shared in zip(replica.parameters(), model.parameters(), strict=True):
                mine.data = shared.data
            for mine, shared in zip(replica.buffers(), model.buffers(), strict=True):
                mine.data = shared.data
        self.executor = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def backward(self, image: Tensor, label: Tensor) -> float:
        """Set the gradients of the model's parameters; return the mean loss of the batch."""
        size = self.config.chunk_size
        chunks = deque(zip(image.split(size), label.split(size), strict=True))
        tasks = [self.executor.submit(self._work, replica, chunks, len(label)) for replica in self.replicas]
        loss = sum(task.result() for task in tasks)
        for parameter, *copies in zip(
            self.model.parameters(), *(replica.parameters() for replica in self.replicas), strict=True
        ):
            gradients = [c.grad for c in copies if c.grad is not None]
            parameter.grad = torch.stack(gradients).sum(dim=0) if len(gradients) > 1 else gradients[0]
        for replica in self.replicas:
            replica.zero_grad(set_to_none=True)
        return loss

    def _work(self, replica: Deit, chunks: deque[tuple[Tensor, Tensor]], batch_size: int) -> float:
        total = 0.0
        while True:
            try:
                image, label = chunks.popleft()
            except IndexError:
                return total
            with torch.autocast("cpu", torch.bfloat16):
                logits = replica(image)
            loss = F.cross_entropy(logits.float(), label, label_smoothing=self.config.label_smoothing, reduction="sum")
            loss = loss / batch_size
            loss.backward()
            total += loss.item()


def train(model: Deit, data: Split, seconds: float, workers: int, config: Config, checkpoint: Path) -> int:
    """Train for `seconds`; write the weights to `checkpoint` now and then; return the number of steps."""
    optimizers = make_optimizers(model, config)
    groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    pool = GradientPool(model.train(), workers, config)
    stream = batches(data, config.batch_size)
    epoch_steps = len(data.labels) // config.batch_size
    step, total = 0, 0.0
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < seconds:
        factor = schedule(elapsed / seconds, config.warmup)
        for group, peak in groups:
            group["lr"] = peak * factor
        total += pool.backward(*next(stream))
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % LOG_STEPS == 0:
            rate = step * config.batch_size / (time.monotonic() - start)
            progress = f"{100 * elapsed / seconds:.1f} %, epoch {step / epoch_steps:.2f}"
            print(f"{progress}: loss {total / LOG_STEPS:.4f}, {rate:.0f} images/s", flush=True)
            total = 0.0
        if step % (CHECKPOINT_EPOCHS * epoch_steps) == 0:
            torch.save(model.state_dict(), checkpoint)
    return step


# -------------------------------------------------------------------------------------------------------- export


def export(model: Deit, path: Path) -> None:
    """Write the model as ONNX (TorchScript exporter; batch normalisation is folded into the convolutions)."""
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    torch.onnx.export(
        model.eval().to(memory_format=torch.contiguous_format),
        (example,),
        str(path),
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=["logits"],
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        do_constant_folding=True,
    )


def set_metadata(path: Path, entries: dict[str, str]) -> None:
    """Add or replace entries of the file's metadata_props, then check the file."""
    model = onnx.load(path)
    merged = {p.key: p.value for p in model.metadata_props} | entries
    onnx.helper.set_model_props(model, merged)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def onnx_accuracy(path: Path, split: Split, threads: int, batch_size: int = 250) -> float:
    """Top-1 in per cent of an ONNX file in onnxruntime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    correct = 0
    for image, label in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        (logits,) = session.run(["logits"], {"image": normalise(image).contiguous().numpy()})
        correct += int((logits.argmax(axis=1) == label.numpy()).sum())
    return 100 * correct / len(split.labels)


def joined(values: tuple[float, ...] | list[str]) -> str:
    """Comma-separated text for the metadata."""
    return ",".join(str(v) for v in values)


# ---------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with train.zip and test.zip")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.onnx", help="where to write the model")
    parser.add_argument("--minutes", type=float, default=80.0, help="wall time of the training (default: 80)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # the parallelism is that of GradientPool
    torch.manual_seed(arguments.seed)
    config = Config()

    data, classes = load_zip(arguments.data / "train.zip")
    test, test_classes = load_zip(arguments.data / "test.zip")
    if classes != test_classes:
        raise SystemExit("train.zip and test.zip have different class folders")

    model = Deit(config, len(classes)).to(memory_format=torch.channels_last)
    checkpoint = arguments.out.with_suffix(".pt")
    steps = train(model, data, 60 * arguments.minutes, arguments.threads, config, checkpoint)

    export(model, arguments.out)
    top1 = onnx_accuracy(arguments.out, test, arguments.threads)
    set_metadata(
        arguments.out,
        {
            "mean": joined(MEAN),
            "std": joined(STD),
            "input_color": "RGB",
            "classes": joined(classes),
            "top1_cifar10_test": f"{top1:.2f}",
            "trained_by": f"tools/train_cifar10.py --minutes {arguments.minutes:g} --threads {arguments.threads} "
            f"--seed {arguments.seed}; {steps} steps; {config}",
        },
    )
    checkpoint.unlink(missing_ok=True)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes, top-1 {top1:.2f} % in onnxruntime", flush=True)


if __name__ == "__main__":
    main()
