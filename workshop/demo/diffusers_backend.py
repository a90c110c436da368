"""The demo's images, sampled by diffusers."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import torch
from PIL import Image

from easyref_core.adapter.stages import Window
from easyref_core.demo_set import shipped_set
from easyref_core.pictures.preprocessing import picture_levels

from .adapter import AppliedIdentity, AppliedReferences, DemoAdapter
from .models import DemoModels
from .rows import DemoImages, DemoInputs, Row, RowImages, SamplingSettings


def make_images(inputs: DemoInputs) -> DemoImages:
    """Load the demo models and sample every image on the CPU.

    Raises:
        EasyRefError: models that cannot be loaded.
    """
    models = DemoModels(shipped_set(), half=False)  # as ComfyUI on a CPU
    adapter = models.adapter()
    rows = tuple(_make_row(models, adapter, row, inputs.settings) for row in inputs.rows)
    return DemoImages(rows, f"diffusers {diffusers.__version__}")


def _make_row(
    models: DemoModels, adapter: DemoAdapter, row: Row, settings: SamplingSettings
) -> RowImages:
    groups, prompts, seeds = [row.references], [row.prompt], [settings.seed]
    together = AppliedReferences(adapter, adapter.encode(groups, prompts))
    averaged = AppliedReferences(adapter, adapter.encode(groups, prompts, average=True))
    identity = None
    if adapter.checkpoint.identity_lora:
        latents = models.identity_latents(groups, settings.side)
        window = Window(start=settings.identity_start, weight=settings.identity_weight)
        identity = replace(together, identity=AppliedIdentity(latents, window))
    outline = row.outline.convert("RGB").resize((settings.side,) * 2, Image.Resampling.BILINEAR)

    def sample(
        references: AppliedReferences | None = None,
        outlines: torch.Tensor | None = None,
        prompt: str = row.prompt,
    ) -> Image.Image:
        pixels = models.sample([prompt], seeds, settings, references, outlines)[0]
        return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), "RGB")

    return RowImages(
        prompt_only=sample(),
        described=sample(prompt=row.description),
        easyref=sample(together),
        controlled=sample(together, picture_levels(outline)[None]),
        averaged=sample(averaged),
        identity=sample(identity) if identity else None,
    )
