"""EasyRef Identity computes what its formula says, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyhost import (
    GOLDEN_MLLM,
    TIMESTEP,
    Pack,
    apply,
    gathered,
    golden,
    latents,
    predict,
    put_adapter,
    sigmas,
    text,
)
from goldens import UNET, adapter_tensors, difference
from identity_nodes import (
    Projections,
    attention64,
    calls_of,
    identity,
    picture,
    projections_of,
)

CFG = 5.0
EXACT = 2e-5
GUIDED = 5e-4
WEIGHT = 0.7

Lora = dict[str, torch.Tensor]


def expected(
    layer: Projections, weight: float | torch.Tensor, lora: Lora | None = None
) -> torch.Tensor:
    """The layer's output before `to_out` in the sample's call, of rows [negative, positive]."""
    (features, _), queries = layer.inputs["to_q"], layer.outputs["to_q"][1]
    keys, values = layer.outputs["to_k"], layer.outputs["to_v"]
    assert torch.equal(layer.inputs["to_k"][2], features.flatten(0, 1)[None])
    key, value = keys[2].double(), values[2].double()
    if lora is not None:
        states = features.flatten(0, 1)[None].double()
        key = key + states @ lora["k.down"].T.double() @ lora["k.up"].T.double()
        value = value + states @ lora["v.down"].T.double() @ lora["v.up"].T.double()
    own = attention64(queries, keys[1], values[1], layer.heads)
    conditional = own.shape[0] // 2
    q, k, v = (x[conditional:].double() for x in (queries, keys[1], values[1]))
    rows = len(q)
    joint = attention64(
        q,
        torch.cat([k, key.expand(rows, -1, -1)], 1),
        torch.cat([v, value.expand(rows, -1, -1)], 1),
        layer.heads,
    )
    own[conditional:] += weight * (joint - own[conditional:])
    return own


@pytest.mark.parametrize("batch", [1, 2])
def test_each_layer_gives_what_the_formula_says(
    pack: Pack, unet: Any, demo: Any, batch: int
) -> None:
    images = torch.cat([picture(1), picture(2)])
    model = identity(pack, unet, demo.vae, images=images, weight=WEIGHT)
    with projections_of(pack, unet) as layers:
        predict(model, CFG, latents(batch))
    assert len(layers) == 8
    for name, layer in layers.items():
        found = layer.inputs["to_out"][1]
        assert difference(found, expected(layer, WEIGHT)) < EXACT, name
        assert difference(found, expected(layer, 0.0)) > 1e-3, name


def test_a_mask_weighs_each_position(pack: Pack, unet: Any, demo: Any) -> None:
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 0.5
    mask[:, 4:, 4:] = 1
    model = identity(pack, unet, demo.vae, weight=WEIGHT, mask=mask)
    with projections_of(pack, unet) as layers:
        predict(model, CFG, latents())
    for name, layer in layers.items():
        side = round(layer.outputs["to_q"][1].shape[1] ** 0.5)
        size = F.interpolate(mask[None], (side, side), mode="area").flatten()[None, :, None]
        assert difference(layer.inputs["to_out"][1], expected(layer, WEIGHT * size)) < EXACT, name


def test_masks_of_a_batch_act_on_their_own_latents(pack: Pack, unet: Any, demo: Any) -> None:
    masks = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)])
    x = latents(2)
    both = predict(identity(pack, unet, demo.vae, mask=masks), CFG, x)
    everywhere = predict(identity(pack, unet, demo.vae), CFG, x)
    plain = predict(unet, CFG, x)
    assert difference(both[:1], everywhere[:1]) < 1e-4
    assert difference(both[1:], plain[1:]) < 1e-4
    assert difference(everywhere, plain) > 0.01
    with pack.refused("mask has a batch of 2", "3 latents"), calls_of(unet) as calls:
        late = identity(pack, unet, demo.vae, mask=masks, start_percent=0.9)
        predict(late, CFG, latents(3))
    assert calls.rows == [], "refused before the first step, in which it does not act"


def test_references_are_noised_to_the_samples_level_and_read_with_its_prompt(
    pack: Pack, unet: Any, demo: Any
) -> None:
    given = picture(1)
    with calls_of(unet) as calls:
        predict(identity(pack, unet, demo.vae, images=given), CFG)
    latent = unet.model.process_latent_in(demo.vae.encode((given * 255).round() / 255))
    noise = torch.randn((4, 16, 16), generator=torch.Generator().manual_seed(0))
    sigma = sigmas(unet, TIMESTEP)[0]
    noisy = (latent + sigma * noise) / torch.sqrt(sigma**2 + 1)
    reading, sampling = calls.others
    assert difference(calls.inputs[0], noisy) < 1e-5
    assert torch.equal(reading["timesteps"], sampling["timesteps"][:1])
    assert torch.equal(reading["context"], text()[0][0])
    assert torch.equal(reading["y"], sampling["y"][1:])
    assert reading["control"] is None


@pytest.fixture
def trained(pack: Pack) -> tuple[Any, dict[str, Lora]]:
    """An adapter with an identity LoRA, and its weights by layer."""
    noise = torch.Generator().manual_seed(6)
    loras: dict[str, Lora] = {}
    tensors = adapter_tensors()
    for name, (width, _) in goldens_layers(tensors).items():
        lora = {
            f"{part}.{half}": torch.randn(shape, generator=noise) * 0.2
            for part in "kv"
            for half, shape in (("down", (4, width)), ("up", (width, 4)))
        }
        loras[name] = lora
        for key, weight in lora.items():
            part, half = key.split(".")
            tensors[f"unet.{name}.processor.to_{part}_identity_lora.{half}.weight"] = weight
    file = put_adapter(pack, "identity.safetensors", tensors)
    return pack.run("EasyRefLoader", file, GOLDEN_MLLM, "auto"), loras


def goldens_layers(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Self-attention layer -> (width, rank) by the adapter's own LoRA."""
    down = ".processor.to_k_lora.down.weight"
    return {
        name.removeprefix("unet.").removesuffix(down): tuple(tensor.shape[::-1])
        for name, tensor in tensors.items()
        if name.endswith(f".attn1{down}")
    }


def test_an_identity_lora_is_added_to_keys_and_values_of_the_references(
    pack: Pack, unet: Any, demo: Any, trained: tuple[Any, dict[str, Lora]]
) -> None:
    easyref, loras = trained
    model = identity(pack, unet, demo.vae, weight=WEIGHT, easyref=easyref)
    with projections_of(pack, unet) as layers:
        predict(model, CFG)
    assert layers.keys() == loras.keys()
    for name, layer in layers.items():
        found = layer.inputs["to_out"][1]
        assert difference(found, expected(layer, WEIGHT, loras[name])) < EXACT, name
        assert difference(found, expected(layer, WEIGHT)) > 1e-3, name


def test_an_adapter_without_an_identity_lora_is_refused(
    pack: Pack, unet: Any, demo: Any, easyref: Any
) -> None:
    with pack.refused(easyref.checkpoint.name, "no identity LoRA", "Disconnect easyref"):
        identity(pack, unet, demo.vae, easyref=easyref)


def test_an_identity_lora_for_another_model_is_refused(
    pack: Pack, demo: Any, trained: tuple[Any, dict[str, Lora]]
) -> None:
    with pack.refused("identity.safetensors", "SDXL base"):
        identity(pack, demo.model, demo.vae, easyref=trained[0])


@pytest.mark.parametrize("lora", [False, True])
def test_predictions_are_those_of_the_diffusers_side(
    pack: Pack, unet: Any, demo: Any, trained: tuple[Any, dict[str, Lora]], lora: bool
) -> None:
    """Two references of different shapes under guidance, by code that shares only the formula."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    from easyref_core.adapter.checkpoint import load_checkpoint
    from easyref_core.adapter.stages import Window
    from easyref_core.sdxl_diffusers.adapter import attach_adapter, set_tokens
    from easyref_core.sdxl_diffusers.identity import attach_identity
    from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents
    from easyref_core.sdxl_diffusers.identity_run import IdentityRun

    easyref = trained[0] if lora else None
    images = gathered(pack, picture(1), picture(2, 64, 256))
    steered = apply(pack, unet, easyref, None, weight=0.0) if lora else unet  # its own LoRA alone
    model = identity(pack, steered, demo.vae, references=images, weight=WEIGHT, easyref=easyref)
    found = predict(model, CFG)
    (patch,) = model.get_wrappers("apply_model", "easyref_identity")
    latents = tuple(unet.model.process_latent_in(x) for x in patch.references.get(128 * 128, 4))

    other = UNet2DConditionModel.from_pretrained(UNET).eval()
    attach_identity(other)
    if lora:
        attach_adapter(other, load_checkpoint(easyref.checkpoint.path))
        set_tokens(other, None)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    run = IdentityRun(
        IdentityLatents(latents),
        EulerDiscreteScheduler(**schedule).alphas_cumprod,  # SDXL's
        Window(0.0, 1.0, WEIGHT),
        conditional=lambda rows: [slice(rows // 2, rows)],
    )
    rows = ("negative_", "")
    negative, positive = other(
        golden("unet.latents").repeat(2, 1, 1, 1),
        torch.tensor(TIMESTEP),
        encoder_hidden_states=torch.cat([golden(f"unet.{row}text_states") for row in rows]),
        added_cond_kwargs={
            "text_embeds": torch.cat([golden(f"unet.{row}pooled_text") for row in rows]),
            "time_ids": golden("unet.time_ids").repeat(2, 1),
        },
        cross_attention_kwargs={"identity": run},
    ).sample.split(1)
    assert difference(found, negative + CFG * (positive - negative)) < GUIDED
    assert difference(found, predict(unet, CFG)) > 100 * GUIDED
