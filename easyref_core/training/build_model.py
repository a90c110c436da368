"""Building the trained module: a new adapter, or one that is trained on, around a base UNet.

Source: official training code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..adapter.checkpoint import BODY, FINAL, PROJECTOR, AdapterCheckpoint, load_checkpoint
from ..adapter.layer_pooling import POOLING, POOLS, resolved_layers
from ..encode.check_plan import check_weights, check_whole_mllm
from ..encode.encoder import EasyRefEncoder
from ..encode.layer_pooling import add_layer_pools
from ..encode.plan_encoder import Source, plan_encoder, read_sources
from ..errors import EasyRefError
from ..qwen2vl.directory import MllmDirectory, open_directory
from ..qwen2vl.names import LAYERS, layer_number
from ..qwen2vl.prompt import PromptTokenizer
from ..sdxl_diffusers.adapter import attach_adapter, new_adapter
from ..sdxl_diffusers.identity import attach_identity
from ..untrusted import escaped
from .config import ModelSettings
from .model import TrainedModel, part_of

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_AGAIN = "The MLLM's files do not fit its config.json; get all of them from one place."
_REFERENCE_STD = 0.1  # official initialisation of the reference tokens


def build_model(
    unet: UNet2DConditionModel, settings: ModelSettings, parts: Sequence[str], seed: int
) -> TrainedModel:
    """Put encoder and adapter around a base UNet, and freeze all but `parts`.

    A new adapter is initialised as officially: to_k_ip and to_v_ip from the base's to_k and to_v,
    the final layers from the MLLM's last, reference tokens from 0.1 * randn. The adapter of the
    stage before is continued; a LoRA or identity LoRA it does not have yet starts from zero, layer
    pools from what the final layers read without them.

    Raises:
        EasyRefError: models that do not fit together.
    """
    tokenizer = PromptTokenizer.from_directory(settings.mllm)
    identity_rank = settings.identity_rank if "identity" in parts else 0
    source = None if settings.adapter is None else load_checkpoint(settings.adapter)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if source is None:
            new_adapter(unet, settings.reference_tokens, settings.lora_rank, identity_rank)
            encoder = _new_encoder(unet, settings)
        else:
            _check_sizes(settings, source)
            attach_adapter(
                unet,
                source,
                new_lora_rank=settings.lora_rank,
                new_identity_rank=identity_rank,
            )
            encoder = plan_encoder(source, settings.mllm).build()
        _pool_layers(encoder, settings, parts)
    if settings.identity_references:
        attach_identity(unet)
    model = TrainedModel(
        unet,
        encoder,
        tokenizer,
        aggregation=settings.aggregation,
        carries_mllm="mllm" in parts or (source is not None and source.has_mllm),
        source=source,
    )
    for name, parameter in model.named_parameters():
        trained = _is_trained(model.checkpoint_name(name), parts, settings.aggregation)
        parameter.requires_grad_(trained)
        if trained:
            parameter.data = parameter.data.float()
    return model


def _is_trained(name: str, parts: Sequence[str], aggregation: str) -> bool:
    """Whether a weight is trained, by its official name; pools of other aggregations are not."""
    part = part_of(name)
    if part == "layer_pooling" and name.removeprefix(POOLING).partition(".")[0] not in POOLS.get(
        aggregation, ()
    ):
        return False
    return part in parts


def _pool_layers(encoder: EasyRefEncoder, settings: ModelSettings, parts: Sequence[str]) -> None:
    """Give an encoder the pools of the recipe's aggregation, where it has none.

    Raises:
        EasyRefError: the adapter's pools are others than the recipe's; there are none, and none are
            trained; hidden states that the MLLM does not have.
    """
    pools = encoder.mllm_layer_pooling
    has = {} if pools is None else dict(pools.sizes.pools)
    needed = POOLS.get(settings.aggregation, ())
    if not needed:
        return
    own = {name: has[name].shape for name in needed if name in has}
    if any(shape != settings.pooling for shape in own.values()):
        raise EasyRefError(
            f"model.adapter {settings.adapter} pools the MLLM's layers by "
            f"{' and '.join(sorted(set(own.values())))}; the recipe says {settings.pooling}. Make "
            "model.pooling say what the adapter has."
        )
    layers = settings.mllm_layers
    wanted = resolved_layers(
        layers,
        len(encoder.multimodal_llm.model.layers),
        "model.mllm_layers",
        "Make model.mllm_layers end with it, or leave it out for all.",
    )
    if pools is not None and wanted != pools.sizes.layers:
        raise EasyRefError(
            f"model.adapter {settings.adapter} pools the hidden states "
            f"{', '.join(map(str, pools.sizes.layers))}; the recipe says "
            f"{'all' if layers is None else ', '.join(map(str, layers))}. Make model.mllm_layers "
            "say what the adapter has."
        )
    if len(own) < len(needed) and "layer_pooling" not in parts:
        raise EasyRefError(
            f"model.adapter has no layer pooling for model.aggregation {settings.aggregation}. "
            "Train it with the part layer_pooling, or name an adapter that has it."
        )
    add_layer_pools(encoder, settings.aggregation, settings.pooling, layers)


def _check_sizes(settings: ModelSettings, checkpoint: AdapterCheckpoint) -> None:
    has = (checkpoint.num_tokens, checkpoint.final_layers)
    wanted = (settings.reference_tokens, settings.final_layers)
    if has != wanted or (checkpoint.lora_rank and checkpoint.lora_rank != settings.lora_rank):
        raise EasyRefError(
            f"model.adapter {checkpoint.name} has {has[0]} reference tokens, {has[1]} final "
            f"layers and LoRA rank {checkpoint.lora_rank}; the recipe says {wanted[0]}, "
            f"{wanted[1]} and {settings.lora_rank}. Make the recipe say what the adapter has."
        )
    rank = checkpoint.identity_lora_rank
    if rank and settings.identity_references and rank != settings.identity_rank:
        raise EasyRefError(
            f"model.adapter {checkpoint.name} has an identity LoRA of rank {rank}; the recipe says "
            f"{settings.identity_rank}. Make model.identity_rank say what the adapter has."
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
