"""The demo's pictures made without ComfyUI: diffusers models, EasyRef's adapter, a DDIM loop.

CLIP's tokenizer cannot be had offline outside ComfyUI, so words are numbered by a checksum here:
the same words give the same ids, which is all that untrained text encoders can tell apart.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops, ImageFilter

from ..aggregation import Reference, encode_references
from ..checkpoint import load_checkpoint
from ..diffusers_adapter import attach_adapter
from ..loading import plan_encoder
from ..prompt import PromptTokenizer
from ..tokens import ReferenceTokens
from .parts import Material, Pictures, Settings
from .tiny import find_model_set

_START, _END, _LENGTH = 49406, 49407, 77


def make_pictures(material: Material) -> Pictures:
    """Load the demo models and sample every picture on the CPU."""
    import diffusers

    edges = find_edges(material.control)
    with tempfile.TemporaryDirectory(prefix="easyref_demo_") as scratch, torch.inference_mode():
        models = _Models(find_model_set(Path(scratch)), material.settings)
        references = models.read(material.references)
        others = models.read(material.others)
        return Pictures(
            models.sample(None),
            models.sample(references),
            models.sample(others),
            models.sample(references, control=edges),
            edges,
            f"diffusers {diffusers.__version__}",
        )


class _Models:
    """All models of a set, and what is computed with them."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        from diffusers import AutoencoderTiny, ControlNetModel, UNet2DConditionModel

        def load(kind: Any, name: str) -> Any:
            return kind.from_pretrained(directory / name, torch_dtype=torch.float32).eval()

        self._settings = settings
        self._checkpoint = load_checkpoint(directory / "easyref.safetensors")
        self._encoder = plan_encoder(self._checkpoint, directory / "mllm").build()
        self._tokenizer = PromptTokenizer.from_directory(directory / "mllm")
        self._plain = load(UNet2DConditionModel, "unet")
        self._steered = load(UNet2DConditionModel, "unet")
        attach_adapter(self._steered, self._checkpoint)
        self._control = load(ControlNetModel, "controlnet")
        self._vae = load(AutoencoderTiny, "vae")
        texts = [settings.negative, settings.prompt]
        self._text, self._pooled = _encode_texts(directory / "text_encoders", texts)

    def read(self, pictures: Sequence[Image.Image]) -> ReferenceTokens:
        """Reference tokens of a group, with the demo's prompt."""
        return encode_references(
            self._encoder,
            self._tokenizer,
            [Reference(picture) for picture in pictures],
            self._settings.prompt,
            adapter=self._checkpoint.identity,
            adapter_name=self._checkpoint.name,
        )

    def sample(
        self, tokens: ReferenceTokens | None, control: Image.Image | None = None
    ) -> Image.Image:
        """One picture; without tokens by the plain UNet, without the adapter's LoRA too."""
        from diffusers import DDIMScheduler

        settings = self._settings
        scheduler = DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        )
        scheduler.set_timesteps(settings.steps)
        unet, context = self._plain, self._text
        if tokens is not None:
            unet = self._steered
            # Rows in the order negative, conditional.
            context = torch.cat((context, torch.cat((tokens.uncond, tokens.cond))), dim=1)
        sizes = torch.tensor([[settings.side, settings.side, 0, 0, settings.side, settings.side]])
        added = {"text_embeds": self._pooled, "time_ids": sizes.repeat(2, 1).float()}
        hint = _tensor(control, settings.side).repeat(2, 1, 1, 1) if control is not None else None

        noise = torch.Generator().manual_seed(settings.seed)
        shape = (1, 4, settings.side // 8, settings.side // 8)
        latents = torch.randn(shape, generator=noise) * scheduler.init_noise_sigma
        for step in scheduler.timesteps:
            both = scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), step)
            residuals: dict[str, Any] = {}
            if hint is not None:
                down, middle = self._control(
                    both,
                    step,
                    self._text,
                    hint,
                    conditioning_scale=settings.control_strength,
                    added_cond_kwargs=added,
                    return_dict=False,
                )
                residuals = {
                    "down_block_additional_residuals": down,
                    "mid_block_additional_residual": middle,
                }
            predicted = unet(both, step, context, added_cond_kwargs=added, **residuals).sample
            negative, conditional = predicted.chunk(2)
            guided = negative + settings.cfg * (conditional - negative)
            latents = scheduler.step(guided, step, latents).prev_sample
        return _picture(self._vae.decode(latents / self._vae.config.scaling_factor).sample)


def find_edges(picture: Image.Image) -> Image.Image:
    """White lines on black where brightness or colour changes."""
    found = [channel.filter(ImageFilter.FIND_EDGES) for channel in picture.split()]
    strongest = ImageChops.lighter(ImageChops.lighter(found[0], found[1]), found[2])
    lines = strongest.point(lambda level: 255 if level > 60 else 0)
    lines.paste(0, (0, 0, lines.width, 1))  # the filter leaves the border as it was
    lines.paste(0, (0, lines.height - 1, lines.width, lines.height))
    lines.paste(0, (0, 0, 1, lines.height))
    lines.paste(0, (lines.width - 1, 0, lines.width, lines.height))
    return lines.convert("RGB")


def _encode_texts(directory: Path, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text states [texts, 77, width] and pooled states of both encoders."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    ids = torch.tensor([_stand_in_ids(text) for text in texts])
    small = CLIPTextModel.from_pretrained(directory / "clip_l").float().eval()
    large = CLIPTextModelWithProjection.from_pretrained(directory / "clip_g").float().eval()
    first = small(ids, output_hidden_states=True)
    second = large(ids, output_hidden_states=True)
    states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
    return states, second.text_embeds


def _stand_in_ids(text: str) -> list[int]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())[: _LENGTH - 2]
    ids = [_START, *(zlib.crc32(word.encode()) % _START for word in words)]
    return ids + [_END] * (_LENGTH - len(ids))


def _tensor(picture: Image.Image, side: int) -> torch.Tensor:
    """[1, 3, side, side] in 0..1."""
    import numpy as np

    small = picture.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)[None]


def _picture(decoded: torch.Tensor) -> Image.Image:
    """[1, 3, H, W] in -1..1 as a picture."""
    levels = ((decoded[0].permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(levels.numpy(), "RGB")
