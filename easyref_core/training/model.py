"""The trained module: encoder and adapter around a frozen UNet.

`checkpoint_name` gives parameters the official checkpoint's names
(`unet.<layer>.processor...`, `mllm_final_layer...`), by which they are frozen and saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from ..adapter.checkpoint import BODY, FINAL, PROJECTOR, AdapterCheckpoint
from ..adapter.layer_pooling import POOLING, POOLS
from ..adapter.weights import official_weights
from ..encode.encoder import EasyRefEncoder
from ..encode.layer_pooling import Pooling
from ..pictures.preprocessing import Patches
from ..qwen2vl.prompt import PromptTokenizer
from ..sdxl_diffusers.identity_run import IdentityRun
from ..sdxl_diffusers.layers import IDENTITY
from ..sdxl_diffusers.unet_layers import official_name
from .engine import TrainableModule
from .processes import FSDP_LAYERS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_PATCH_EMBED = BODY + "visual.patch_embed.proj.weight"


@dataclass(frozen=True)
class Batch:
    """B samples whose targets have one size, each at L noise levels in consecutive rows.

    Attributes:
        noisy, noise: [B * L, C, h, w].
        timesteps, weights: [B * L]; a row's loss is multiplied by its weight.
        text: [B, 77, W]; pooled: [B, P]; time_ids: [B, 6].
        references: preprocessed images of each sample.
        captions: prompts that the MLLM gets with them.
        token_weights: [B], 1, or 0 where a sample's reference tokens are left out; None for all 1.
        identity: the references that self-attention attends to; None for none.
    """

    noisy: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    weights: torch.Tensor
    text: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    references: Sequence[Sequence[Patches]]
    captions: Sequence[str]
    token_weights: torch.Tensor | None = None
    identity: IdentityRun | None = None


class TrainedModel(TrainableModule):
    """Encoder and UNet with adapter; calling it returns the loss of each sample.

    Args:
        aggregation: see `ModelSettings`.
        carries_mllm: checkpoints must hold the MLLM, because it differs from the published one.
        source: the adapter that training starts from.
    """

    _no_split_modules = FSDP_LAYERS  # where accelerate looks for them

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoder: EasyRefEncoder,
        tokenizer: PromptTokenizer,
        aggregation: str = "easyref",
        carries_mllm: bool = False,
        source: AdapterCheckpoint | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.carries_mllm = carries_mllm
        self.unet = unet
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._aggregation = aggregation

    def tokens(
        self, references: Sequence[Sequence[Patches]], captions: Sequence[str]
    ) -> torch.Tensor:
        """Reference tokens [B, N, W] of a batch of groups."""
        if self._aggregation == "average":
            alone = [[picture] for group in references for picture in group]
            repeated = [c for g, c in zip(references, captions, strict=True) for _ in g]
            tokens = self._encode(alone, repeated).split([len(group) for group in references])
            return torch.stack([of_group.mean(0) for of_group in tokens])
        return self._encode(references, captions)

    def _encode(
        self, references: Sequence[Sequence[Patches]], captions: Sequence[str]
    ) -> torch.Tensor:
        """Reference tokens [B, N, W], one MLLM pass per group."""
        device = self.encoder.mllm_final_layer.reference_tokens.device
        images = [image for group in references for image in group]
        embeds, pooling = [], []
        trained = any(p.requires_grad for p in self.encoder.multimodal_llm.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            features = iter(self.encoder.encode_images(images, device))
            for group, caption in zip(references, captions, strict=True):
                prompt = self._tokenizer.tokenize([image.num_tokens for image in group], caption)
                embeds.append(self.encoder.embed(prompt, [next(features) for _ in group], device))
                pooling.append(Pooling(self._aggregation, prompt.image_spans))
        pooled = pooling if self._aggregation in POOLS else None
        return self.encoder.project(self.encoder.batch_reference_states(embeds, pooled))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Weighted mean squared error on the noise, [B] in float32."""
        tokens = self.tokens(batch.references, batch.captions)
        if batch.token_weights is not None:
            # to_k_ip and to_v_ip have no bias, so tokens of zeros add exactly nothing.
            tokens = tokens * batch.token_weights[:, None, None].to(tokens)
        states = torch.cat((batch.text, tokens.to(batch.text)), dim=1)
        levels = len(batch.noisy) // len(states)
        added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        identity = None if batch.identity is None else {IDENTITY: batch.identity}
        predicted = self.unet(
            batch.noisy,
            batch.timesteps,
            states.repeat_interleave(levels, 0),  # [B * L, 77 + N, W]
            added_cond_kwargs={k: v.repeat_interleave(levels, 0) for k, v in added.items()},
            cross_attention_kwargs=identity,
        ).sample
        errors = F.mse_loss(predicted.float(), batch.noise.float(), reduction="none")
        rows = errors.mean((1, 2, 3)) * batch.weights
        if identity is None:
            rows = rows + self._without_identity()
        return rows.unflatten(0, (-1, levels)).mean(1)

    def _without_identity(self) -> torch.Tensor | float:
        """0, of which a trained identity LoRA has a gradient all the same: processes exchange
        those of every trained weight."""
        named = self.unet.named_parameters()
        trained = [p for n, p in named if "_identity_lora." in n and p.requires_grad]
        return sum((p.sum() * 0 for p in trained), start=0.0)

    @property
    def metadata(self) -> dict[str, str]:
        """Of the checkpoints: which hidden states the layer pools read, where there are any."""
        pools = self.encoder.mllm_layer_pooling
        return {} if pools is None else pools.sizes.metadata

    def checkpoint_name(self, name: str) -> str:
        """A parameter's name in the official checkpoint."""
        return official_name(name.removeprefix("encoder."))

    def checkpoint_state(
        self,
        state: Mapping[str, torch.Tensor] | None = None,
        replaced: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Weights under the official names, trained or not, but without the base.

        The MLLM is included only if it has been trained, now or before (officially: from the second
        stage on); until then every user of the checkpoint has it already. What is not trained stays
        to the bit what it is in the file that training starts from, in whichever precision this
        module holds it.

        Raises:
            EasyRefError: that file has changed.
        """
        replaced = replaced or {}
        weights = self._unchanged()
        for own_name, weight in (self.state_dict() if state is None else state).items():
            name = self.checkpoint_name(own_name)
            part = part_of(name)
            if part is None or name in weights or (part == "mllm" and not self.carries_mllm):
                continue
            weight = replaced.get(name, weight).detach().cpu()
            if name == _PATCH_EMBED:
                vision = self.encoder.config.vision
                patch = (vision.patch_size, vision.patch_size)
                weight = weight.reshape(-1, vision.in_channels, vision.temporal_patch_size, *patch)
            weights[name] = weight.contiguous()
        return weights

    def _unchanged(self) -> dict[str, torch.Tensor]:
        """The weights of the adapter's file that are not trained, by official name."""
        if self.source is None:
            return {}
        trained = self.trained_parameters()
        names = official_weights(self.source)
        return self.source.file.read({n: s for n, s in names.items() if n not in trained})


def part_of(name: str) -> str | None:
    """The part (one of `config.PARTS`) of a parameter, by its official name; None: the base."""
    if name.startswith(FINAL):
        return "final_layers"
    if name.startswith(PROJECTOR):
        return "projector"
    if name.startswith(BODY):
        return "mllm"
    if name.startswith(POOLING):
        return "layer_pooling"
    if "_identity_lora." in name:
        return "identity"
    if ".processor." in name:
        return "lora" if "_lora." in name else "cross_attention"
    return None
