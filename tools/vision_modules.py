"""Small vision modules that no library has in this form, for ``export_vision_families.py``."""

from __future__ import annotations

import torch
from torch import nn


class ChannelsFirstNorm(nn.Module):
    """BatchNorm over tokens, ``(batch, tokens, width)``: a ViT whose normalisations are affine at inference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each channel by its running statistics."""
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class LoopAttention(nn.Module):
    """Self-attention written as one loop per head, each with projections of its own."""

    def __init__(self, width: int, heads: int, size: int) -> None:
        super().__init__()
        self.scale = size**-0.5
        self.query = nn.ModuleList(nn.Linear(width, size) for _ in range(heads))
        self.key = nn.ModuleList(nn.Linear(width, size) for _ in range(heads))
        self.value = nn.ModuleList(nn.Linear(width, size) for _ in range(heads))
        self.proj = nn.Linear(heads * size, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over ``(batch, tokens, width)``."""
        found = []
        for query, key, value in zip(self.query, self.key, self.value, strict=True):
            scores = query(x) @ key(x).transpose(1, 2) * self.scale
            found.append(scores.softmax(dim=-1) @ value(x))
        return self.proj(torch.cat(found, dim=-1))


class PackedAttention(nn.Module):
    """Self-attention with a packed projection, 5-D reshape."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over ``(batch, tokens, width)``."""
        batch, tokens, width = x.shape
        query, key, value = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-2, -1) * self.size**-0.5).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, tokens, width))


class FocusedLinearAttention(nn.Module):
    """Linear attention per head: ReLU features, key times value first, a sum over the keys as denominator."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, self.size).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over ``(batch, tokens, width)`` in time linear in the tokens."""
        query, key = self._split(self.query(x)).relu() + 1e-3, self._split(self.key(x)).relu() + 1e-3
        value = self._split(self.value(x))
        weight = 1 / (query @ key.mean(dim=-2, keepdim=True).transpose(-2, -1) + 1e-6)
        mixed = query @ (key.transpose(-2, -1) @ value / key.shape[-2]) * weight
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))


class SeparableAttention(nn.Module):
    """MobileViTv2's linear attention: one score per token weighs a sum of the keys into a context vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)
        self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention over ``(batch, tokens, width)`` in time linear in the tokens."""
        context = (self.key(x) * self.score(x).softmax(dim=1)).sum(dim=1, keepdim=True)
        return self.proj(self.value(x).relu() * context)


class Block(nn.Module):
    """A pre-norm block around a given attention."""

    def __init__(self, attention: nn.Module, width: int, hidden: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = norm(width), attention, norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual attention, residual feed-forward."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchViT(nn.Module):
    """Patches, blocks, average over the tokens."""

    def __init__(self, attentions: list[nn.Module], width: int, hidden: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, 4)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.Sequential(*(Block(attention, width, hidden, norm) for attention in attentions))
        self.norm, self.head = norm(width), nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of 16 x 16 images."""
        x = self.patch_embed(image).flatten(2).transpose(1, 2) + self.pos_embed
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class CompactTransformer(nn.Module):
    """A compact convolutional transformer: convolutional tokenizer, loop attention, sequence pooling."""

    def __init__(self, width: int, heads: int, size: int, hidden: int) -> None:
        super().__init__()
        self.tokenizer = nn.Sequential(
            nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2, 2),
            nn.Conv2d(12, width, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2, 2),
        )  # fmt: skip
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, width))
        self.blocks = nn.Sequential(
            *(Block(LoopAttention(width, heads, size), width, hidden, nn.LayerNorm) for _ in range(2))
        )
        self.norm, self.pool, self.head = nn.LayerNorm(width), nn.Linear(width, 1), nn.Linear(width, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits of 16 x 16 images."""
        x = self.tokenizer(image).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.norm(self.blocks(x))
        weights = self.pool(x).softmax(dim=1)
        return self.head((weights.transpose(1, 2) @ x).squeeze(1))
