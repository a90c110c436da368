"""Identity in diffusers' pipelines: guidance, ControlNets, IP-Adapters, schedulers, processors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import goldens
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import (
    AttnProcessor,
    PAGCFGIdentitySelfAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)
from golden_pipeline import latents, load_ip_adapter
from golden_unet import TOLERANCE, golden
from PIL import Image

from easyref_core.adapter.identity import reference_noise, reference_size
from easyref_core.sdxl_diffusers.adapter import hide_references, merge_lora, set_tokens
from easyref_core.sdxl_diffusers.identity import attach_identity, detach_identity, identity_run
from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents, encode_identity
from easyref_core.sdxl_diffusers.identity_run import IdentityRun

LAYER = goldens.description()["unet"]["layer"]


def pictures(*sizes: tuple[int, int]) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    return [
        Image.fromarray(
            torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8).numpy()
        )
        for w, h in sizes
    ]


@pytest.fixture
def pipe(steered: UNet2DConditionModel, pipeline: Callable) -> Any:
    attach_identity(steered)
    return pipeline(StableDiffusionXLPipeline, steered)


@pytest.fixture
def group() -> IdentityLatents:
    generator = torch.Generator().manual_seed(0)
    return IdentityLatents(tuple(torch.randn(2, 4, 16, 16, generator=generator)))


@pytest.fixture
def passes(steered: UNet2DConditionModel) -> list[int]:
    """Rows of each pass through the UNet, the references' too."""
    rows: list[int] = []
    steered.conv_in.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    return rows


def with_run(pipe: Any, run: IdentityRun, **options: Any) -> torch.Tensor:
    return latents(pipe, cross_attention_kwargs={"identity": run}, **options)


def read(run: IdentityRun) -> list[torch.Tensor]:
    """Keys and values that were read last."""
    return [x for runs in run._read.layers.values() for r in runs for x in (r.key, r.value)]


def same(first: IdentityRun, second: IdentityRun) -> bool:
    return all(torch.equal(a, b) for a, b in zip(read(first), read(second), strict=True))


def test_a_window_costs_a_pass_for_each_of_its_steps(
    pipe: Any, group: IdentityLatents, passes: list[int]
) -> None:
    """Steps at timesteps 999, 749.., 499.., 249.., 0 by noise level: places 0, .25, .5, .75, 1."""
    pipe.scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="linspace")
    plain = latents(pipe, num_inference_steps=5)
    passes.clear()
    windows = {(0.2, 0.8): [2, 2, 2, 2, 2, 2, 2, 2], (0.0, 0.1): [2] * 6, (0.9, 1.0): [2] * 6}
    for (start, end), wanted in windows.items():
        run = identity_run(pipe, group, start=start, end=end)
        assert not torch.equal(with_run(pipe, run, num_inference_steps=5), plain)
        assert (passes, run.passes) == (wanted, len(wanted) - 5)
        passes.clear()
    for settings in ({"weight": 0.0}, {"start": 0.3, "end": 0.4}):
        run = identity_run(pipe, group, **settings)
        assert torch.equal(with_run(pipe, run, num_inference_steps=5), plain)
        assert (passes, run.passes) == ([2] * 5, 0)
        passes.clear()
    run = identity_run(pipe, group, reuse_steps=2)
    with_run(pipe, run, num_inference_steps=5)
    assert (len(passes), run.passes, len(run.errors)) == (8, 3, 2)


@pytest.mark.parametrize("guidance_scale", [5.0, 0.0])
def test_prompts_of_a_batch_have_their_own_references(
    pipe: Any, group: IdentityLatents, guidance_scale: float
) -> None:
    """Each latent as alone, with and without guidance; two pictures of each prompt."""
    other = IdentityLatents((torch.ones(4, 8, 24),), seed=7)
    groups, text = [group, other], golden("text_states")
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    usual = {
        "height": 128,
        "width": 128,
        "output_type": "latent",
        "num_inference_steps": 2,
        "guidance_scale": guidance_scale,
    }
    set_tokens(pipe.unet, None)

    def sample(groups: Any, rows: slice, prompts: slice, images: int) -> torch.Tensor:
        texts = torch.cat((text, text * 0.5))[prompts]
        states = dict.fromkeys(names, texts) | dict.fromkeys(
            pooled, golden("pooled_text").expand(len(texts), -1)
        )
        run = identity_run(pipe, groups)
        return pipe(
            latents=noise[rows],
            num_images_per_prompt=images,
            cross_attention_kwargs={"identity": run},
            **states,
            **usual,
        ).images

    found = sample(groups, slice(0, 4), slice(0, 2), 2)
    for row in range(4):
        prompt = row // 2
        alone = sample(groups[prompt], slice(row, row + 1), slice(prompt, prompt + 1), 1)
        spread = alone.std()
        assert goldens.difference(found[row] / spread, alone[0] / spread) <= 10 * TOLERANCE


def test_references_are_read_without_controlnets_and_ip_adapters(
    pipe: Any, plain: UNet2DConditionModel, pipeline: Callable, group: IdentityLatents
) -> None:
    once = {"num_inference_steps": 1}
    alone = identity_run(pipe, group)
    wanted = with_run(pipe, alone, **once)
    unet = pipe.unet
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(plain, conditioning_channels=3).eval()
    goldens.randomise(controlnet.controlnet_mid_block)
    hide_references(controlnet, unet)
    controlled = pipeline(
        diffusers.StableDiffusionXLControlNetPipeline, unet, controlnet=controlnet
    )
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    run = identity_run(controlled, group)
    assert not torch.equal(with_run(controlled, run, image=image, **once), wanted)
    assert same(run, alone)

    load_ip_adapter(pipe, 0.7)
    embeds = [torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(0))]
    run = identity_run(pipe, group)
    found = with_run(pipe, run, ip_adapter_image_embeds=embeds, **once)
    assert goldens.difference(found, wanted) > 0.01
    assert same(run, alone)
    pipe.unload_ip_adapter()
    assert torch.equal(with_run(pipe, identity_run(pipe, group), **once), wanted)


@torch.no_grad()
@pytest.mark.parametrize("guided", [True, False])
def test_perturbed_rows_change_nothing_in_the_others(
    steered: UNet2DConditionModel, group: IdentityLatents, guided: bool
) -> None:
    """[negative, conditional, perturbed]: the first two as without perturbed attention, and the
    third as the second where no layer perturbs it."""
    attach_identity(steered)
    set_tokens(steered, None)
    parts = [golden("negative_text_states")] * guided + [golden("text_states")] * 2

    def predict(parts: list[torch.Tensor], conditional: list[slice]) -> torch.Tensor:
        run = IdentityRun(
            group,
            diffusers.EulerDiscreteScheduler().alphas_cumprod,
            conditional=lambda _: conditional,
        )
        count = len(parts)
        return steered(
            golden("latents").expand(count, -1, -1, -1),
            golden("timestep"),
            encoder_hidden_states=torch.cat(parts),
            added_cond_kwargs={
                "text_embeds": golden("pooled_text").expand(count, -1),
                "time_ids": golden("time_ids").expand(count, -1),
            },
            cross_attention_kwargs={"identity": run},
        ).sample

    first = int(guided)
    rows = [slice(first, first + 1), slice(first + 1, first + 2)]
    wanted = predict(parts[:-1], rows[:1])
    unperturbed = predict(parts, rows)
    assert goldens.difference(unperturbed[-1], unperturbed[-2]) <= TOLERANCE
    kind = PAGCFGIdentitySelfAttnProcessor2_0 if guided else PAGIdentitySelfAttnProcessor2_0
    for name, attn in steered.named_modules():
        if name.endswith("attn1") and "mid" in name:
            attn.set_processor(kind())
    found = predict(parts, rows)
    assert goldens.difference(found[:-1], wanted) <= TOLERANCE
    assert goldens.difference(found[-1], unperturbed[-1]) > 0.01


def test_perturbed_attention_guidance_with_identity(
    pipe: Any, pipeline: Callable, group: IdentityLatents, passes: list[int]
) -> None:
    kind = diffusers.StableDiffusionXLPAGPipeline
    pag = pipeline(kind, pipe.unet, pag_applied_layers=["mid"])
    run = identity_run(pag, group)
    found = with_run(pag, run, pag_scale=3.0)
    assert passes == [2, 3, 2, 3]
    assert goldens.difference(found, latents(pag, pag_scale=3.0)) > 0.01
    assert torch.equal(
        with_run(pag, identity_run(pag, group), pag_scale=0.0),
        with_run(pipe, identity_run(pipe, group)),
    )


def test_a_picture_to_start_from(pipe: Any, group: IdentityLatents, passes: list[int]) -> None:
    """Partial denoising: steps count by their noise level."""
    img2img = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    img2img.set_progress_bar_config(disable=True)
    start = torch.zeros(1, 4, 16, 16)
    text, negative = golden("text_states"), golden("negative_text_states")
    set_tokens(pipe.unet, None)
    run = identity_run(img2img, group, start=0.0, end=0.5)
    img2img(
        image=start,
        strength=0.4,
        prompt_embeds=text,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=golden("pooled_text"),
        negative_pooled_prompt_embeds=golden("negative_pooled_text"),
        num_inference_steps=5,
        output_type="latent",
        cross_attention_kwargs={"identity": run},
    )
    assert (run.passes, passes) == (0, [2, 2])  # all of it lies after 0.6


def fuse(unet: UNet2DConditionModel) -> None:
    unet.fuse_qkv_projections()


@pytest.mark.parametrize(
    "change",
    [
        lambda unet: unet.set_attn_processor(AttnProcessor()),
        lambda unet: unet.set_attn_processor(SlicedAttnProcessor(1)),
        fuse,
        merge_lora,
    ],
    ids=["plain", "sliced", "fused", "merged"],
)
def test_other_processors_and_merged_weights_change_nothing(
    pipe: Any, group: IdentityLatents, change: Callable
) -> None:
    wanted = with_run(pipe, identity_run(pipe, group))
    change(pipe.unet)
    found = with_run(pipe, identity_run(pipe, group))
    assert goldens.difference(found, wanted) <= 10 * TOLERANCE


class OwnProjection:
    """A processor that leaves out the layer's own keys and values."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return attn.to_out[0](attn.to_q(hidden_states))


class FewerRows:
    """A processor that attends for fewer rows than it gets."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        out = AttnProcessor()(attn, hidden_states[:1])
        return out.expand(len(hidden_states), -1, -1)


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        (OwnProjection(), "does not use to_k, to_v of the layer"),
        (FewerRows(), "does not compute one result from one query"),
    ],
)
def test_processors_past_identity_are_refused(
    unet: UNet2DConditionModel,
    pipeline: Callable,
    group: IdentityLatents,
    processor: Any,
    said: str,
) -> None:
    attach_identity(unet)
    pipe = pipeline(StableDiffusionXLPipeline, unet)
    unet.get_submodule(f"{LAYER}.attn1").set_processor(processor)
    run = identity_run(pipe, group)
    with goldens.refused(type(processor).__name__, said, "leave out identity"):
        pipe(
            prompt_embeds=golden("text_states"),
            negative_prompt_embeds=golden("text_states"),
            pooled_prompt_embeds=golden("pooled_text"),
            negative_pooled_prompt_embeds=golden("pooled_text"),
            num_inference_steps=1,
            height=128,
            width=128,
            cross_attention_kwargs={"identity": run},
        )


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EDMEulerScheduler(),
        diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
        ),
    ],
    ids=["flow matching", "EDM", "continuous"],
)
def test_other_noise_schedules_are_refused(
    pipe: Any, group: IdentityLatents, scheduler: Any
) -> None:
    pipe.scheduler = scheduler
    with goldens.refused(type(scheduler).__name__, "SDXL's timesteps"):
        identity_run(pipe, group)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": True}),
    ],
)
def test_references_have_the_noise_of_the_schedulers_timesteps(
    steered: UNet2DConditionModel, pipe: Any, name: str, settings: dict[str, Any]
) -> None:
    """What enters the UNet is what the scheduler would make of them, scaled as the sample."""
    pipe.scheduler = getattr(diffusers, name)(**settings)
    group = IdentityLatents((torch.full((4, 16, 16), 0.5),), seed=3)
    noise = reference_noise((4, 16, 16), 3, 0)
    seen: list[torch.Tensor] = []
    times: list[torch.Tensor] = []
    steered.conv_in.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    steered.time_proj.register_forward_hook(lambda _, given, __: times.append(given[0][0]))
    with_run(pipe, identity_run(pipe, group), num_inference_steps=3)
    passes = [(x[0], t) for x, t in zip(seen, times, strict=True) if len(x) == 1]
    assert len(passes) >= 3
    alphas = pipe.scheduler.alphas_cumprod.double().clamp(min=2**-24)
    sigmas = ((1 - alphas) / alphas).sqrt().log()
    for found, time in passes:
        low, high = int(time.floor()), int(time.ceil())
        sigma = torch.lerp(sigmas[low], sigmas[high], time.double() - low).exp()
        wanted = (group.latents[0].double() + sigma * noise) / (sigma**2 + 1).sqrt()
        assert (found - wanted).abs().max() <= 1e-5


def test_references_are_encoded_at_the_samples_area(pipe: Any) -> None:
    vae, originals = pipe.vae, pictures((300, 200), (64, 64))
    found = encode_identity(pipe, originals, width=256, height=192, seed=4)
    assert found.seed == 4
    for picture, latent in zip(originals, found.latents, strict=True):
        width, height = reference_size(*picture.size, 256 * 192)
        assert latent.shape == (4, height // 8, width // 8)
        resized = picture.resize((width, height), Image.Resampling.LANCZOS)
        pixels = diffusers.image_processor.VaeImageProcessor().preprocess(resized)
        with torch.no_grad():
            wanted = vae.encode(pixels).latent_dist.mean[0] * vae.config.scaling_factor
        assert (latent - wanted).abs().max() <= 1e-5
    usual = encode_identity(pipe, originals[1:])
    assert usual.latents[0].shape == (4, 16, 16)  # the UNet's own size


def test_a_half_precision_vae_encodes_in_float32(pipe: Any, vae: Any) -> None:
    pipe.vae = copy.deepcopy(vae).half()
    found = encode_identity(pipe, pictures((64, 64)))
    assert pipe.vae.dtype == torch.float16
    assert found.latents[0].dtype == torch.float32
    other = copy.deepcopy(vae).half().float()
    pipe.vae = other
    assert torch.equal(found.latents[0], encode_identity(pipe, pictures((64, 64))).latents[0])


@pytest.mark.parametrize(
    ("given", "settings", "said"),
    [
        ([], {}, ("a list of one or more",)),
        (Image.new("RGB", (8, 8)), {}, ("a list of one or more",)),
        (None, {}, ("a list of one or more",)),
        ((picture for picture in []), {}, ("are a generator", "a list of one or more")),
        (["ann.jpg"], {}, ("open_picture",)),
        ([Image.new("RGB", (8, 8))], {"width": 0}, ("width is 0",)),
        ([Image.new("RGB", (8, 8))], {"height": float("nan")}, ("height is nan",)),
        ([Image.new("RGB", (8, 8))], {"seed": -1}, ("seed is -1",)),
    ],
    ids=["none", "one", "nothing", "generator", "a name", "width", "height", "seed"],
)
def test_what_is_no_group_of_pictures_is_refused(
    pipe: Any, given: Any, settings: dict[str, Any], said: tuple[str, ...]
) -> None:
    with goldens.refused(*said):
        encode_identity(pipe, given, **settings)


def test_latents_that_are_no_numbers_are_refused(pipe: Any, vae: Any) -> None:
    pipe.vae = copy.deepcopy(vae)
    torch.nn.init.constant_(pipe.vae.encoder.conv_in.weight, float("nan"))
    with goldens.refused("not numbers", "float32"):
        encode_identity(pipe, pictures((64, 64)))


def test_a_run_needs_identity_on_the_unet(pipe: Any, group: IdentityLatents) -> None:
    detach_identity(pipe.unet)
    with goldens.refused("attach_identity(pipe.unet)"):
        identity_run(pipe, group)
