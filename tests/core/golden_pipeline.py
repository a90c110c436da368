"""What pipelines around the golden UNet are asked, and an IP-Adapter for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from golden_unet import golden, made

from easyref_core.sdxl_diffusers.adapter import append_tokens


def latents(pipe: Any, **options: Any) -> torch.Tensor:
    """Two guided steps with the golden prompt and tokens; divided by their spread, which random
    weights let grow."""
    text, negative = golden("text_states"), golden("negative_text_states")
    text, negative = append_tokens(pipe.unet, made(), text, negative)
    found = pipe(
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=golden("pooled_text"),
        negative_pooled_prompt_embeds=golden("negative_pooled_text"),
        height=128,
        width=128,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **{"num_inference_steps": 2, **options},
    ).images
    return found / found.std()


def ip_adapter(unet: UNet2DConditionModel) -> dict[str, Any]:
    """An IP-Adapter file's content, random, for image embeddings of width 20."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    crosses = [n for n in unet.attn_processors if n.endswith("attn2.processor")]
    weights = {}
    for number, name in enumerate(crosses):
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        for part in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * number + 1}.{part}.weight"] = noise(width, 96)
    projection = {
        "proj.weight": noise(4 * 96, 20),
        "proj.bias": noise(4 * 96),
        "norm.weight": torch.ones(96),
        "norm.bias": noise(96),
    }
    return {"image_proj": projection, "ip_adapter": weights}


def load_ip_adapter(pipe: Any, scale: float) -> None:
    pipe.load_ip_adapter(
        ip_adapter(pipe.unet), subfolder=None, weight_name=None, image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(scale)
