"""An encoder of Qwen2-VL-2B's widths with random weights, and groups for it."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

from easyref_core.adapter.layer_pooling import POOLS, PoolingSizes, new_sizes
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import GroupPlan, Reference, plan_group
from easyref_core.encode.plan_encoder import EncoderPlan
from easyref_core.qwen2vl.config import MllmConfig, VisionConfig
from easyref_core.qwen2vl.prompt import PromptTokenizer

NUM_TOKENS, TOKEN_WIDTH = 64, 2048
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class _Words:
    """A tokenizer that gives each word an id: as many tokens as Qwen2-VL's, or a few less."""

    def get_added_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(_SPECIAL)}

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        words = re.findall(r"\w+|\W", text.replace(" ", ""))
        return {"input_ids": [8 + zlib.crc32(word.encode()) % 1000 for word in words]}


@dataclass(frozen=True)
class Sizes:
    """Layers of the decoder and of the vision tower; widths are Qwen2-VL-2B's unless small."""

    layers: int
    depth: int
    small: bool = False

    def config(self) -> MllmConfig:
        if not self.small:
            return MllmConfig(
                num_layers=self.layers, vocab_size=1024, vision=VisionConfig(depth=self.depth)
            )
        return MllmConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_layers=self.layers,
            num_heads=2,
            num_kv_heads=1,
            vocab_size=1024,
            vision=VisionConfig(
                embed_dim=160, depth=self.depth, num_heads=2, mlp_dim=640, hidden_size=256
            ),
        )


@torch.no_grad()
def random_encoder(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> EasyRefEncoder:
    """Weights such that activations stay finite; with the pools of `dla`."""
    config = sizes.config()
    shapes = new_sizes("blocks", config.hidden_size)
    pools = tuple((name, shapes) for name in POOLS["dla"])
    encoder = EasyRefEncoder(
        config,
        NUM_TOKENS,
        TOKEN_WIDTH,
        pooling=PoolingSizes(pools, tuple(range(sizes.layers))),
        compute_dtype=dtype,
        device=device,
        dtype=dtype,
    )
    torch.manual_seed(0)
    for weight in encoder.parameters():
        if weight.ndim > 1:
            weight.normal_(std=weight.shape[1] ** -0.5)
        else:
            weight.fill_(1.0)
    return encoder.eval().requires_grad_(False)


def pictures(count: int, first: int = 0) -> list[Reference]:
    """References of 336 pixels, all different."""
    colours = [((37 * n) % 256, (91 * n) % 256, n % 256) for n in range(first, first + count)]
    return [Reference(Image.new("RGB", (336, 336), colour)) for colour in colours]


def plan(
    encoder: EasyRefEncoder, group: list[Reference], prompt: str, **settings: Any
) -> GroupPlan:
    """See `plan_group` for the settings."""
    checkpoint: Any = SimpleNamespace(
        pools=encoder.mllm_layer_pooling.sizes.pools,
        mllm_layers=None,
        identity="random",
        name="random",
        num_tokens=NUM_TOKENS,
        final_layers=1,
        image_size=336,
    )
    made = EncoderPlan(checkpoint, encoder.config, None, {})
    return plan_group(made, PromptTokenizer(_Words(), "words"), group, prompt, **settings)
