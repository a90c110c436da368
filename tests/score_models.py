"""Small random CLIP, DINOv2 and DINO in the layout of their releases."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sdxl_directory import write_clip_tokenizer

SIDE = 28  # of what the models see
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYERS = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
}
_IMAGE = {"image_size": SIDE, "patch_size": 14}
START, END = 512, 513  # of the tokenizer of bytes


def write_clip(directory: Path, seed: int = 0) -> Path:
    """As openai/clip-vit-large-patch14, whose preprocessing is written in an old form."""
    from transformers import CLIPConfig, CLIPModel

    special = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": END}
    text = {**_LAYERS, **special, "vocab_size": 514, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config={**_LAYERS, **_IMAGE}, projection_dim=24)
    write_clip_tokenizer(directory)
    _save(CLIPModel, config, directory, seed)
    return _preprocessing(
        directory,
        feature_extractor_type="CLIPFeatureExtractor",
        do_center_crop=True,
        crop_size=SIDE,
        size=SIDE,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
    )


def write_dinov2(directory: Path, seed: int = 1) -> Path:
    """As facebook/dinov2-small: resized a little larger than it is cut."""
    from transformers import Dinov2Config, Dinov2Model

    layers = {key: value for key, value in _LAYERS.items() if key != "intermediate_size"}
    _save(Dinov2Model, Dinov2Config(**layers, **_IMAGE), directory, seed)
    return _preprocessing(
        directory,
        image_processor_type="BitImageProcessor",
        do_center_crop=True,
        crop_size={"height": SIDE, "width": SIDE},
        size={"shortest_edge": 32},
        do_rescale=True,
        rescale_factor=1 / 255,
        image_mean=MEAN,
        image_std=STD,
    )


def write_dino(directory: Path, seed: int = 2) -> Path:
    """As facebook/dino-vits16: the whole picture, squeezed into a square."""
    from transformers import ViTConfig, ViTModel

    _save(ViTModel, ViTConfig(**_LAYERS, **_IMAGE), directory, seed, add_pooling_layer=False)
    return _preprocessing(
        directory,
        feature_extractor_type="ViTFeatureExtractor",
        size=SIDE,
        image_mean=MEAN,
        image_std=STD,
    )


def _save(kind: Any, config: Any, directory: Path, seed: int, **arguments: Any) -> None:
    torch.manual_seed(seed)
    model = kind(config, **arguments)
    for weight in model.parameters():  # as small as they begin, all pictures look alike
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)


def _preprocessing(directory: Path, **settings: Any) -> Path:
    common = {"do_normalize": True, "do_resize": True, "resample": 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(common | settings))
    return directory
