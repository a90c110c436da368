"""SDXL as one file, under the names of Stability AI's code, from a diffusers directory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
)


def write_single_file(path: Path, folder: Path) -> Path:
    """One file of a directory's weights; its VAE is an AutoencoderKL of four blocks."""
    unet = _weights(folder / "unet")
    layers = 1 + max(int(n.split(".")[3]) for n in unet if n.startswith("down_blocks.0.resnets"))
    weights = {f"model.diffusion_model.{_unet_name(n, layers)}": w for n, w in unet.items()}
    for name, weight in _weights(folder / "vae").items():
        for pattern, by in _VAE:
            name = re.sub(pattern, by, name)
        is_attention = ".attn_1." in name and weight.ndim == 2
        weights[f"first_stage_model.{name}"] = weight[..., None, None] if is_attention else weight
    clip_l = "conditioner.embedders.0.transformer."
    weights |= {clip_l + n: w for n, w in _weights(folder / "text_encoder").items()}
    clip_g = "conditioner.embedders.1.model."
    weights |= {clip_g + n: w for n, w in _open_clip(_weights(folder / "text_encoder_2")).items()}
    save_file({n: w.contiguous() for n, w in weights.items()}, path, {"format": "pt"})
    return path


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _unet_name(name: str, layers: int) -> str:
    for start, other in _UNET.items():
        if name.startswith(start + "."):
            return _resnet(other + name.removeprefix(start))
    match = re.fullmatch(
        r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name
    )
    assert match, name
    way, level, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if way == "down":
        place = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else number)
        inner = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        rest = rest.replace("conv.", "op.", 1) if kind == "downsamplers" else rest
        return _resnet(f"input_blocks.{place}.{inner}.{rest}")
    place = level * (layers + 1) + (layers if kind == "upsamplers" else number)
    inner = {"resnets": "0", "attentions": "1", "upsamplers": "2"}[kind]
    return _resnet(f"output_blocks.{place}.{inner}.{rest}")


def _resnet(name: str) -> str:
    if "transformer_blocks" in name:
        return name
    for part, other in _RESNET.items():
        name = re.sub(rf"\.{part}\.", f".{other}.", name)
    return name


def _open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' names to OpenCLIP's."""
    found: dict[str, Any] = {
        "text_projection": weights["text_projection.weight"].T,
        "token_embedding.weight": weights["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": weights["text_model.embeddings.position_embedding.weight"],
    }
    layer = "text_model.encoder.layers."
    for name, weight in weights.items():
        if name.startswith("text_model.final_layer_norm."):
            found[name.replace("text_model.final_layer_norm", "ln_final")] = weight
        if not name.startswith(layer) or re.search(r"\.[kv]_proj\.", name):
            continue
        other = name.replace(layer, "transformer.resblocks.")
        for part, theirs in (
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
            ("self_attn.out_proj", "attn.out_proj"),
        ):
            other = other.replace(part, theirs)
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            weight = torch.cat(parts)
            other = other.replace("self_attn.q_proj.", "attn.in_proj_")
        found[other] = weight
    return found
