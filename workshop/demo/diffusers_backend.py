"""The demo's pictures made without ComfyUI, on diffusers."""

from __future__ import annotations

import diffusers
import torch
from PIL import Image

from easyref_core.demo_set import shipped_set
from easyref_core.pictures.preprocessing import picture_levels

from .models import DemoAdapter, DemoModels, Steering
from .parts import Material, Pictures, Row, RowPictures, Settings


def make_pictures(material: Material) -> Pictures:
    """Load the demo models and sample every picture on the CPU.

    Raises:
        EasyRefError: models that cannot be loaded.
    """
    models = DemoModels(shipped_set(), half=False)  # as ComfyUI on a CPU
    adapter = models.adapter()
    rows = tuple(_make_row(models, adapter, row, material.settings) for row in material.rows)
    return Pictures(rows, f"diffusers {diffusers.__version__}")


def _make_row(
    models: DemoModels, adapter: DemoAdapter, row: Row, settings: Settings
) -> RowPictures:
    groups, prompts, seeds = [row.references], [row.prompt], [settings.seed]
    together = Steering(adapter, adapter.encode(groups, prompts))
    averaged = Steering(adapter, adapter.encode(groups, prompts, average=True))
    outline = row.outline.convert("RGB").resize((settings.side,) * 2, Image.Resampling.BILINEAR)

    def sample(
        steering: Steering | None = None, outlines: torch.Tensor | None = None
    ) -> Image.Image:
        pixels = models.sample(prompts, seeds, settings, steering, outlines)[0]
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGB")

    return RowPictures(
        prompt_only=sample(),
        easyref=sample(together),
        controlled=sample(together, picture_levels(outline)[None]),
        averaged=sample(averaged),
    )
