"""IPAdapter_plus, InstantID, PuLID and AnimateDiff-Evolved themselves, where their checkouts are.

What they would download is random here: it is their place on the model that is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, euler, guider, latents, predict, random_tokens, sigmas
from goldens import difference
from other_packs import SLOTS, WIDTH, attention_weights, load_pack

CFG = 4.0
EXACT = 5e-5
FACES = ("insightface", "facexlib", "cv2", "timm", "ftfy")

Add = Callable[[Any], Any]


def ip_adapter(**settings: Any) -> Add:
    """The whole node, on embeddings that CLIP Vision would give."""
    nodes = load_pack("ComfyUI_IPAdapter_plus").NODE_CLASS_MAPPINGS
    noise = torch.Generator().manual_seed(9)
    image_proj = {
        "proj.weight": 0.1 * torch.randn((4 * WIDTH, 16), generator=noise),
        "proj.bias": torch.zeros(4 * WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    seen, unseen = (torch.randn((1, 16), generator=noise) for _ in range(2))

    def add(model: Any) -> Any:
        # The node builds modules, whose parameters must not be inference tensors.
        weights = {"image_proj": image_proj, "ip_adapter": attention_weights(model)}
        given = {"weight": 0.8, "weight_type": "linear", "start_at": 0.0, "end_at": 1.0}
        node = nodes["IPAdapterEmbeds"]()
        outputs = node.apply_ipadapter(model, weights, seen, neg_embed=unseen, **(given | settings))
        return outputs[0]

    return add


def by_slots(module: Any, put: Callable[..., None], owner: str, **settings: Any) -> Add:
    """What the face packs' nodes do once they have a face: their function on every slot."""
    noise = torch.Generator().manual_seed(10)
    face, no_face = (torch.randn((1, 4, WIDTH), generator=noise) for _ in range(2))

    def add(model: Any) -> Any:
        model = model.clone()
        layers = module.To_KV(attention_weights(model))
        given = {
            owner: SimpleNamespace(ip_layers=layers),
            "cond": face,
            "uncond": no_face,
            "weight": 0.8,
            "sigma_start": 999.0,
            "sigma_end": 0.0,
            "mask": None,
        }
        for number, slot in enumerate(SLOTS):
            put(model, {**given, **settings, "module_key": str(2 * number + 1)}, slot)
        return model

    return add


def instant_id(**settings: Any) -> Add:
    load_pack("ComfyUI_InstantID", FACES)
    import pack_ComfyUI_InstantID.InstantID as module

    return by_slots(module, module._set_model_patch_replace, "ipadapter", **settings)


def pulid(**settings: Any) -> Add:
    load_pack("PuLID_ComfyUI", FACES)
    import pack_PuLID_ComfyUI.pulid as module

    return by_slots(module, module.set_model_patch_replace, "pulid", **settings)


PACKS = pytest.mark.parametrize("make", [ip_adapter, instant_id, pulid])


@PACKS
def test_both_act_in_either_order(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, make: Callable[..., Add]
) -> None:
    other = make()
    before = predict(apply(pack, other(unet), easyref, tokens), CFG)
    after = predict(other(apply(pack, unet, easyref, tokens)), CFG)
    assert difference(before, after) < EXACT
    for single in (other(unet), apply(pack, unet, easyref, tokens)):
        assert difference(predict(single, CFG), after) > 0.01


@PACKS
def test_without_weight_the_other_pack_is_left_as_it_was(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, make: Callable[..., Add]
) -> None:
    other = make()
    ours = apply(pack, other(unet), easyref, tokens, weight=0.0, lora_strength=0.0)
    assert torch.equal(predict(ours, CFG), predict(other(unet), CFG))


@PACKS
def test_several_of_both_with_masks_compose(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, make: Callable[..., Add]
) -> None:
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1
    first, second = make(mask=left) if make is not ip_adapter else make(attn_mask=left), make()
    more = random_tokens(pack, easyref, 7)
    results = []
    for order in ("abAB", "ABab", "AbBa"):
        model = unet
        for step in order:
            if step == "A":
                model = apply(pack, model, easyref, tokens, mask=1 - left)
            elif step == "B":
                model = apply(pack, model, easyref, more)
            else:
                model = (first if step == "a" else second)(model)
        results.append(predict(model, CFG))
    assert difference(results[0], results[1]) < EXACT
    assert difference(results[0], results[2]) < EXACT


def test_frames_keep_their_own_in_animatediffs_windows(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Without a motion model frames are independent, so windows change nothing."""
    nodes = load_pack("ComfyUI-AnimateDiff-Evolved").NODE_CLASS_MAPPINGS
    (windows,) = nodes["ADE_StandardStaticContextOptions"]().create_options(3, 1, "flat")
    evolved = nodes["ADE_UseEvolvedSampling"]()

    def sample(model: Any) -> torch.Tensor:
        return euler(guider(model, CFG), latents(6, 16, 24), sigmas(unet, 801.0, 401.0))

    def with_windows(model: Any) -> Any:
        return evolved.use_evolved_sampling(model, "autoselect", context_options=windows)[0]

    masks = torch.zeros(6, 16, 24)
    for frame, mask in enumerate(masks):
        mask[:, 4 * frame : 4 * frame + 4] = 1
    each = random_tokens(pack, easyref, 5, 6)
    steered = apply(pack, unet, easyref, each, mask=masks)
    expected = sample(steered)
    assert difference(sample(unet), expected) > 0.01
    assert difference(sample(with_windows(steered)), expected) < EXACT
    before = apply(pack, with_windows(unet), easyref, each, mask=masks)
    assert difference(sample(before), expected) < EXACT
