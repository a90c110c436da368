"""What the benchmark scores and compares with: layouts that transformers and diffusers load."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from transformers import (
    AutoImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)

from easyref_core.errors import EasyRefError
from easyref_core.pictures.preprocessing import picture_levels
from workshop.demo.bench.clip import (
    Captions,
    clip_config,
    contrast,
    normalised,
    picture_embeds,
    write_clip,
    write_image_encoder,
    write_tokenizer,
)
from workshop.demo.bench.dino import dino_config, instance_loss, write_dino
from workshop.demo.bench.ip_adapter import FILE, attach, write_ip_adapter
from workshop.demo.bench.sdxl import demo_pipeline, write_sdxl
from workshop.demo.bench.train_models import load_recipe, train_part
from workshop.demo.dataset.groups import draw_identity
from workshop.demo.dataset.splits import identities
from workshop.demo.models import DemoModels
from workshop.demo.pretraining.pictures import DrawnPictures
from workshop.demo.rows import SamplingSettings
from workshop.demo.stored_weights import load_stored
from workshop.demo.tiny import write_tiny_set


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("models") / "set")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    write_tokenizer(folder)
    write_clip(CLIPModel(clip_config()), folder)
    return folder


@pytest.fixture(scope="module")
def drawn() -> DrawnPictures:
    rng = random.Random(0)
    images = [draw_identity(identity, 128, rng) for identity in identities()[0][:3]]
    pixels = torch.stack([picture_levels(image.picture) for image in images])
    captions = [(image.full_caption, image.caption) for image in images]
    return DrawnPictures(["0", "1", "2"], pixels, captions, [image.facts for image in images])


def test_clip_is_prepared_by_its_processor_as_in_training(clip: Path, drawn: DrawnPictures) -> None:
    processor = CLIPProcessor.from_pretrained(clip)
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in drawn.pixels]
    prepared = processor(images=pictures, return_tensors="pt").pixel_values
    expected = normalised(drawn.batch(torch.arange(3)))
    torch.testing.assert_close(prepared, expected, atol=1e-5, rtol=0)


def test_clips_tokenizer_knows_captions_word_by_word(clip: Path) -> None:
    tokenizer = CLIPProcessor.from_pretrained(clip).tokenizer
    text = "a red round creature with dots, sleepy eyes, crown, in the snow by day"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
    words = [token.removesuffix("</w>") for token in tokens[1:-1]]
    assert words == text.replace(",", " ,").split()
    assert max(tokenizer.get_vocab().values()) == clip_config().text_config.vocab_size - 1


def test_the_vision_tower_alone_gives_clips_embeddings(
    clip: Path, drawn: DrawnPictures, tmp_path: Path
) -> None:
    folder = write_image_encoder(clip, tmp_path / "image_encoder")
    tower = CLIPVisionModelWithProjection.from_pretrained(folder).float()
    model = CLIPModel.from_pretrained(clip).float()
    pixels = normalised(drawn.batch(torch.arange(3)))
    torch.testing.assert_close(tower(pixels).image_embeds, picture_embeds(model, pixels))


def test_captions_are_learned_whole_and_by_their_parts(clip: Path, drawn: DrawnPictures) -> None:
    captions = Captions(drawn, clip)
    assert captions.parts == 4
    ids, chosen = captions.of([0, 1, 0], 0)
    assert (len(ids), chosen.tolist()) == (2, [0, 1, 0])
    eyes, _ = captions.of([0, 1, 2], 2)
    assert len(eyes) == len({facts["eyes"] for facts in drawn.facts})


def test_equal_captions_all_count_as_right() -> None:
    chosen = torch.tensor([0, 0, 1])
    right = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    assert contrast(right, chosen) < 0.4 < contrast(right.flip(1), chosen)


def test_crops_of_one_picture_belong_together() -> None:
    features = torch.eye(4)
    together = torch.cat((features, features))
    apart = torch.cat((features, features.roll(1, 0)))
    assert instance_loss(together) < 0.1 < instance_loss(apart)


def test_dino_has_the_layout_of_published_files(tmp_path: Path, drawn: DrawnPictures) -> None:
    torch.manual_seed(0)
    write_dino(Dinov2Model(dino_config()), tmp_path)
    model, processor = (
        Dinov2Model.from_pretrained(tmp_path),
        AutoImageProcessor.from_pretrained(tmp_path),
    )
    picture = Image.fromarray(drawn.pixels[0].permute(1, 2, 0).numpy())
    prepared = processor(picture, return_tensors="pt").pixel_values
    assert prepared.shape == (1, 3, 128, 128)
    assert model.float()(prepared).pooler_output.shape == (1, dino_config().hidden_size)


def test_diffusers_loads_the_ip_adapter_that_was_trained(models: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = load_stored(UNet2DConditionModel, models / "unet").requires_grad_(False)
    attach(trained, ImageProjection(24, 96, 4))
    assert any(weight.requires_grad for weight in trained.parameters())
    file = write_ip_adapter(trained, tmp_path / FILE)
    pipe = demo_pipeline(models)
    pipe.load_ip_adapter(
        str(tmp_path), subfolder=None, weight_name=file.name, image_encoder_folder=None
    )
    noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 96)
    added = {"text_embeds": torch.randn(2, 64), "time_ids": torch.ones(2, 6)}
    added |= {"image_embeds": [torch.randn(2, 1, 24)]}
    with torch.no_grad():
        one, other = (
            unet(noisy, 500, text, added_cond_kwargs=added).sample for unet in (trained, pipe.unet)
        )
        plain = load_stored(UNet2DConditionModel, models / "unet")
        added.pop("image_embeds")
        without = plain(noisy, 500, text, added_cond_kwargs=added).sample
    torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)
    assert (one - without).abs().max() > 0.01


def test_the_pipeline_samples_the_demos_images(models: Path, tmp_path: Path) -> None:
    settings = SamplingSettings(steps=4, side=64)
    expected = DemoModels(models, half=False).sample(["in the snow by day"], [5], settings)
    pipe = StableDiffusionXLPipeline.from_pretrained(write_sdxl(models, tmp_path))
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(4)
    # The demo starts from noise of the first timestep's variance, as ComfyUI does.
    level = 1 - pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps[0]]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    found = pipe(
        "in the snow by day",
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=settings.cfg,
        latents=noise * level.sqrt(),
        output_type="pt",
    ).images
    assert (found[0] * 255 - expected[0]).abs().max() < 0.75


def test_the_recipe_is_read_and_parts_are_named() -> None:
    assert load_recipe().clip.steps > 0
    with pytest.raises(EasyRefError, match=r"no part 'clips'.*clip, dino, ip_adapter"):
        train_part("clips", Path("nowhere"))


def test_the_ip_adapter_needs_a_clip(tmp_path: Path) -> None:
    with pytest.raises(EasyRefError, match="the part clip"):
        train_part("ip_adapter", tmp_path)
