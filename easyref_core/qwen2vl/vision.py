"""Qwen2-VL's vision tower: patches of a picture to image features of the language model's width.

Source: Qwen2-VL (arXiv 2409.12191, section 2.1) and its Hugging Face weights, whose names are
kept. `operations` supplies Linear and LayerNorm (`torch.nn`, or ComfyUI's casting ones), and
attention if it has one (`attention_kernels.attend_of`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..attention_kernels import attend_of
from .config import VisionConfig

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines [P, head_dim] of patches' positions in their pictures, float32."""


class VisionAttention(nn.Module):
    """Full attention within each picture, with rotary positions over rows and columns."""

    def __init__(self, config: VisionConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attend = attend_of(operations)
        self.qkv = operations.Linear(config.embed_dim, 3 * config.embed_dim, **factory)
        self.proj = operations.Linear(config.embed_dim, config.embed_dim, **factory)

    def forward(self, x: torch.Tensor, rotation: Rotation, lengths: Sequence[int]) -> torch.Tensor:
        """x [1, P, D] -> [1, P, D].

        Args:
            lengths: patches of each picture, P in all.
        """
        qkv = self.qkv(x)[0].unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(1, 2, 0, 3)[:, None]  # each [1, heads, P, head_dim]
        q, k = _rotate(q, rotation), _rotate(k, rotation)
        found, start = [], 0
        for length, pictures in groupby(lengths):  # neighbours of one size are a batch
            end = start + length * len([*pictures])
            batch = (t[0, :, start:end].unflatten(1, (-1, length)) for t in (q, k, v))
            out = self.attend(*(t.transpose(0, 1) for t in batch))  # [n, heads, length, head_dim]
            found.append(out.transpose(1, 2).flatten(0, 1))
            start = end
        return self.proj(torch.cat(found).flatten(1)[None])


def _rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary embedding in float32, as the original does in every precision."""
    # At most three float32 copies at a time: in large pictures they set the peak memory.
    cos, sin = rotation
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    rotated = rotated * sin
    del first, second
    wide = wide * cos
    return (wide + rotated).to(x.dtype)


class VisionMlp(nn.Module):
    """Two layers with the sigmoid approximation of GELU ("quick GELU")."""

    def __init__(self, config: VisionConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.fc1 = operations.Linear(config.embed_dim, config.mlp_dim, **factory)
        self.fc2 = operations.Linear(config.mlp_dim, config.embed_dim, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class VisionBlock(nn.Module):
    def __init__(self, config: VisionConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.norm1 = operations.LayerNorm(config.embed_dim, eps=1e-6, **factory)
        self.norm2 = operations.LayerNorm(config.embed_dim, eps=1e-6, **factory)
        self.attn = VisionAttention(config, operations, **factory)
        self.mlp = VisionMlp(config, operations, **factory)

    def forward(self, x: torch.Tensor, rotation: Rotation, lengths: Sequence[int]) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rotation, lengths)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The original's Conv3d has kernel = stride, so it is a Linear over whole patches."""

    def __init__(self, config: VisionConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = operations.Linear(config.patch_dim, config.embed_dim, bias=False, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class PatchMerger(nn.Module):
    """Merges each 2x2 block of patches into one token."""

    def __init__(self, config: VisionConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.width = config.embed_dim * config.spatial_merge_size**2
        self.ln_q = operations.LayerNorm(config.embed_dim, eps=1e-6, **factory)
        self.mlp = nn.Sequential(
            operations.Linear(self.width, self.width, **factory),
            nn.GELU(),
            operations.Linear(self.width, config.hidden_size, **factory),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        merged = self.ln_q(x).unflatten(1, (-1, self.width // x.shape[-1])).flatten(2)
        return self.mlp(merged)  # [B, P / 4, width]


class VisionTower(nn.Module):
    """Encodes pictures of any sizes in one call, each on its own, as the official code does."""

    def __init__(self, config: VisionConfig, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config, operations, **factory)
        self.blocks = nn.ModuleList(
            VisionBlock(config, operations, **factory) for _ in range(config.depth)
        )
        self.merger = PatchMerger(config, operations, **factory)
        self.gradient_checkpointing = False

    def forward(self, pixels: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Patches [P, 1176] of all pictures -> image features [P / 4, hidden_size].

        Args:
            grids: rows and columns of patches of each picture. Neighbours of one size attend in
                one batch.
        """
        x = self.patch_embed(pixels[None])
        angles = torch.cat([self._angles(*grid) for grid in grids]).to(x.device)
        rotation = angles.cos(), angles.sin()
        lengths = [rows * columns for rows, columns in grids]
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, lengths, use_reentrant=False)
            else:
                x = block(x, rotation, lengths)
        return self.merger(x)[0]

    def _angles(self, rows: int, columns: int) -> torch.Tensor:
        """Rotary angles [P, head_dim] in float32, patches in 2x2 block order."""
        merge = self.config.spatial_merge_size
        quarter = self.config.embed_dim // self.config.num_heads // 2
        frequencies = 10000.0 ** (-torch.arange(0, quarter, 2, dtype=torch.float32) / quarter)
        row = torch.arange(rows)[:, None].expand(rows, columns)
        column = torch.arange(columns)[None, :].expand(rows, columns)
        grid = torch.stack((row, column), dim=-1)  # [rows, columns, 2]
        blocks = grid.reshape(rows // merge, merge, columns // merge, merge, 2)
        positions = blocks.permute(0, 2, 1, 3, 4).reshape(-1, 2).float()
        half = (positions[:, :, None] * frequencies).flatten(1)  # [P, head_dim / 2]
        return torch.cat((half, half), dim=-1)
