"""References on a GPU without dynamic VRAM, on a stand-in for it: ComfyUI loads whole models, or
leaves layers on the CPU and moves their weights for each use.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import comfyhost
import dynamic_vram
import pytest
import torch
from comfyhost import GOLDEN, GOLDEN_MLLM, Pack, apply, random_tokens
from dynamic_vram import Gpu
from goldens import IMAGE_SIZE, pictures, user_prompt

CASE = "four_refs_prompt"


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_an_encoder_never_mixes_devices(
    pack: Pack, plain_gpu: Gpu, precision: str, full: bool
) -> None:
    plain_gpu.full = full
    easyref = pack.run("EasyRefLoader", GOLDEN, GOLDEN_MLLM, precision)
    reference = pack.part("easyref_core.encode.group").Reference
    group = tuple(map(reference, pictures(CASE)))
    prompt = user_prompt(CASE)
    with plain_gpu.waiting_allowed():
        pack.run("EasyRefEncode", easyref, prompt, "easyref", IMAGE_SIZE, references=group)
        with plain_gpu.watch() as seen:
            pack.run("EasyRefInspect", easyref, prompt + ".", IMAGE_SIZE, references=group)
    encoder = easyref.encoder.patcher.model
    on_gpu = [name for name, weight in encoder.named_parameters() if weight.is_meta]
    assert bool(on_gpu) != full
    layer = encoder.multimodal_llm.model.layers[0].mlp.up_proj.weight
    assert (tuple(layer.shape) in {one.shape for one in seen.uploads}) == full


@pytest.mark.parametrize("full", [False, True])
def test_after_the_first_call_sampling_moves_and_waits_for_nothing(
    pack: Pack, plain_gpu: Gpu, fresh_easyref: Any, full: bool
) -> None:
    """Beyond what ComfyUI does itself, which waits for its noise schedule where that stays on the
    CPU."""
    plain_gpu.full = full
    unet = comfyhost.golden_unet(pack)
    first, second = (random_tokens(pack, fresh_easyref, seed) for seed in (1, 2))
    settings = {"mask": torch.eye(32)[None], "start_percent": 0.1, "lora_strength": 0.0}
    model = apply(pack, unet, fresh_easyref, first, **settings)
    model = apply(pack, model, fresh_easyref, second, weight=0.4, lora_strength=0.0)

    def later(model: Any) -> dynamic_vram.Record:
        guider, x = comfyhost.guider(model, 7.5), comfyhost.latents()
        return dynamic_vram.sample(plain_gpu, guider, x, (10.0, 1.0), strict=not full)[1]

    result, plain = later(model), later(unet)
    assert result.waits == plain.waits
    more = Counter(result.uploads) - Counter(plain.uploads)
    # Without any memory, keys and values are moved for each use as weights are: two Apply nodes,
    # positive and negative in a call each.
    layers = len(fresh_easyref.checkpoint.cross_attention)
    assert {one.shape for one in more} == ({(2, first.num_tokens, 64)} if full else set())
    assert more.total() == (2 * 2 * 2 * layers if full else 0)
