"""Embeddings against torchmetrics' CLIPScore and against DINO run by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from score_models import CLIP_MEAN, CLIP_STD, END, MEAN, SIDE, START, STD

from easyref_core.errors import EasyRefError
from easyref_core.evaluation.metrics.embedders import open_clip, open_dino
from easyref_core.evaluation.metrics.similarity import cosine

pytest.importorskip("transformers")

PROMPTS = ("a red square on a beach", "Ünïcode, and 你好!", "x")
LONG = "a very long prompt of words " * 10


def picture(seed: int = 0, width: int = 40, height: int = 40, mode: str = "RGB") -> Image.Image:
    """Soft colours, so that no way of resizing them is far from another."""
    levels = np.random.default_rng(seed).integers(0, 256, (5, 5, 4), np.uint8)
    image = Image.fromarray(levels, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert(mode)


PICTURES = {
    "square": picture(0),
    "wide": picture(1, 90, 33),
    "tall": picture(2, 31, 77),
    "tiny": picture(3, 3, 5),
    "grey": picture(4, 50, 40, "L"),
    "alpha": picture(5, 50, 40, "RGBA"),
    "palette": picture(6, 50, 40, "P"),
}
pictures = pytest.mark.parametrize("shown", PICTURES.values(), ids=PICTURES)


def pixels(image: Image.Image, resized: tuple[int, int], mean: object, std: object) -> torch.Tensor:
    """[1, 3, S, S] by PIL and numpy alone: resized to (width, height), cut in the middle."""
    small = image.convert("RGB").resize(resized, Image.Resampling.BICUBIC)
    left, top = ((side - SIDE) // 2 for side in resized)
    cut = np.asarray(small, np.float64)[top : top + SIDE, left : left + SIDE] / 255
    return torch.from_numpy((cut - mean) / std).float().permute(2, 0, 1)[None]


def shortest(image: Image.Image, side: int) -> tuple[int, int]:
    """(width, height) with the shorter of them so long."""
    scale = side / min(image.size)
    width, height = (side if s == min(image.size) else math.floor(s * scale) for s in image.size)
    return width, height


def hand_made_dinov2(state: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
    """CLS embedding [W] by plain torch from the released names of weights."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    weight = state["embeddings.patch_embeddings.projection.weight"]
    patches = torch.nn.functional.unfold(image, 14, stride=14)[0].T  # [patches, 3 * 14 * 14]
    x = patches @ weight.flatten(1).T + state["embeddings.patch_embeddings.projection.bias"]
    x = (
        torch.cat((state["embeddings.cls_token"][0], x))
        + state["embeddings.position_embeddings"][0]
    )
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        y = norm(f"{layer}.norm1", x)
        q, k, v = (
            linear(f"{layer}.attention.attention.{n}", y).unflatten(-1, (2, 16)).transpose(0, 1)
            for n in ("query", "key", "value")
        )
        mixed = (q @ k.mT / 4).softmax(-1) @ v
        y = linear(f"{layer}.attention.output.dense", mixed.transpose(0, 1).flatten(1))
        x = x + y * state[f"{layer}.layer_scale1.lambda1"]
        y = torch.nn.functional.gelu(linear(f"{layer}.mlp.fc1", norm(f"{layer}.norm2", x)))
        x = x + linear(f"{layer}.mlp.fc2", y) * state[f"{layer}.layer_scale2.lambda1"]
    return norm("layernorm", x)[0]


def unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / vector.norm()


@pictures
def test_dinov2_computes_what_its_weights_say_by_hand(dinov2: Path, shown: Image.Image) -> None:
    from safetensors.torch import load_file

    state = load_file(dinov2 / "model.safetensors")
    prepared = pixels(shown, shortest(shown, 32), MEAN, STD)
    expected = unit(hand_made_dinov2(state, prepared))
    found = open_dino(dinov2, "small").picture(shown)
    assert found.shape == (32,)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pictures
def test_dino_sees_the_whole_picture_squeezed(dino: Path, shown: Image.Image) -> None:
    from transformers import ViTModel

    model = ViTModel.from_pretrained(dino, add_pooling_layer=False, local_files_only=True).eval()
    with torch.no_grad():
        prepared = pixels(shown, (SIDE, SIDE), MEAN, STD)
        expected = unit(model(prepared).last_hidden_state[0, 0])
    torch.testing.assert_close(open_dino(dino, "small").picture(shown), expected, atol=1e-5, rtol=0)


@pictures
def test_clip_prepares_pictures_as_its_settings_say(clip: Path, shown: Image.Image) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip, local_files_only=True).eval()
    with torch.no_grad():
        prepared = pixels(shown, shortest(shown, SIDE), CLIP_MEAN, CLIP_STD)
        expected = unit(model.visual_projection(model.vision_model(prepared).pooler_output)[0])
    torch.testing.assert_close(open_clip(clip, "small").picture(shown), expected, atol=1e-5, rtol=0)


class WithPlainFeatures(torch.nn.Module):
    """A CLIP whose features are tensors, as torchmetrics takes them; transformers 5 wraps them."""

    def __init__(self, directory: Path) -> None:
        from transformers import CLIPModel

        super().__init__()
        self.model = CLIPModel.from_pretrained(directory, local_files_only=True).eval()
        self.config = self.model.config

    def get_image_features(self, *given: torch.Tensor) -> torch.Tensor:
        found = self.model.get_image_features(*given)
        return getattr(found, "pooler_output", found)

    def get_text_features(self, *given: torch.Tensor) -> torch.Tensor:
        found = self.model.get_text_features(*given)
        return getattr(found, "pooler_output", found)


@pytest.fixture(scope="module")
def for_torchmetrics(clip: Path) -> Any:
    import transformers

    # transformers' default resizes by torchvision, which rounds otherwise than PIL.
    name = "CLIPImageProcessorPil"
    kind = getattr(transformers, name, transformers.CLIPImageProcessor)
    processor = transformers.CLIPProcessor(
        kind.from_pretrained(clip, local_files_only=True),
        transformers.CLIPTokenizer.from_pretrained(clip, local_files_only=True),
    )
    return WithPlainFeatures(clip), processor


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["square", "wide", "tall"])
def test_clip_agrees_with_torchmetrics(
    clip: Path, for_torchmetrics: Any, name: str, prompt: str
) -> None:
    multimodal = pytest.importorskip("torchmetrics.functional.multimodal")
    first, second = PICTURES[name], PICTURES["alpha"].convert("RGB")
    levels = [torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in (first, second)]
    embedder = open_clip(clip, "small")
    other = embedder.picture(second)
    for own, theirs in ((embedder.text(prompt), prompt), (other, levels[1])):
        score = multimodal.clip_score(levels[0], theirs, lambda: for_torchmetrics).item()
        found = 100 * cosine(embedder.picture(first), own)
        assert max(found, 0) == pytest.approx(score, abs=1e-4)


def test_a_long_prompt_is_cut_before_its_end_token(clip: Path) -> None:
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained(clip, local_files_only=True).eval()
    letters = [*LONG.lower().encode()]
    assert len(letters) > 200
    embedder = open_clip(clip, "small")
    whole = embedder._tokenizer(LONG).input_ids
    assert len(whole) > 77
    ids = torch.tensor([[*whole[:76], END]])
    assert ids[0, 0] == START
    with torch.no_grad():
        expected = unit(model.text_projection(model.text_model(ids).pooler_output)[0])
    torch.testing.assert_close(embedder.text(LONG), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(embedder.text(LONG + "and more"), expected, atol=1e-5, rtol=0)


def test_half_a_character_is_refused(clip: Path) -> None:
    with pytest.raises(EasyRefError, match="half of a character"):
        open_clip(clip, "small").text("smile \ud83d")


def test_a_line_of_pixels_takes_no_memory(clip: Path, dinov2: Path, dino: Path) -> None:
    """Resized to 28 pixels of height, it would be a hundred thousand wide."""
    line = picture(7, 4096, 1)
    middle = line.crop((2040, 0, 2056, 1))
    for embedder in (open_clip(clip, "small"), open_dino(dinov2, "small")):
        assert torch.equal(embedder.picture(line), embedder.picture(middle))
    squeezed = open_dino(dino, "small")
    assert not torch.equal(squeezed.picture(line), squeezed.picture(middle))
