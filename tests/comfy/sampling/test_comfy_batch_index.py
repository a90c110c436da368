"""Latents taken out of a batch keep the masks and tokens of their place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfyhost
import pytest
import torch
from comfyhost import Pack, apply, random_tokens, stock, text
from goldens import difference

CLOSE = 1e-5  # of the largest value
SEED = 77
BATCH = 4
Latents = dict[str, Any]


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return difference(found, expected) / float(expected.abs().max())


def empty(count: int = BATCH) -> Latents:
    return {"samples": torch.zeros(count, 4, 16, 24)}


def from_batch(first: int, length: int) -> Latents:
    return stock("nodes.LatentFromBatch", empty(), first, length)


def rebatched(size: int) -> list[Latents]:
    node = "comfy_extras.nodes_rebatch.LatentRebatch"
    found = stock(node, [empty()], [size])
    return found if isinstance(found, list) else [found]


def ksampler(model: Any, latent: Latents, **settings: Any) -> torch.Tensor:
    """KSampler's result, as kept in a latent."""
    import nodes

    given = {"steps": 1, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    given |= {"positive": text(), "negative": text("negative"), "seed": SEED} | settings
    return nodes.common_ksampler(model, latent=latent, **given)[0]["samples"]


def custom_sampler(model: Any, latent: Latents) -> torch.Tensor:
    """SamplerCustomAdvanced's result."""
    extra = "comfy_extras.nodes_custom_sampler."
    noise = stock(f"{extra}RandomNoise", SEED)
    guider = stock(f"{extra}BasicGuider", model, text())
    sampler = stock(f"{extra}KSamplerSelect", "euler")
    sigmas = stock(f"{extra}BasicScheduler", model, "normal", 1, 1.0)
    return stock(f"{extra}SamplerCustomAdvanced", noise, guider, sampler, sigmas, latent)["samples"]


def bars() -> torch.Tensor:
    """One mask for each latent, each elsewhere."""
    masks = torch.zeros(BATCH, 16, 24)
    for number, mask in enumerate(masks):
        mask[:, 6 * number : 6 * number + 6] = 1
    return masks


@pytest.fixture(params=["mask", "tokens", "region", "conditioning"])
def steered(pack: Pack, unet: Any, easyref: Any, tokens: Any, request: Any) -> Any:
    """(model, settings of the sampler): something for each latent of a batch of four."""
    each = random_tokens(pack, easyref, 5, BATCH)
    if request.param == "mask":
        return apply(pack, unet, easyref, tokens, mask=bars()), {}
    if request.param == "tokens":
        return apply(pack, unet, easyref, each), {}
    if request.param == "region":
        regions = pack.run("EasyRefRegion", tokens, bars(), 1.0)
        return apply(pack, unet, easyref, None, regions=regions), {}
    prompt = pack.run("EasyRefSetConditioning", text(), each, 1.0)
    return apply(pack, unet, easyref, None), {"positive": prompt}


@pytest.mark.parametrize(("first", "length"), [(2, 1), (1, 2), (0, 3)])
def test_latents_from_a_batch_keep_what_is_theirs(steered: Any, first: int, length: int) -> None:
    model, settings = steered
    whole = ksampler(model, empty(), **settings)
    part = ksampler(model, from_batch(first, length), **settings)
    assert apart(part, whole[first : first + length]) < CLOSE
    assert apart(whole[:1], whole[1:2]) > 0.1


@pytest.mark.parametrize("size", [1, 3])
def test_rebatched_latents_keep_what_is_theirs(steered: Any, size: int) -> None:
    model, settings = steered
    parts = [ksampler(model, latent, **settings) for latent in rebatched(size)]
    assert len(parts) > 1
    assert apart(torch.cat(parts), ksampler(model, empty(), **settings)) < CLOSE


def test_latents_in_another_order_or_repeated_keep_what_is_theirs(steered: Any) -> None:
    model, settings = steered
    whole = ksampler(model, empty(), **settings)
    for order in ([3, 1], [2, 2, 0], [3, 2, 1, 0]):
        latent = empty(len(order)) | {"batch_index": order}
        assert apart(ksampler(model, latent, **settings), whole[order]) < CLOSE


def test_custom_samplers_keep_what_is_theirs(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, mask=bars())
    whole = custom_sampler(model, empty())
    assert apart(custom_sampler(model, from_batch(2, 2)), whole[2:]) < CLOSE


def test_in_windows_of_frames_too(pack: Pack, unet: Any, easyref: Any, tokens: Any) -> None:
    node = "comfy_extras.nodes_context_windows.ContextWindowsManualNode"
    masked = apply(pack, unet, easyref, tokens, mask=bars())
    model = stock(node, masked, 2, 1, "standard_static", 1, False, "flat", 0, False)
    whole = ksampler(masked, empty())
    assert apart(ksampler(model, from_batch(1, 3)), whole[1:]) < CLOSE


def test_a_picture_that_is_changed_keeps_what_is_its_own(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """With part of the noise, and with a latent in which something is."""
    model = apply(pack, unet, easyref, tokens, mask=bars())
    drawn = {"samples": comfyhost.latents(BATCH, 16, 24)}
    whole = ksampler(model, drawn, denoise=0.5)
    part = stock("nodes.LatentFromBatch", drawn, 3, 1)
    assert apart(ksampler(model, part, denoise=0.5), whole[3:]) < CLOSE


def test_as_many_masks_as_latents_are_theirs_wherever_they_were(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    """Masks taken out of their batch as the latents were."""
    whole = ksampler(apply(pack, unet, easyref, tokens, mask=bars()), empty())
    model = apply(pack, unet, easyref, tokens, mask=bars()[2:])
    assert apart(ksampler(model, from_batch(2, 2)), whole[2:]) < CLOSE


def test_where_the_place_cannot_be_told_the_number_must_fit(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, mask=bars())
    with pack.refused("mask has a batch of 4", "2 latents"):
        ksampler(model, from_batch(2, 2), disable_noise=True)
    with pack.refused("mask has a batch of 2", "1 latents"):
        ksampler(apply(pack, unet, easyref, tokens, mask=bars()[:2]), from_batch(3, 1))


def test_the_noise_of_what_follows_is_not_changed(pack: Pack) -> None:
    import comfy.sample

    batch_index = pack.part("nodes.sampling.batch_index").batch_index
    noise = comfy.sample.prepare_noise(empty()["samples"], SEED, [0, 1, 2, 3])
    state = torch.get_rng_state()
    assert batch_index(noise[[3, 1]], SEED, BATCH) == (3, 1)
    assert batch_index(noise[[3, 1]], SEED, 3) is None
    assert batch_index(noise[[3, 1]], SEED + 1, BATCH) is None
    assert batch_index(torch.zeros_like(noise), SEED, BATCH) is None
    assert batch_index(noise, None, BATCH) is None
    assert torch.equal(torch.get_rng_state(), state)


def said(places: Sequence[int]) -> str:
    return f"latents {', '.join(str(place + 1) for place in places)}"


def test_it_is_said_which_are_used(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = apply(pack, unet, easyref, tokens, mask=bars())
    with caplog.at_level("INFO"):
        ksampler(model, empty())
        assert "EasyRef" not in caplog.text
        ksampler(model, from_batch(1, 2))
    assert said([1, 2]) in caplog.text
