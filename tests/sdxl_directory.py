"""A small SDXL in the diffusers layout, as training starts from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def write_sdxl_directory(folder: Path, models: Path) -> Path:
    """UNet, VAE and text encoders of a model set, with tokenizers of bytes and a noise schedule."""
    for part, source in (
        ("unet", "unet"),
        ("vae", "vae"),
        ("text_encoder", "text_encoders/clip_l"),
        ("text_encoder_2", "text_encoders/clip_g"),
    ):
        shutil.copytree(models / source, folder / part)
    from diffusers import DDPMScheduler

    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        write_clip_tokenizer(folder / name)
    return folder


def write_clip_tokenizer(folder: Path) -> None:
    """All single bytes, with and without the end of a word; no merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({t: n for n, t in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>"}
    special |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
