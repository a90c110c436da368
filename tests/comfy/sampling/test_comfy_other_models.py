"""Models of another architecture are refused by name, and are not changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import goldens
import pytest
import torch
from comfyhost import GOLDEN_MLLM, Pack, apply, predict, put_adapter, random_tokens
from goldens import adapter_tensors, without

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": (1, 2),
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
    "image_size": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "dtype": torch.float32,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 32,
    "context_in_dim": 32,
    "hidden_size": 32,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "txt_ids_dims": [],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
    "dtype": torch.float32,
}
SD3 = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 1,
    "input_size": None,
    "adm_in_channels": 32,
    "context_embedder_config": {
        "target": "torch.nn.Linear",
        "params": {"in_features": 32, "out_features": 64},
    },
    "num_patches": 64,
    "pos_embed_max_size": 8,
    "pos_embed_scaling_factor": None,
    "dtype": torch.float32,
}


def tiny(kind: str) -> Any:
    """A tiny MODEL of another family, built by ComfyUI itself."""
    import comfy.model_patcher
    import comfy.supported_models as supported

    def unet(context: int, adm: int | None, linear: bool) -> dict[str, Any]:
        return {
            **UNET,
            "context_dim": context,
            "adm_in_channels": adm,
            "num_classes": "sequential" if adm else None,
            "use_linear_in_transformer": linear,
            "num_heads": -1,
            "num_head_channels": 32,
        }

    classes: dict[str, Callable[[], Any]] = {
        "SD15": lambda: supported.SD15(unet(768, None, False)),
        "SD20": lambda: supported.SD20(unet(1024, None, True)),
        "SDXLRefiner": lambda: supported.SDXLRefiner(unet(1280, 2560, True)),
        "Flux": lambda: supported.Flux(FLUX),
        "SD3": lambda: supported.SD3(SD3),
    }
    config = classes[kind]()
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("SD15", ["width 768", "Stable Diffusion 1.5's"]),
        ("SD20", ["width 1024", "Stable Diffusion 2's"]),
        ("SDXLRefiner", ["width 1280", "the SDXL refiner's", "SDXLRefiner"]),
        ("Flux", ["Flux", "no cross-attention layers"]),
        ("SD3", ["SD3", "no cross-attention layers"]),
    ],
)
def test_another_family_is_refused_by_name(
    pack: Pack, easyref: Any, tokens: Any, kind: str, said: list[str]
) -> None:
    model = tiny(kind)
    expected = [*said, "SDXL"]
    if "width" in said[0]:
        expected += [easyref.checkpoint.name, "width 96"]
    with pack.refused(*expected):
        apply(pack, model, easyref, tokens)
    assert not model.patches
    assert not model.wrappers


def changed(pack: Pack, name: str, **replaced: Any) -> Any:
    """The golden adapter with some tensors replaced, or left out (None)."""
    tensors = adapter_tensors()
    for key, tensor in replaced.items():
        tensors.pop(key) if tensor is None else tensors.__setitem__(key, tensor)
    return pack.run("EasyRefLoader", put_adapter(pack, name, tensors), GOLDEN_MLLM, "auto")


def refuse(pack: Pack, unet: Any, easyref: Any, *said: object) -> None:
    """Apply refuses, and the model is and works as before."""
    plain = predict(unet)
    own = random_tokens(pack, easyref, seed=1)
    with pack.refused(*said):
        apply(pack, unet, easyref, own)
    assert not unet.patches
    assert not unet.wrappers
    assert not unet.attachments
    assert unet.model_options == {"transformer_options": {}}
    assert torch.equal(predict(unet), plain)


def test_an_adapter_of_another_width(pack: Pack, unet: Any) -> None:
    tensors = goldens.random_adapter(goldens.random_encoder())
    name = put_adapter(pack, "narrow.safetensors", tensors)
    easyref = pack.run("EasyRefLoader", name, "from adapter", "auto")
    width = goldens.TOKEN_WIDTH
    refuse(pack, unet, easyref, name, "width 96", f"width {width}", "Connect an SDXL base model")


def test_an_adapter_for_another_architecture(
    pack: Pack, unet: Any, demo: Any, demo_easyref: Any, easyref: Any
) -> None:
    """SDXL's own blocks against those of the golden UNet, at the same width."""
    tokens = random_tokens(pack, easyref, seed=1)
    layers = len(demo_easyref.checkpoint.cross_attention)
    assert layers > 8
    with pack.refused("The model (SDXL)", f"{layers} cross-attention", "for 8", "they differ"):
        apply(pack, demo.model, easyref, tokens)
    missing = without(adapter_tensors(), "mid_block.attentions.0.transformer_blocks.1.attn2")
    name = put_adapter(pack, "fewer.safetensors", missing)
    fewer = pack.run("EasyRefLoader", name, GOLDEN_MLLM, "auto")
    refuse(pack, unet, fewer, "8 cross-attention", name, "for 7", "mid_block.attentions.0")


def test_an_adapter_for_a_wider_unet(pack: Pack, unet: Any) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor"
    wide = {f"{layer}.{part}.weight": torch.rand(128, 96) for part in ("to_k_ip", "to_v_ip")}
    easyref = changed(pack, "wide.safetensors", **wide)
    refuse(pack, unet, easyref, "64 wide at mid_block", "wide.safetensors", "for 128")


def test_a_lora_for_layers_the_model_lacks(pack: Pack, unet: Any) -> None:
    layer = "unet.mid_block.attentions.0.transformer_blocks.9.attn1.processor"
    more = {}
    for part in ("to_q", "to_k", "to_v", "to_out"):
        more[f"{layer}.{part}_lora.down.weight"] = torch.rand(4, 64)
        more[f"{layer}.{part}_lora.up.weight"] = torch.rand(64, 4)
    easyref = changed(pack, "deeper.safetensors", **more)
    refuse(pack, unet, easyref, "deeper.safetensors", "LoRA", "lacks 4", layer)


def test_a_lora_of_values_that_are_not_numbers(pack: Pack, unet: Any) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_q_lora.up.weight"
    easyref = changed(pack, "nan_lora.safetensors", **{name: torch.full((64, 4), float("nan"))})
    refuse(pack, unet, easyref, "nan_lora.safetensors", name, "not numbers")


def test_projections_of_values_that_are_not_numbers_stop_the_run_and_nothing_else(
    pack: Pack, unet: Any
) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2"
    name = f"unet.{layer}.processor.to_v_ip.weight"
    easyref = changed(pack, "nan_ip.safetensors", **{name: torch.full((64, 96), float("inf"))})
    plain = predict(unet)
    model = apply(pack, unet, easyref, random_tokens(pack, easyref, seed=1))
    for _ in range(2):
        with pack.refused("nan_ip.safetensors", layer, "to_v_ip"):
            predict(model)
    assert torch.equal(predict(unet), plain)


def test_tokens_of_another_number_are_refused(pack: Pack, unet: Any, easyref: Any) -> None:
    """The right adapter with other sizes: an edited file."""
    tokens = pack.part("easyref_core.tokens.reference_tokens").ReferenceTokens
    identity = easyref.checkpoint.identity
    for shape in ((1, 15, 96), (1, 16, 48)):
        wrong = tokens(torch.ones(shape), torch.ones(shape), identity, "edited")
        with pack.refused(
            "edited", f"{shape[1]} tokens of width {shape[2]}", "16 tokens of width 96"
        ):
            apply(pack, unet, easyref, wrong)
    longer = tokens(torch.rand(1, 48, 96), torch.rand(1, 48, 96), identity, "concatenated")
    assert predict(apply(pack, unet, easyref, longer)).isfinite().all()
