"""The nodes inside ComfyUI give the official implementation's numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyhost import (
    ADAPTER_ONLY,
    GOLDEN,
    GOLDEN_MLLM,
    Pack,
    apply,
    euler,
    gathered,
    golden,
    guider,
    predict,
    sigmas,
    sizes,
    text,
)
from goldens import IMAGE_SIZE, adapter_tensors, description, difference, pictures, user_prompt

TOKENS = 1e-4
NOISE = 1e-4
GUIDED = 5e-4
ADAPTERS = {"full": GOLDEN, "adapter_only": ADAPTER_ONLY}


def image(picture: Any) -> torch.Tensor:
    """A PIL picture as ComfyUI's IMAGE."""
    import numpy as np

    return torch.from_numpy(np.array(picture, dtype=np.float32) / 255)[None]


def encode(pack: Pack, easyref: Any, case: str, image_size: int) -> Any:
    references = gathered(pack, *map(image, pictures(case)))
    return pack.run(
        "EasyRefEncode", easyref, user_prompt(case), "easyref", image_size, references=references
    )


@pytest.mark.parametrize("case", ["one_ref_prompt", "four_refs_prompt", "four_refs_empty"])
@pytest.mark.parametrize("tag", list(ADAPTERS))
def test_tokens_through_the_nodes_are_the_official_ones(pack: Pack, tag: str, case: str) -> None:
    easyref = pack.run("EasyRefLoader", ADAPTERS[tag], GOLDEN_MLLM, "fp32")
    tokens = encode(pack, easyref, case, IMAGE_SIZE)
    assert difference(tokens.cond, golden(f"{tag}.{case}.tokens")) < TOKENS
    assert difference(tokens.uncond, golden(f"{tag}.uncond_black.tokens")) < TOKENS


def test_tokens_at_the_real_image_size_are_the_official_ones(pack: Pack, easyref: Any) -> None:
    tokens = encode(pack, easyref, "four_refs_prompt", 336)
    assert difference(tokens.cond, golden("full_336.four_refs_prompt.tokens")) < TOKENS
    assert difference(tokens.uncond, golden("full_336.uncond_black.tokens")) < TOKENS


def test_a_batch_at_images_is_encoded_like_references(pack: Pack, easyref: Any) -> None:
    (picture,) = pictures("one_ref_prompt")
    tokens = pack.run(
        "EasyRefEncode",
        easyref,
        user_prompt("one_ref_prompt"),
        "easyref",
        IMAGE_SIZE,
        images=image(picture),
    )
    assert difference(tokens.cond, golden("full.one_ref_prompt.tokens")) < TOKENS


def test_images_come_before_references_and_chained_groups_keep_their_order(
    pack: Pack, easyref: Any
) -> None:
    first, *others = [image(p) for p in pictures("four_refs_prompt")]
    group = None
    for picture in others:
        group = gathered(pack, picture, previous=group)
    tokens = pack.run(
        "EasyRefEncode",
        easyref,
        user_prompt("four_refs_prompt"),
        "easyref",
        IMAGE_SIZE,
        images=first,
        references=group,
    )
    assert difference(tokens.cond, golden("full.four_refs_prompt.tokens")) < TOKENS


def test_the_loaded_unet_is_the_official_one(unet: Any) -> None:
    assert difference(predict(unet), golden("unet.noise_pred.no_adapter")) < NOISE


@pytest.mark.parametrize("scale", [1.0, 0.6, 0.0])
def test_noise_prediction_is_the_official_one_at_every_scale(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, scale: float
) -> None:
    model = apply(pack, unet, easyref, tokens, weight=scale)
    assert difference(predict(model), golden(f"unet.noise_pred.scale_{scale}")) < NOISE


def test_guided_noise_prediction_is_the_official_one(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    guided = predict(apply(pack, unet, easyref, tokens), cfg=7.5)
    assert difference(guided, golden("unet.noise_pred.cfg_guided_7.5")) < GUIDED


def test_pictures_to_noise_prediction_without_any_golden_value_between(
    pack: Pack, unet: Any
) -> None:
    easyref = pack.run("EasyRefLoader", ADAPTER_ONLY, GOLDEN_MLLM, "auto")
    tokens = encode(pack, easyref, "four_refs_prompt", IMAGE_SIZE)
    noise = predict(apply(pack, unet, easyref, tokens))
    assert difference(noise, golden("unet.noise_pred.scale_1.0.adapter_only_tokens")) < NOISE


def test_merged_lora_is_exactly_up_times_down(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    layer = "down_blocks.1.attentions.0.transformer_blocks.1.attn1"
    key = "diffusion_model.input_blocks.3.1.transformer_blocks.1.attn1.to_q.weight"
    before = unet.model.state_dict()[key].clone()
    adapter = adapter_tensors()
    up, down = (adapter[f"unet.{layer}.processor.to_q_lora.{h}.weight"] for h in ("up", "down"))
    predict(apply(pack, unet, easyref, tokens, weight=0.0))
    merged = unet.model.state_dict()[key] - before
    assert difference(merged, up @ down) < 1e-6
    assert float(merged.abs().max()) > 1e-3


def test_sampled_latents_are_the_official_ones(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Four Euler steps at guidance 5 for two samples, the weight through the node's scale."""
    plan = description()["generate"]
    picture = sizes(plan["time_ids"])
    model = apply(pack, unet, easyref, tokens, weight=plan["scale"])
    x = golden("generate.latents_in") * plan["init_noise_sigma"]
    texts = text(**picture), text("negative", **picture)
    cfg_guider = guider(model, plan["guidance_scale"], *texts)
    out = euler(cfg_guider, x, sigmas(model, *plan["timesteps"]))
    assert difference(out, golden("generate.latents_out")) < GUIDED
