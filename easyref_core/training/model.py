"""The trained module: encoder and adapter around a frozen UNet.

Source: official training code. `checkpoint_name` gives parameters the official checkpoint's names
(`unet.<layer>.processor...`, `mllm_final_layer...`), by which they are frozen and saved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ..adapter.checkpoint import BODY, FINAL, PROJECTOR, AdapterCheckpoint, load_checkpoint
from ..adapter.weights import official_weights
from ..encode.check_plan import check_weights, check_whole_mllm
from ..encode.encoder import EasyRefEncoder
from ..encode.plan_encoder import Source, plan_encoder, read_sources
from ..errors import EasyRefError
from ..pictures.preprocessing import Patches
from ..qwen2vl.directory import MllmDirectory, open_directory
from ..qwen2vl.names import LAYERS, layer_number
from ..qwen2vl.prompt import PromptTokenizer
from ..sdxl_diffusers.adapter import attach_adapter, new_adapter
from ..sdxl_diffusers.unet_layers import official_name
from ..untrusted import escaped
from .config import ModelSettings
from .engine import TrainableModule
from .processes import FSDP_LAYERS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_PATCH_EMBED = BODY + "visual.patch_embed.proj.weight"
_AGAIN = "The MLLM's files do not fit its config.json; get all of them from one place."
_REFERENCE_STD = 0.1  # official initialisation of the reference tokens


@dataclass(frozen=True)
class Batch:
    """B samples whose targets have one size, each at L noise levels in consecutive rows.

    Attributes:
        noisy, noise: [B * L, C, h, w].
        timesteps, weights: [B * L]; a row's loss is multiplied by its weight.
        text: [B, 77, W]; pooled: [B, P]; time_ids: [B, 6].
        references: preprocessed images of each sample.
        captions: prompts that the MLLM gets with them.
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


class TrainedModel(TrainableModule):
    """Encoder and UNet with adapter; calling it returns the loss of each sample.

    Args:
        average: each image is encoded alone, and a group's tokens are averaged.
        carries_mllm: checkpoints must hold the MLLM, because it differs from the published one.
        source: the adapter that training starts from.
    """

    _no_split_modules = FSDP_LAYERS  # where accelerate looks for them

    def __init__(
        self,
        unet: UNet2DConditionModel,
        encoder: EasyRefEncoder,
        tokenizer: PromptTokenizer,
        average: bool = False,
        carries_mllm: bool = False,
        source: AdapterCheckpoint | None = None,
    ) -> None:
        super().__init__()
        self.source = source
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
            tokens = self._encode(alone, repeated).split([len(group) for group in references])
            return torch.stack([of_group.mean(0) for of_group in tokens])
        return self._encode(references, captions)

    def _encode(
        self, references: Sequence[Sequence[Patches]], captions: Sequence[str]
    ) -> torch.Tensor:
        """Reference tokens [B, N, W], one MLLM pass per group."""
        device = self.encoder.mllm_final_layer.reference_tokens.device
        images = [image for group in references for image in group]
        features = iter(self.encoder.encode_images(images, device))
        embeds = []
        for group, caption in zip(references, captions, strict=True):
            prompt = self._tokenizer.tokenize([image.num_tokens for image in group], caption)
            embeds.append(self.encoder.embed(prompt, [next(features) for _ in group], device))
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
    if ".processor." in name:
        return "lora" if "_lora." in name else "cross_attention"
    return None


def build_model(
    unet: UNet2DConditionModel, settings: ModelSettings, parts: Sequence[str], seed: int
) -> TrainedModel:
    """Put encoder and adapter around a base UNet, and freeze all but `parts`.

    A new adapter is initialised as officially: to_k_ip and to_v_ip from the base's to_k and to_v,
    the final layers from the MLLM's last, reference tokens from 0.1 * randn. The adapter of the
    stage before is continued; a LoRA it does not have yet starts from zero.

    Raises:
        EasyRefError: models that do not fit together.
    """
    tokenizer = PromptTokenizer.from_directory(settings.mllm)
    source = None if settings.adapter is None else load_checkpoint(settings.adapter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source is None:
            new_adapter(unet, settings.reference_tokens, settings.lora_rank)
            encoder = _new_encoder(unet, settings)
        else:
            _check_sizes(settings, source)
            attach_adapter(unet, source, new_lora_rank=settings.lora_rank)
            encoder = plan_encoder(source, settings.mllm).build()
    model = TrainedModel(
        unet,
        encoder,
        tokenizer,
        average=settings.aggregation == "average",
        carries_mllm="mllm" in parts or (source is not None and source.has_mllm),
        source=source,
    )
    for name, parameter in model.named_parameters():
        trained = part_of(model.checkpoint_name(name)) in parts
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    return model


def _check_sizes(settings: ModelSettings, checkpoint: AdapterCheckpoint) -> None:
    has = (checkpoint.num_tokens, checkpoint.final_layers)
    wanted = (settings.reference_tokens, settings.final_layers)
    if has != wanted or (checkpoint.lora_rank and checkpoint.lora_rank != settings.lora_rank):
        raise EasyRefError(
            f"model.adapter {checkpoint.name} has {has[0]} reference tokens, {has[1]} final "
            f"layers and LoRA rank {checkpoint.lora_rank}; the recipe says {wanted[0]}, "
            f"{wanted[1]} and {settings.lora_rank}. Make the recipe say what the adapter has."
        )


def _new_encoder(unet: UNet2DConditionModel, settings: ModelSettings) -> EasyRefEncoder:
    directory = open_directory(settings.mllm)
    if settings.final_layers > directory.config.num_layers:
        raise EasyRefError(
            f"model.final_layers is {settings.final_layers}, but the MLLM in "
            f"{escaped(str(settings.mllm))} has {directory.config.num_layers} layers."
        )
    check_whole_mllm(directory)
    sizes = (
        directory.config,
        settings.reference_tokens,
        unet.config.cross_attention_dim,
        settings.final_layers,
    )
    sources = _mllm_sources(directory, settings.final_layers)
    skeleton = EasyRefEncoder(*sizes, device="meta").state_dict()
    check_weights(
        {name: tuple(p.shape) for name, p in skeleton.items() if not _is_new(name)},
        sources,
        directory,
        f"model.mllm: {escaped(str(settings.mllm))}",
        _AGAIN,
        lambda missing: _AGAIN,
    )
    encoder = EasyRefEncoder(*sizes)
    new = {name: weight for name, weight in encoder.state_dict().items() if _is_new(name)}
    encoder.load_state_dict(new | read_sources(sources, torch.float32))
    nn.init.normal_(encoder.mllm_final_layer.reference_tokens, std=_REFERENCE_STD)
    return encoder.eval()


def _is_new(name: str) -> bool:
    """Whether a weight is the adapter's own, so that it is initialised randomly."""
    return name.startswith(PROJECTOR) or name == FINAL + "reference_tokens"


def _mllm_sources(directory: MllmDirectory, final_layers: int) -> dict[str, Source]:
    """The directory's weights under official names: its last layers become the final ones, and
    its norm is used after both."""
    layers = directory.config.num_layers - final_layers
    sources: dict[str, Source] = {}
    for name, source in directory.sources().items():
        number = layer_number(name, LAYERS)
        if number is not None and number >= layers:
            rest = name.removeprefix(LAYERS).partition(".")[2]
            sources[f"{FINAL}layers.{number - layers}.{rest}"] = source
        else:
            sources[BODY + name] = source
        if name == "model.norm.weight":
            sources[FINAL + "norm.weight"] = source
    return sources
