"""Identity: self-attention that also attends to the references' features.

own = softmax(q k^T) v of a self-attention layer, as it is; joint = the same over its own and the
references' keys and values, side by side along the positions, with one softmax. The layer's output
before `to_out` becomes own + weight * (joint - own).

The references' features are the inputs of the same layer, after its norm, in a pass of the same
UNet over the references' noised latents: the idea of "reference-only" control, which needs no
training. Keys and values are the layer's own projections of the features; a trained adapter may add
a LoRA to these two, on the features alone. `weight` 0 computes nothing.

Source: identity from VAE latents, arXiv 2605.26111; here on a UNet. One softmax over both is the
attention of consistent self-attention (StoryDiffusion, arXiv 2405.01434).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention import Attend

_SIZE_MULTIPLE = 64
"""Sides of a reference in pixels are multiples of this: 8 for the VAE, 8 for the UNet."""


@dataclass(frozen=True, eq=False)
class IdentityLora:
    """A LoRA on a self-attention layer's keys and values of the references' features.

    Attributes:
        key_down, value_down: [rank, C].
        key_up, value_up: [C, rank]; no alpha.
    """

    key_down: torch.Tensor
    key_up: torch.Tensor
    value_down: torch.Tensor
    value_up: torch.Tensor

    def to(self, like: torch.Tensor) -> IdentityLora:
        """On the device and in the dtype of `like`."""
        weights = (self.key_down, self.key_up, self.value_down, self.value_up)
        return IdentityLora(*(weight.to(like) for weight in weights))

    def key(self, features: torch.Tensor) -> torch.Tensor:
        """[..., C] -> what is added to their keys, [..., C]."""
        return F.linear(F.linear(features, self.key_down), self.key_up)

    def value(self, features: torch.Tensor) -> torch.Tensor:
        """[..., C] -> what is added to their values, [..., C]."""
        return F.linear(F.linear(features, self.value_down), self.value_up)


@dataclass(frozen=True, eq=False)
class IdentityShare:
    """The references' keys and values for some rows and positions of a self-attention layer.

    Attributes:
        key, value: [R, S, C] for the R rows, or [1, S, C] for any number; S positions of all
            references together.
        weight: a number, or a tensor that broadcasts to [R, P, 1] for the P positions.
        rows: which of the B rows, None for all.
        positions: [P] which of the T positions ask the references, None for all.
    """

    key: torch.Tensor
    value: torch.Tensor
    weight: float | torch.Tensor
    rows: slice | None = None
    positions: torch.Tensor | None = None


def add_identity(
    own: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shares: Sequence[IdentityShare],
    attend: Attend,
) -> torch.Tensor:
    """own + weight * (joint - own) for each share, at its rows and positions.

    Several shares at the same place add what each would add alone, in any order. Without shares, or
    where every weight is the number 0, it is `own` itself.

    Args:
        own, query, key, value: [B, T, C] of the layer, `own` being its attention's output; none is
            changed.
        attend: the host's attention of (query [R, P, C], key and value [R, T + S, C]).

    Returns:
        [B, T, C].
    """
    out = own
    for share in shares:
        if isinstance(share.weight, (int, float)) and share.weight == 0:
            continue
        rows = slice(None) if share.rows is None else share.rows
        asked, before = query[rows], own[rows]
        if share.positions is not None:
            asked = asked.index_select(1, share.positions)
            before = before.index_select(1, share.positions)
        joint = attend(asked, _beside(key[rows], share.key), _beside(value[rows], share.value))
        everywhere = share.positions is None and joint.shape == own.shape and len(shares) == 1
        if everywhere and isinstance(share.weight, (int, float)) and share.weight == 1:
            return joint  # no gradient through `own`, which has no part in it
        added = ((joint - before) * share.weight).to(own.dtype)
        if share.rows is None and share.positions is None:
            out = out + added
            continue
        if out is own:
            out = own.clone(memory_format=torch.contiguous_format)
        if share.positions is None:
            out[rows] += added
        else:
            out[rows].index_add_(1, share.positions, added)
    return out


def _beside(own: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """[R, T, C] and [R or 1, S, C] -> [R, T + S, C]."""
    return torch.cat((own, references.expand(len(own), -1, -1).to(own.dtype)), dim=1)


def reference_size(width: int, height: int, area: int) -> tuple[int, int]:
    """Width and height to which a reference is resized, in pixels: about the sample's area, its own
    aspect ratio, in multiples of 64 pixels; nothing is cut off.

    Args:
        width, height: of the picture, 1 or more.
        area: width times height of the sample in pixels.
    """

    def side(along: int, across: int) -> int:
        return max(1, round((area * along / across) ** 0.5 / _SIZE_MULTIPLE)) * _SIZE_MULTIPLE

    return side(width, height), side(height, width)


def reference_noise(shape: Sequence[int], seed: int, reference: int) -> torch.Tensor:
    """The noise of a reference, the same for every step, pass and device.

    Args:
        shape: of its latent, without the batch.
        reference: its number, from 0; each has noise of its own.

    Returns:
        float32 on the CPU.
    """
    generator = torch.Generator().manual_seed((seed + reference) % 2**64)
    return torch.randn(tuple(shape), generator=generator)


def passes(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """References that share a pass of the UNet: their numbers, those of one size together."""
    groups: dict[tuple[int, int], list[int]] = {}
    for number, size in enumerate(sizes):
        groups.setdefault(size, []).append(number)
    return list(groups.values())


def relative_error(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """How far reused features are from new ones: |old - new| / |new| over all layers.

    Args:
        pairs: (new, old) features of each layer, of one shape.

    Returns:
        A float32 number on the features' device, so that measuring does not wait for it.
    """
    norms = [(_square(old.float() - new.float()), _square(new.float())) for new, old in pairs]
    if not norms:
        return torch.zeros(())
    off, whole = (torch.stack(column).sum() for column in zip(*norms, strict=True))
    return (off / whole.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()
