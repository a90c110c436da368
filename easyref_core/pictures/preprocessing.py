"""From a picture of any size to patches, the input of Qwen2-VL's vision tower.

Source: official code, which resizes twice with PIL's bicubic filter: first as qwen_vl_utils'
`fetch_image` does, then as the Qwen2-VL image processor does with limits that follow from
`cond_image_size`. A single resize gives other pixels and often another grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from .sizes import DEFAULT_IMAGE_SIZE, FRAMES, MERGE, PATCH, plan_sizes

_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
_STD = (0.26862954, 0.26130258, 0.27577711)
_FILTER = Image.Resampling.BICUBIC


@dataclass(frozen=True)
class Patches:
    """One preprocessed picture.

    Attributes:
        pixels: [rows * columns, 1176] float32, patches in 2x2 blocks.
        rows, columns: the patch grid; the vision tower merges 2x2 into one token.
    """

    pixels: torch.Tensor
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns // MERGE**2


def preprocess(image: Image.Image, image_size: int = DEFAULT_IMAGE_SIZE) -> Patches:
    """Resize an RGB picture twice, normalise it and cut it into patches.

    Raises:
        EasyRefError: too elongated, or `image_size` too small.
    """
    image = resize(image, image_size)
    pixels = cut(normalise(picture_levels(image)))
    return Patches(pixels, image.height // PATCH, image.width // PATCH)


def reduced(image: Image.Image, image_size: int) -> Image.Image:
    """A smaller picture with exactly the same patches after `preprocess`, or the same picture
    where there is none.

    Raises:
        EasyRefError: as `preprocess`.
    """
    _, (width, height) = plan_sizes(*image.size, image_size)
    smaller = width * height < image.width * image.height
    unchanged = plan_sizes(width, height, image_size) == ((width, height),) * 2
    return resize(image, image_size) if smaller and unchanged else image


def resize(image: Image.Image, image_size: int) -> Image.Image:
    """Resize an RGB picture twice, as `preprocess` does.

    Raises:
        EasyRefError: too elongated, or `image_size` too small.
    """
    first, second = plan_sizes(image.width, image.height, image_size)
    return _bicubic(_bicubic(image, first), second)


def _bicubic(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """PIL's bicubic resize in the axis order of Pillow 13, the same with every version.

    PIL resizes one axis after the other and rounds in between, so the order changes a few pixels.
    Pillow 13 starts with the height where that shrinks enough; older versions with the width.
    """
    width, height = size
    shorter, narrower = image.height - height, image.width - width
    height_first = shorter > 0 and shorter > 2 * narrower
    between = (image.width, height) if height_first else (width, image.height)
    return image.resize(between, _FILTER).resize(size, _FILTER)


def picture_levels(image: Image.Image) -> torch.Tensor:
    """[channels, H, W] uint8"""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def normalise(levels: torch.Tensor) -> torch.Tensor:
    """uint8 levels [..., 3, H, W] to float32. Scaled in double precision first, as the official
    processor's numpy."""
    scaled = (levels.double() * (1 / 255)).float()
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (_MEAN, _STD))
    return (scaled - mean) / std


def cut(pixels: torch.Tensor) -> torch.Tensor:
    """[..., 3, H, W] -> patches [..., rows * columns, 3 * 2 * 14 * 14], the still frame doubled in
    time."""
    from einops import rearrange, repeat

    blocks = rearrange(
        pixels,
        "... c (h mh ph) (w mw pw) -> ... (h w mh mw) c ph pw",
        mh=MERGE,
        mw=MERGE,
        ph=PATCH,
        pw=PATCH,
    )
    return repeat(blocks, "... n c ph pw -> ... n (c t ph pw)", t=FRAMES).contiguous()


def black_picture() -> Image.Image:
    """The official unconditional branch's only reference."""
    return Image.new("RGB", (512, 512))
