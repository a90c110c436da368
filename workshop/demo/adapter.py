"""An EasyRef adapter on a demo UNet: encodes groups of references in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.adapter.stages import Window
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.pictures.preprocessing import black_picture, preprocess
from easyref_core.qwen2vl import casting
from easyref_core.qwen2vl.prompt import PromptTokenizer
from easyref_core.sdxl_diffusers.adapter import attach_adapter
from easyref_core.sdxl_diffusers.identity import attach_identity
from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents
from easyref_core.tokens.reference_tokens import ReferenceTokens, join_prompts
from easyref_core.training.model import TrainedModel

_BATCH = 16  # groups encoded at once


@dataclass(frozen=True)
class DemoAdapter:
    """An adapter on a UNet of its own, with its encoder."""

    checkpoint: AdapterCheckpoint
    unet: UNet2DConditionModel
    encoder: EasyRefEncoder
    tokenizer: PromptTokenizer

    @torch.no_grad()
    def encode(
        self,
        groups: Sequence[Sequence[Image.Image]],
        prompts: Sequence[str],
        average: bool = False,
    ) -> ReferenceTokens:
        """Encode groups of references, each with its prompt, as `encode_references` does one.

        Args:
            groups: RGB images of any sizes, in order.
            average: encode each image alone and average their tokens.

        Returns:
            Tokens [B, N, W], one row per group.

        Raises:
            EasyRefError: no group, or an empty one.
        """
        if not groups or not all(groups):
            raise EasyRefError("There is a group without images. Give each at least one.")
        size = self.checkpoint.image_size
        aggregation = "average" if average else "easyref"
        model = TrainedModel(self.unet, self.encoder, self.tokenizer, aggregation)
        batches = []
        for start in range(0, len(groups), _BATCH):
            part = slice(start, start + _BATCH)
            images = [[preprocess(image, size) for image in group] for group in groups[part]]
            batches.append(model.tokens(images, prompts[part]))
        cond = torch.cat(batches).float().cpu()
        uncond = model.tokens([[preprocess(black_picture(), size)]], [""]).float().cpu()
        return ReferenceTokens(
            cond,
            uncond.repeat(len(cond), 1, 1),
            self.checkpoint.identity,
            self.checkpoint.name,
            join_prompts(prompts),
            sum(map(len, groups)),
            aggregation,
        )


@dataclass(frozen=True)
class AppliedIdentity:
    """Latents of references, which self-attention attends to.

    Attributes:
        latents: one group per image.
        window: weight by place in the sampling.
    """

    latents: Sequence[IdentityLatents]
    window: Window


@dataclass(frozen=True)
class AppliedReferences:
    """An adapter with the reference tokens to sample with.

    Attributes:
        tokens: one row per image, or one for all.
        weight: of EasyRef's cross-attention; at 0 only the adapter's LoRA has an effect.
        identity: with the adapter's identity LoRA, where it has one.
    """

    adapter: DemoAdapter
    tokens: ReferenceTokens
    weight: float = 1.0
    identity: AppliedIdentity | None = None


def load_adapter(
    path: Path, mllm: Path, unet: UNet2DConditionModel, int8: bool = False
) -> DemoAdapter:
    """Attach an adapter file to a UNet, which becomes its own.

    Args:
        mllm: Qwen2-VL directory; without weights, the adapter must carry them.
        int8: round the MLLM's weights, see `EncoderPlan.build`.

    Raises:
        EasyRefError: missing, damaged, or made for other models.
    """
    checkpoint = load_checkpoint(path)
    attach_adapter(unet, checkpoint)
    attach_identity(unet)
    return DemoAdapter(
        checkpoint,
        unet.eval(),
        plan_encoder(checkpoint, mllm).build(operations=casting, int8=int8).to(unet.device),
        PromptTokenizer.from_directory(mllm),
    )
