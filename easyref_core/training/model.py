"""What is trained: encoder and adapter around a frozen UNet, in one module.

Source: official training code. Parameters keep the official checkpoint's names
(`unet.<layer>.processor...`, `mllm_final_layer...`), so freezing, saving and exporting go by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter.checkpoint import BODY, FINAL, PROJECTOR, AdapterCheckpoint, load_checkpoint
from ..encode.encoder import EasyRefEncoder
from ..encode.plan_encoder import Source, plan_encoder, read_sources
from ..errors import EasyRefError
from ..pictures.preprocessing import Patches
from ..qwen2vl.directory import MllmDirectory, look_at_directory
from ..qwen2vl.prompt import PromptTokenizer
from ..sdxl_diffusers.adapter import attach_adapter, new_adapter
from .config import ModelSettings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_LAYERS = "model.layers."
_REFERENCE_STD = 0.1  # official initialisation of the reference tokens


@dataclass(frozen=True)
class Batch:
    """A batch on its way through the UNet, all targets of one size.

    Each of the B samples stands there with L noise levels, one after the other.

    Attributes:
        noisy, noise: [B * L, C, h, w].
        timesteps, weights: [B * L]; a row's loss is multiplied with its weight.
        text: [B, 77, W]; pooled: [B, P]; time_ids: [B, 6].
        references: pictures of each sample.
        captions: what the MLLM reads with them.
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


class TrainedModel(nn.Module):
    """Encoder and UNet with adapter; calling it gives the loss of each sample.

    Args:
        average: each picture is read alone, and a group's tokens averaged.
        carries_mllm: the MLLM is not the one everybody has, so checkpoints must hold it.
    """

    # What FSDP may gather by itself, found there by accelerate: every process calls these equally
    # often, one UNet pass and one of the decoder a batch. The vision tower sees a batch's pictures
    # in as many passes as they have shapes.
    _no_split_modules = ("DecoderLayer", "BasicTransformerBlock")

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoder: EasyRefEncoder,
        tokenizer: PromptTokenizer,
        average: bool = False,
        carries_mllm: bool = False,
    ) -> None:
        super().__init__()
        self.carries_mllm = carries_mllm
        self.unet = unet
        self.encoder = encoder
        self._tokenizer = tokenizer
        self._average = average

    def tokens(
        self, references: Sequence[Sequence[Patches]], captions: Sequence[str]
    ) -> torch.Tensor:
        """Reference tokens [B, N, W] of a batch of groups."""
        if self._average:
            alone = [[picture] for group in references for picture in group]
            repeated = [c for g, c in zip(references, captions, strict=True) for _ in g]
            tokens = self._read(alone, repeated).split([len(group) for group in references])
            return torch.stack([of_group.mean(0) for of_group in tokens])
        return self._read(references, captions)

    def _read(
        self, references: Sequence[Sequence[Patches]], captions: Sequence[str]
    ) -> torch.Tensor:
        """Tokens [B, N, W] of groups that are each read together."""
        device = self.encoder.mllm_final_layer.reference_tokens.device
        everything = [picture for group in references for picture in group]
        seen = iter(self.encoder.encode_images(everything, device))
        embeds = []
        for group, caption in zip(references, captions, strict=True):
            pictures = [next(seen) for _ in group]
            prompt = self._tokenizer.tokenize([p.num_tokens for p in group], caption)
            embeds.append(self.encoder.embed(prompt, pictures, device))
        return self.encoder.project(self.encoder.batch_reference_states(embeds))

    def forward(self, batch: Batch) -> torch.Tensor:
        """Weighted mean squared error on the noise, [B] in float32."""
        tokens = self.tokens(batch.references, batch.captions)
        states = torch.cat((batch.text, tokens.to(batch.text)), dim=1)
        levels = len(batch.noisy) // len(states)
        added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        predicted = self.unet(
            batch.noisy,
            batch.timesteps,
            states.repeat_interleave(levels, 0),  # [B * L, 77 + N, W]
            added_cond_kwargs={k: v.repeat_interleave(levels, 0) for k, v in added.items()},
        ).sample
        errors = F.mse_loss(predicted.float(), batch.noise.float(), reduction="none")
        rows = errors.mean((1, 2, 3)) * batch.weights
        return rows.unflatten(0, (-1, levels)).mean(1)

    def official_name(self, name: str) -> str:
        """A parameter's name in the official checkpoint."""
        return name.removeprefix("encoder.")


def part_of(name: str) -> str | None:
    """Which part (`config.PARTS`) a parameter belongs to by its official name; None: the base."""
    if name.startswith(FINAL):
        return "final_layers"
    if name.startswith(PROJECTOR):
        return "projector"
    if name.startswith(BODY):
        return "mllm"
    if ".processor." in name:
        return "lora" if "_lora." in name else "cross_attention"
    return None


def build_model(
    unet: UNet2DConditionModel, settings: ModelSettings, parts: Sequence[str], seed: int
) -> TrainedModel:
    """Put encoder and adapter around a base UNet, and freeze all but `parts`.

    A new adapter starts as the official one: to_k_ip and to_v_ip from the base's to_k and to_v,
    the final layers from the MLLM's last, reference tokens from 0.1 * randn. An adapter of the
    stage before is continued; a LoRA it does not have yet starts from zero.

    Raises:
        EasyRefError: parts do not fit together.
    """
    tokenizer = PromptTokenizer.from_directory(settings.mllm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if settings.adapter is None:
            new_adapter(unet, settings.reference_tokens, settings.lora_rank)
            encoder = _new_encoder(unet, settings)
            trained_before = False
        else:
            checkpoint = load_checkpoint(settings.adapter)
            _check_sizes(settings, checkpoint)
            attach_adapter(unet, checkpoint, new_lora_rank=settings.lora_rank)
            encoder = plan_encoder(checkpoint, settings.mllm).build()
            trained_before = checkpoint.has_mllm
    model = TrainedModel(
        unet,
        encoder,
        tokenizer,
        average=settings.aggregation == "average",
        carries_mllm=trained_before or "mllm" in parts,
    )
    for name, parameter in model.named_parameters():
        trained = part_of(model.official_name(name)) in parts
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    return model


def _check_sizes(settings: ModelSettings, checkpoint: AdapterCheckpoint) -> None:
    found = (checkpoint.num_tokens, checkpoint.final_layers)
    wanted = (settings.reference_tokens, settings.final_layers)
    if found != wanted or (checkpoint.lora_rank and checkpoint.lora_rank != settings.lora_rank):
        raise EasyRefError(
            f"model.adapter {checkpoint.name} has {found[0]} reference tokens, {found[1]} final "
            f"layers and LoRA rank {checkpoint.lora_rank}; the recipe says {wanted[0]}, "
            f"{wanted[1]} and {settings.lora_rank}. Make the recipe say what the adapter has."
        )


def _new_encoder(unet: UNet2DConditionModel, settings: ModelSettings) -> EasyRefEncoder:
    directory = look_at_directory(settings.mllm)
    if settings.final_layers > directory.config.num_layers:
        raise EasyRefError(
            f"model.final_layers is {settings.final_layers}, but the MLLM in {settings.mllm} has "
            f"{directory.config.num_layers} layers."
        )
    encoder = EasyRefEncoder(
        directory.config,
        settings.reference_tokens,
        unet.config.cross_attention_dim,
        settings.final_layers,
    )
    sources = _mllm_sources(directory, settings.final_layers)
    new = {name: weight for name, weight in encoder.state_dict().items() if _starts_new(name)}
    try:
        encoder.load_state_dict(new | read_sources(sources, torch.float32))
    except RuntimeError as error:
        raise EasyRefError(
            f"model.mllm: the weights in {settings.mllm} do not fit its config.json: {error} "
            "Download it again."
        ) from error
    nn.init.normal_(encoder.mllm_final_layer.reference_tokens, std=_REFERENCE_STD)
    return encoder.eval()


def _starts_new(name: str) -> bool:
    """Weights that no MLLM has, so that they start random."""
    return name.startswith(PROJECTOR) or name == FINAL + "reference_tokens"


def _mllm_sources(directory: MllmDirectory, final_layers: int) -> dict[str, Source]:
    """The directory's weights under official names: its last layers become the final ones, and
    its norm serves behind both."""
    layers = directory.config.num_layers - final_layers
    sources: dict[str, Source] = {}
    for name, source in directory.sources().items():
        number, _, rest = name.removeprefix(_LAYERS).partition(".")
        if name.startswith(_LAYERS) and int(number) >= layers:
            sources[f"{FINAL}layers.{int(number) - layers}.{rest}"] = source
        else:
            sources[BODY + name] = source
    sources[FINAL + "norm.weight"] = sources[BODY + "model.norm.weight"]
    return sources
