"""Time and memory of one training step in onnxruntime (`onnxsnp.recovery`), next to the same step in PyTorch.

The step: DeiT-Tiny as teacher gives its block outputs and logits; the student, pruned to the widths published with SNP
(`snp_ratios.json`; the residual stream stays whole, so that block outputs can be compared), goes forward and backward
through mean squared errors at every block output and the KL divergence of the logits; Adam changes every parameter.
Target: at most 1.5 times PyTorch's time.

How: random weights and inputs, one process, the same number of threads, steps of both in turn; the ratio is the median
of the ratios of neighbouring steps. PyTorch runs eagerly, with `scaled_dot_product_attention` or with separate products
(both are timed, the faster one counts). Memory is what the process's peak in two steps has over what it held before,
each side in a process of its own (Linux only). Other programs on the machine disturb both alike, but close them.

Run: python tools/bench_gradients.py [--batch 16] [--threads 2] [--steps 7]     (needs torch)
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from onnxsnp.analysis import Analysis, analyse_model
from onnxsnp.model import load
from onnxsnp.planning.allocation import from_file
from onnxsnp.planning.plan import GroupPlan, Plan
from onnxsnp.recovery.gradients.backward import backward_graph
from onnxsnp.recovery.gradients.static import static_graph
from onnxsnp.recovery.loss import Term, add_loss
from onnxsnp.recovery.matching import block_outputs
from onnxsnp.recovery.optimise import Adam
from onnxsnp.surgery.apply import apply, to_model

sys.path.insert(0, str(Path(__file__).parent))
from make_deit import DEIT_SHAPES, make_deit

TARGET = 1.5
RATE = 1e-4
Step = Callable[[], float]


def published_plan(analysis: Analysis) -> Plan:
    """The first neurons of every group, as many as were published."""
    counts = from_file(f"{Path(__file__).parent / 'snp_ratios.json'}:deit_tiny", analysis.structure.groups)
    entries = []
    for name, kept in counts.items():
        group = analysis.groups[name]
        if group.kind != "residual":
            keep = [list(range(kept)) for _ in range(group.heads)]
            entries.append(GroupPlan(name, group.kind, group.size, group.heads, keep))
    return Plan("any", entries)


def onnx_step(batch: int, threads: int, images: np.ndarray) -> Step:
    """One step of `onnxsnp.recovery`."""
    original = make_deit("deit_tiny")
    analysis = analyse_model(original)
    hidden = block_outputs(analysis)
    static = static_graph(load(to_model(apply(analysis, published_plan(analysis)).graph)), {"image": images.shape})
    logits = static.graph.outputs[0]
    loss = add_loss(static, [*(Term(name, "squares") for name in hidden), Term(logits, "logits")])
    built = backward_graph(loss.graph, static.shapes, loss.wanted, static.parameters)
    parameters = {name: np.array(built.graph.weights[name]) for name in built.gradients}
    built.graph.weights.update(parameters)
    teacher_graph = static_graph(load(original), {"image": images.shape}).graph
    asked = [loss.total, *built.gradients.values()]
    shown = [*hidden, logits]
    teacher = teacher_graph.session(shown, threads=threads, arena=True)
    student = built.graph.session(asked, feed=list(parameters), threads=threads, arena=True)
    adam = Adam(parameters)

    def step() -> float:
        targets = teacher.run(shown, {"image": images})
        feeds = {loss.feeds[name]: target for name, target in zip(shown, targets, strict=True)}
        total, *found = student.run(asked, {"image": images, **feeds})
        adam.step(dict(zip(built.gradients, found, strict=True)), RATE)
        return float(total[0])

    return step


def torch_step(batch: int, threads: int, images: np.ndarray, fused: bool) -> Step:
    """The same step in PyTorch."""
    import torch
    from torch import nn
    from torch.nn import functional as f

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape = DEIT_SHAPES["deit_tiny"]

    class Block(nn.Module):
        def __init__(self, qk: int, v: int, ffn: int) -> None:
            super().__init__()
            self.sizes = [shape.heads * qk, shape.heads * qk, shape.heads * v]
            self.norm1, self.norm2 = nn.LayerNorm(shape.width, 1e-6), nn.LayerNorm(shape.width, 1e-6)
            self.qkv = nn.Linear(shape.width, sum(self.sizes))
            self.proj = nn.Linear(self.sizes[2], shape.width)
            self.fc1, self.fc2 = nn.Linear(shape.width, ffn), nn.Linear(ffn, shape.width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            count, tokens, _ = x.shape
            parts = self.qkv(self.norm1(x)).split(self.sizes, dim=-1)
            q, k, v = (part.reshape(count, tokens, shape.heads, -1).transpose(1, 2) for part in parts)
            if fused:
                mixed = f.scaled_dot_product_attention(q, k, v)
            else:
                scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
                mixed = scores.softmax(-1) @ v
            x = x + self.proj(mixed.transpose(1, 2).reshape(count, tokens, -1))
            return x + self.fc2(f.gelu(self.fc1(self.norm2(x))))

    class Net(nn.Module):
        def __init__(self, widths: Sequence[tuple[int, int, int]]) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, shape.width, shape.patch, shape.patch)
            self.token = nn.Parameter(torch.zeros(1, 1, shape.width))
            self.places = nn.Parameter(torch.zeros(1, shape.tokens, shape.width))
            self.blocks = nn.ModuleList(Block(*sizes) for sizes in widths)
            self.norm, self.head = nn.LayerNorm(shape.width, 1e-6), nn.Linear(shape.width, shape.classes)

        def forward(self, image: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
            x = self.patch(image).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
            hidden = []
            for block in self.blocks:
                x = block(x)
                hidden.append(x)
            return hidden, self.head(self.norm(x)[:, 0])

    teacher, student = Net([(shape.head_size, shape.head_size, shape.hidden)] * shape.depth), Net(widths())
    adam = torch.optim.Adam(student.parameters(), lr=RATE)
    data = torch.from_numpy(images)

    def step() -> float:
        with torch.no_grad():
            targets, said = teacher(data)
        hidden, logits = student(data)
        loss = sum(f.mse_loss(mine, target) for mine, target in zip(hidden, targets, strict=True))
        loss = loss + f.kl_div(logits.log_softmax(-1), said.log_softmax(-1), log_target=True, reduction="batchmean")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        return float(loss.detach())

    return step


def widths() -> list[tuple[int, int, int]]:
    """Sizes of query/key and value per head, and neurons, of each block of the student."""
    entry = json.loads((Path(__file__).parent / "snp_ratios.json").read_text())["models"]["deit_tiny"]
    shape = DEIT_SHAPES["deit_tiny"]
    rows = zip(entry["query_key"], entry["value"], entry["ffn"], strict=True)
    full = (shape.head_size, shape.head_size, shape.hidden)
    return [tuple(round(size * (1 - ratio)) for size, ratio in zip(full, row, strict=True)) for row in rows]  # type: ignore[misc]


SIDES: dict[str, Callable[[int, int, np.ndarray], Step]] = {
    "onnxsnp": onnx_step,
    "torch": lambda *given: torch_step(*given, False),
    "torch, sdpa": lambda *given: torch_step(*given, True),
}


def image_batch(batch: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, 224, 224), np.float32)


def memory(entry: str) -> float:
    """MB that the kernel counts for this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{entry}:"))) / 1000


def growth(side: str, batch: int, threads: int) -> float:
    """MB that the peak of a process grows by in its first steps."""
    command = [sys.executable, __file__, "--memory-of", side, "--batch", str(batch), "--threads", str(threads)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--memory-of", choices=list(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    images = image_batch(args.batch)
    if args.memory_of:
        step = SIDES[args.memory_of](args.batch, args.threads, images)
        gc.collect()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
        step(), step()
        print(memory("VmHWM") - before)
        return 0
    steps = {side: build(args.batch, args.threads, images) for side, build in SIDES.items()}
    times: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, list[float]] = {side: [] for side in steps}
    for _ in range(args.steps + 1):
        for side, step in steps.items():
            start = time.perf_counter()
            losses[side].append(step())
            times[side].append(time.perf_counter() - start)
    best = min((side for side in steps if side != "onnxsnp"), key=lambda side: median(times[side][1:]))
    ratio = median(mine / other for mine, other in zip(times["onnxsnp"][1:], times[best][1:], strict=True))
    print(f"batch {args.batch}, {args.threads} threads, median of {args.steps} steps")
    for side in steps:
        grown = growth(side, args.batch, args.threads)
        shown = f"loss {losses[side][0]:.4f} → {losses[side][-1]:.4f}"
        print(f"  {side:12} {median(times[side][1:]):7.3f} s   {grown:7.0f} MB   {shown}")
    print(f"onnxsnp / {best}: {ratio:.2f} (target {TARGET})")
    return 0 if ratio <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
