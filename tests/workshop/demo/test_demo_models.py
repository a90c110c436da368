"""A model set in memory: batches equal single images, and references have their weight."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from easyref_core.adapter.stages import Window
from easyref_core.demo_set import STORED_IDS, TABLE
from easyref_core.encode.group import Reference, plan_group
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.errors import EasyRefError
from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents
from workshop.demo.adapter import AppliedIdentity, AppliedReferences, DemoAdapter
from workshop.demo.models import DemoModels
from workshop.demo.pretraining.words import used_ids
from workshop.demo.rows import SamplingSettings
from workshop.demo.tiny import write_tiny_set

QUICK = SamplingSettings(steps=2, side=64)
PROMPTS = ["in the snow at sunset", "on a beach by day", "a star shape"]
SEEDS = [3, 4, 5]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_set(tmp_path_factory.mktemp("models") / "set")


@pytest.fixture(scope="module")
def models(directory: Path) -> DemoModels:
    return DemoModels(directory, half=False)


@pytest.fixture(scope="module")
def adapter(models: DemoModels) -> DemoAdapter:
    return models.adapter()


@pytest.fixture(scope="module")
def groups() -> list[list[Image.Image]]:
    """Three groups of one to three pictures, of several sizes."""
    generator = torch.Generator().manual_seed(0)

    def picture(width: int, height: int) -> Image.Image:
        levels = torch.randint(256, (height, width, 3), generator=generator, dtype=torch.uint8)
        return Image.fromarray(levels.numpy(), "RGB")

    return [
        [picture(60, 60), picture(90, 60)],
        [picture(60, 60)],
        [picture(56, 100), picture(60, 60), picture(70, 70)],
    ]


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


@pytest.mark.parametrize("aggregation", ["easyref", "average"])
def test_groups_encoded_in_a_batch_equal_each_encoded_alone(
    models: DemoModels,
    adapter: DemoAdapter,
    groups: list[list[Image.Image]],
    aggregation: str,
) -> None:
    batched = adapter.encode(groups, PROMPTS, average=aggregation == "average")
    for row, (group, prompt) in enumerate(zip(groups, PROMPTS, strict=True)):
        plan = plan_group(
            plan_encoder(adapter.checkpoint, models.directory / "mllm"),
            adapter.tokenizer,
            [Reference(picture) for picture in group],
            prompt,
            aggregation=aggregation,
        )
        alone = encode_references(adapter.encoder, plan)
        assert (batched.cond[row] - alone.cond[0]).abs().max() < 1e-4
        assert (batched.uncond[row] - alone.uncond[0]).abs().max() < 1e-4
    assert (batched.adapter, batched.aggregation) == (adapter.checkpoint.identity, aggregation)


def test_an_image_does_not_depend_on_its_batch(
    models: DemoModels,
    adapter: DemoAdapter,
    groups: list[list[Image.Image]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    references = AppliedReferences(adapter, adapter.encode(groups, PROMPTS))
    together = models.sample(PROMPTS, SEEDS, QUICK, references)
    monkeypatch.setattr("workshop.demo.models._BATCH", 2)
    assert largest_difference(models.sample(PROMPTS, SEEDS, QUICK, references), together) <= 1
    for row in range(3):
        alone = AppliedReferences(
            adapter, adapter.encode(groups[row : row + 1], PROMPTS[row : row + 1])
        )
        images = models.sample(PROMPTS[row : row + 1], SEEDS[row : row + 1], QUICK, alone)
        assert largest_difference(images[0], together[row]) <= 1
    assert largest_difference(together[0], together[1]) > 10


def test_identity_acts_on_each_image_by_its_own_references(
    models: DemoModels, adapter: DemoAdapter, groups: list[list[Image.Image]]
) -> None:
    plain = AppliedReferences(adapter, adapter.encode(groups, PROMPTS))
    latents = models.identity_latents(groups, QUICK.side)

    def sampled(latents: Sequence[IdentityLatents], window: Window) -> torch.Tensor:
        references = replace(plain, identity=AppliedIdentity(latents, window))
        return models.sample(PROMPTS, SEEDS, QUICK, references)

    without = models.sample(PROMPTS, SEEDS, QUICK, plain)
    assert largest_difference(sampled(latents, Window(weight=0.0)), without) == 0
    own = sampled(latents, Window())
    assert all(largest_difference(own[row], without[row]) > 3 for row in range(3))
    other = sampled([latents[0], latents[2], latents[2]], Window())
    assert largest_difference(other[1], own[1]) > 3
    assert largest_difference(other[::2], own[::2]) <= 1
    with pytest.raises(EasyRefError, match="3 prompts but 2 groups of latents"):
        sampled(latents[:2], Window())


def test_tokens_of_one_group_are_used_for_all_rows(
    models: DemoModels, adapter: DemoAdapter, groups: list[list[Image.Image]]
) -> None:
    one = AppliedReferences(adapter, adapter.encode(groups[:1], PROMPTS[:1]))
    prompts = PROMPTS[:1] * 2
    both = AppliedReferences(adapter, adapter.encode(groups[:1] * 2, prompts))
    images = models.sample(prompts, SEEDS[:2], QUICK, one)
    assert largest_difference(images, models.sample(prompts, SEEDS[:2], QUICK, both)) <= 1


def test_at_weight_0_only_the_lora_has_an_effect(
    models: DemoModels, directory: Path, groups: list[list[Image.Image]], tmp_path: Path
) -> None:
    weights = load_file(directory / "easyref.safetensors")
    path = tmp_path / "without_lora.safetensors"
    save_file({name: w for name, w in weights.items() if "_lora." not in name}, path)
    plain = models.sample(PROMPTS, SEEDS, QUICK)
    for file, same in ((None, False), (path, True)):
        adapter = models.adapter(file)
        references = AppliedReferences(adapter, adapter.encode(groups, PROMPTS))
        other = AppliedReferences(adapter, adapter.encode(groups[::-1], PROMPTS), 0.0)
        off = models.sample(PROMPTS, SEEDS, QUICK, replace(references, weight=0.0))
        assert largest_difference(off, models.sample(PROMPTS, SEEDS, QUICK, other)) == 0
        assert (largest_difference(off, plain) <= 1) == same
        assert largest_difference(models.sample(PROMPTS, SEEDS, QUICK, references), off) > 10


def test_prompt_noise_and_outline_each_change_the_image(models: DemoModels) -> None:
    prompts, seeds = PROMPTS[:1], SEEDS[:1]
    plain = models.sample(prompts, seeds, QUICK)
    black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    lines = black.clone()
    lines[:, :, 20:40, 20] = 255
    outlined = models.sample(prompts, seeds, QUICK, outlines=lines)
    others = [
        models.sample(PROMPTS[1:2], seeds, QUICK),
        models.sample(prompts, [99], QUICK),
        models.sample(prompts, seeds, replace(QUICK, negative="a crown")),
        models.sample(prompts, seeds, QUICK, outlines=black),
        outlined,
    ]
    assert all(largest_difference(other, plain) > 3 for other in others)
    assert largest_difference(outlined, others[3]) > 3
    without = replace(QUICK, control_strength=0.0)
    assert largest_difference(models.sample(prompts, seeds, without, outlines=lines), plain) <= 1


def test_a_cut_down_embedding_table_gives_the_same_images(
    models: DemoModels, directory: Path, tmp_path: Path
) -> None:
    smaller = tmp_path / "set"
    shutil.copytree(directory, smaller)
    ids = used_ids()
    for name in ("clip_l", "clip_g"):
        path = smaller / "text_encoders" / name / "model.safetensors"
        weights = load_file(path)
        weights[TABLE] = weights[TABLE][torch.cat((ids, torch.tensor([1000])))]
        weights[STORED_IDS] = ids.int()
        save_file(weights, path)
    images = DemoModels(smaller, half=False).sample(PROMPTS, SEEDS, QUICK)
    assert largest_difference(images, models.sample(PROMPTS, SEEDS, QUICK)) == 0


def test_half_precision_gives_nearly_the_same_images(models: DemoModels, directory: Path) -> None:
    images = DemoModels(directory, half=True).sample(PROMPTS, SEEDS, QUICK)
    full = models.sample(PROMPTS, SEEDS, QUICK)
    difference = (images.float() - full.float()).abs().mean()
    assert 0 < difference < 4
    assert difference < (full[0].float() - full[1].float()).abs().mean() / 3


def test_images_are_reconstructed_by_the_autoencoder(models: DemoModels) -> None:
    numbers = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=numbers)
    reconstructed = models.reconstruct(pixels)
    assert (reconstructed.shape, reconstructed.dtype) == (pixels.shape, torch.uint8)
    beside_another = models.reconstruct(torch.stack((255 - pixels[0], pixels[1])))
    assert torch.equal(beside_another[1:], reconstructed[1:])
    # a batch of another size may be summed in another order: one level of rounding
    assert largest_difference(models.reconstruct(pixels[1:]), reconstructed[1:]) <= 1
    assert not torch.equal(reconstructed, pixels)


def test_inputs_that_do_not_fit_are_refused(
    models: DemoModels, adapter: DemoAdapter, groups: list[list[Image.Image]]
) -> None:
    with pytest.raises(EasyRefError, match="3 prompts but 2 seeds"):
        models.sample(PROMPTS, SEEDS[:2], QUICK)
    two = AppliedReferences(adapter, adapter.encode(groups[:2], PROMPTS[:2]))
    with pytest.raises(EasyRefError, match="3 prompts but 2 rows of tokens"):
        models.sample(PROMPTS, SEEDS, QUICK, two)
    with pytest.raises(EasyRefError, match="without images"):
        adapter.encode([[]], PROMPTS[:1])


def test_a_set_may_lack_the_controlnet_and_nothing_else(directory: Path, tmp_path: Path) -> None:
    smaller = tmp_path / "set"
    shutil.copytree(directory, smaller, ignore=shutil.ignore_patterns("controlnet"))
    models = DemoModels(smaller)
    assert not models.has_controlnet
    outlines = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(EasyRefError, match="no ControlNet"):
        models.sample(PROMPTS[:1], SEEDS[:1], QUICK, outlines=outlines)
    shutil.rmtree(smaller / "vae")
    with pytest.raises(EasyRefError, match="vae of the model set"):
        DemoModels(smaller)
    with pytest.raises(EasyRefError, match="not a demo model set"):
        DemoModels(tmp_path)
