"""How well an image follows the outline that a ControlNet was given.

Whole edge maps cannot be compared: hills, houses and stars have edges too, which the outline does
not ask for. So only the outline's own figure counts: its silhouette, grown by a few pixels. Within
it the image's edges, inner lines included, are compared with the outline. A figure that stands
elsewhere, has another shape or other eyes loses overlap; the scene around it costs nothing.
Edges are where neighbouring pixels differ in any channel, so day and night images are treated
alike, and lines are thickened, so that being one pixel off costs little.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_EDGE = 35  # levels; chosen on drawn training images, sharp and blurred ones
_GROWN = 4  # pixels around the silhouette


def overlap(pixels: torch.Tensor, outlines: torch.Tensor) -> torch.Tensor:
    """Intersection over union of edges and outline, [B] in 0..1; 0 where the outline is empty.

    Args:
        pixels: [B, 3, S, S] uint8.
        outlines: [B, 3, S, S] uint8, white on black.
    """
    drawn = _grow(_lines(outlines), 1)
    region = _grow(silhouette(outlines), _GROWN) > 0
    figure_edges = edges(pixels) * region
    both = (drawn * figure_edges).flatten(1).sum(1)
    either = torch.maximum(drawn, figure_edges).flatten(1).sum(1)
    return both / either.clamp(min=1)


def silhouette(outlines: torch.Tensor) -> torch.Tensor:
    """The area that an outline encloses, with its thickened lines: [B, 1, S, S] of 0 and 1."""
    lines = _grow(_lines(outlines), 1)  # closes gaps of a pixel or two
    free = 1 - lines
    outside = torch.zeros_like(lines)
    outside[:, :, 0], outside[:, :, -1] = 1, 1
    outside[:, :, :, 0], outside[:, :, :, -1] = 1, 1
    outside = outside * free
    # Flood fill from the border.
    while True:
        flowed = _grow(outside, 1) * free
        if torch.equal(flowed, outside):
            return 1 - outside
        outside = flowed


def edges(pixels: torch.Tensor) -> torch.Tensor:
    """Where uint8 images [B, 3, S, S] change sharply: [B, 1, S, S] of 0 and 1."""
    levels = pixels.float()
    differences = F.max_pool2d(levels, 3, 1, 1) + F.max_pool2d(-levels, 3, 1, 1)
    return (differences.amax(1, keepdim=True) > _EDGE).float()


def _lines(outlines: torch.Tensor) -> torch.Tensor:
    return (outlines.amax(1, keepdim=True) > 127).float()


def _grow(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return F.max_pool2d(mask, 2 * pixels + 1, 1, pixels)
