"""EasyRef in plain torch: from a group of reference images to steered cross-attention.

Imports run downwards only:

    cli
    training
    encode, sdxl_diffusers
    adapter
    qwen2vl, tokens
    pictures, weight_file
    files, attention_kernels, out_of_memory, demo_set
    untrusted
    errors

Public names, each imported when it is first used:

    EasyRefError        everything that is refused on purpose
    load_checkpoint     recognises an adapter file (AdapterCheckpoint)
    plan_encoder        says where each weight of the encoder is read from (EncoderPlan)
    PromptTokenizer     Qwen2-VL's tokenizer; PromptTokenizer.from_directory(path)
    open_picture        reads a picture file as RGB
    Reference           one picture of a group, with its weight
    plan_group          checks references and prompt, and plans their encoding (GroupPlan)
    MllmLayerWeights    weights of the MLLM's layers, where an adapter pools many
    encode_references   turns a planned group into ReferenceTokens
    inspect_references  measures which references the tokens attend to (Inspection)
    draw_heat_maps      draws an Inspection over the pictures
    EncodingCache       what is kept from one encoding to the next, within so many bytes
    save_tokens, load_tokens
    stack_tokens        one batch of several groups
    combine_tokens      one group of several (each WeightedTokens)
    attach_adapter, detach_adapter, append_tokens, set_tokens, set_scale, merge_lora,
    hide_references     the adapter on a diffusers UNet; needs diffusers
    encode_identity     references as latents of a diffusers pipeline (IdentityLatents)
    attach_identity, detach_identity, identity_run
                        self-attention of its UNet attends to them too (IdentityRun)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401 (names for type checkers)
if TYPE_CHECKING:
    from .adapter.checkpoint import AdapterCheckpoint, load_checkpoint
    from .encode.cache import EncodingCache
    from .encode.group import GroupPlan, Reference, plan_group
    from .encode.heat_maps import draw_heat_maps
    from .encode.inspection import Inspection, inspect_references
    from .encode.mllm_layers import MllmLayerWeights
    from .encode.passes import encode_references
    from .encode.plan_encoder import EncoderPlan, plan_encoder
    from .errors import EasyRefError
    from .pictures.loading import open_picture
    from .qwen2vl.prompt import PromptTokenizer
    from .sdxl_diffusers.adapter import (
        append_tokens,
        attach_adapter,
        detach_adapter,
        hide_references,
        merge_lora,
        set_scale,
        set_tokens,
    )
    from .sdxl_diffusers.identity import attach_identity, detach_identity, identity_run
    from .sdxl_diffusers.identity_latents import encode_identity
    from .tokens.combine import WeightedTokens, combine_tokens
    from .tokens.reference_tokens import ReferenceTokens, load_tokens, save_tokens, stack_tokens

_MODULES = {
    "adapter.checkpoint": "AdapterCheckpoint load_checkpoint",
    "encode.group": "GroupPlan Reference plan_group",
    "encode.heat_maps": "draw_heat_maps",
    "encode.inspection": "Inspection inspect_references",
    "encode.mllm_layers": "MllmLayerWeights",
    "encode.cache": "EncodingCache",
    "encode.passes": "encode_references",
    "encode.plan_encoder": "EncoderPlan plan_encoder",
    "errors": "EasyRefError",
    "pictures.loading": "open_picture",
    "qwen2vl.prompt": "PromptTokenizer",
    "sdxl_diffusers.adapter": "append_tokens attach_adapter detach_adapter hide_references "
    "merge_lora set_scale set_tokens",
    "sdxl_diffusers.identity": "attach_identity detach_identity identity_run",
    "sdxl_diffusers.identity_latents": "encode_identity",
    "tokens.combine": "WeightedTokens combine_tokens",
    "tokens.reference_tokens": "ReferenceTokens load_tokens save_tokens stack_tokens",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
