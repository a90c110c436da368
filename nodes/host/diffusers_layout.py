"""Reads model directories in the diffusers layout and renames their weights for ComfyUI.

Nothing here imports ComfyUI; the names and fixed values are those of its classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...easyref_core.demo_set import read_stored_weights
from ...easyref_core.errors import EasyRefError
from ...easyref_core.untrusted import escaped, is_regular, kind_of, read_json, text, whole_number

DIFFUSERS_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
)
TRANSFORMERS_FILES = ("model.safetensors", "model.fp16.safetensors")

# Fields whose values ComfyUI's UNet and ControlNet classes fix, with diffusers' defaults.
_FIXED_FIELDS: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "reverse_transformer_layers_per_block": None,
}


def comfy_unet_config(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Translate a diffusers UNet or ControlNet configuration to ComfyUI's terms.

    Args:
        config: Content of `config.json`.
        source: Named in errors.

    Returns:
        Arguments of `UNetModel`, `num_head_channels` included.

    Raises:
        EasyRefError: A field is missing, or has a value that ComfyUI's classes do not support.
    """
    require_fields(config, _FIXED_FIELDS, source)
    try:
        down = _attends(config["down_block_types"], source)
        levels = len(down)
        channels = _per_level(config["block_out_channels"], levels, source)
        layers = _per_level(config.get("layers_per_block", 2), levels, source)
        depths = _per_level(config.get("transformer_layers_per_block", 1), levels, source)
        heads = _per_level(
            config.get("num_attention_heads") or config["attention_head_dim"], levels, source
        )
        added_width = _size(config["projection_class_embeddings_input_dim"], source)
        context_width = _size(config["cross_attention_dim"], source)
        _size(config["addition_time_embed_dim"], source)
    except KeyError as error:
        raise EasyRefError(f"config.json in {source} lacks {error.args[0]!r}.") from error
    up = config.get("up_block_types")
    if up is not None and _attends(up, source) != down[::-1]:
        raise EasyRefError(f"{source}: up_block_types {up} do not mirror the down blocks.")
    if any(width % channels[0] for width in channels):
        raise EasyRefError(f"{source}: channels {channels} are not multiples of the first.")
    # The middle block has the heads of the last level, even if that level has no attention.
    widths = {channels[i] // heads[i] for i in range(levels) if down[i] or i == levels - 1}
    if len(widths) != 1:
        raise EasyRefError(
            f"{source}: attention heads are {sorted(widths)} wide on different levels; ComfyUI "
            "builds one width only."
        )
    depths_down = [depth if attends else 0 for depth, attends in zip(depths, down, strict=True)]
    return {
        "adm_in_channels": added_width,
        "channel_mult": [width // channels[0] for width in channels],
        "context_dim": context_width,
        "image_size": 32,
        "in_channels": _size(config.get("in_channels", 4), source),
        "legacy": False,
        "model_channels": channels[0],
        "num_classes": "sequential",
        "num_head_channels": widths.pop(),
        "num_res_blocks": layers,
        "out_channels": _size(config.get("out_channels", 4), source),
        "transformer_depth": [
            d for d, n in zip(depths_down, layers, strict=True) for _ in range(n)
        ],
        "transformer_depth_middle": depths[-1],
        "transformer_depth_output": [
            d for d, n in zip(depths_down, layers, strict=True) for _ in range(n + 1)
        ],
        "use_linear_in_transformer": config.get("use_linear_projection", False),
        "use_spatial_transformer": True,
    }


def _per_level(value: Any, levels: int, source: str) -> list[int]:
    """One size for each level; a single one counts for all."""
    sizes = value if isinstance(value, list) else [value] * levels
    if len(sizes) != levels or not levels:
        raise EasyRefError(f"config.json in {source} has {len(sizes)} sizes for {levels} levels.")
    return [_size(size, source) for size in sizes]


def _size(value: Any, source: str) -> int:
    return whole_number(value, f"A size in config.json in {source}", 1, 100_000)


def _attends(kinds: Any, source: str) -> list[bool]:
    """Which of a list of blocks have cross-attention."""
    if not isinstance(kinds, list):
        raise EasyRefError(f"config.json in {source} has {kind_of(kinds)} as a list of blocks.")
    return [text(kind, f"A block in {source}").startswith("CrossAttn") for kind in kinds]


def controlnet_names(shape: Mapping[str, Any]) -> dict[str, str]:
    """Diffusers name -> ComfyUI name of the weights that only a ControlNet has.

    `shape` is what `comfy_unet_config` returns.
    """
    modules = {"controlnet_mid_block": "middle_block_out.0"}
    # One output for the first convolution, each residual block and each downsampler.
    outputs = sum(shape["num_res_blocks"]) + len(shape["channel_mult"])
    for index in range(outputs):
        modules[f"controlnet_down_blocks.{index}"] = f"zero_convs.{index}.0"
    # Eight convolutions on the control picture, with an activation after each but the last.
    hint = ("conv_in", *(f"blocks.{index}" for index in range(6)), "conv_out")
    for index, name in enumerate(hint):
        modules[f"controlnet_cond_embedding.{name}"] = f"input_hint_block.{2 * index}"
    return {
        f"{old}.{kind}": f"{new}.{kind}"
        for old, new in modules.items()
        for kind in ("weight", "bias")
    }


def taesd_name(name: str) -> str:
    """ComfyUI's name of an `AutoencoderTiny` weight.

    Both count the same layers, but TAESD's decoder counts its clamp as layer 0.
    """
    half, _, rest = name.partition(".layers.")
    number, _, tail = rest.partition(".")
    if half not in ("encoder", "decoder") or not number.isdigit():
        return name
    return f"taesd_{half}.{int(number) + (half == 'decoder')}.{tail}"


def diffusers_vae_name(name: str) -> str:
    """The inverse of `taesd_name`, for error messages."""
    half, number, tail = name.removeprefix("taesd_").split(".", 2)
    return f"{half}.layers.{int(number) - (half == 'decoder')}.{tail}"


def require_fields(config: Mapping[str, Any], fields: Mapping[str, Any], source: str) -> None:
    """Raise an EasyRefError if a field has another value; an absent one counts as that value."""
    for key, value in fields.items():
        if (given := config.get(key, value)) != value:
            raise EasyRefError(
                f"{source}: config.json says {key} = {given!r}; ComfyUI supports {value!r} only."
            )


def read_config(directory: Path) -> dict[str, Any]:
    """Read `config.json`.

    Raises:
        EasyRefError: It is missing or not JSON.
    """
    path = Path(directory) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise EasyRefError(
            f"{escaped(str(path))} holds {kind_of(config)} instead of a model's configuration. Get "
            "it again."
        )
    return config


def read_weights(directory: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read the first of these safetensors files that the directory has.

    Raises:
        EasyRefError: It has none of them.
    """
    for name in names:
        path = Path(directory) / name
        if is_regular(path):
            return read_stored_weights(path)
    raise EasyRefError(f"No weights in {directory}: expected a file named {names[0]}.")


def weight_shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Shapes of a ComfyUI module's weights by name, including those that are not allocated yet."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is None:
            shapes[f"{name}.weight"] = torch.Size((layer.out_features, layer.in_features))
            if layer.comfy_need_lazy_init_bias:
                shapes[f"{name}.bias"] = torch.Size((layer.out_features,))
    return shapes


def require_fit(
    expected: Mapping[str, torch.Size],
    state: Mapping[str, torch.Tensor],
    source: str,
    original: Mapping[str, str] | None = None,
    unknown: Sequence[str] = (),
) -> None:
    """Check that a state dict has exactly a module's weights, in its shapes.

    ComfyUI compares no shapes where weights stay in their file until they are used.

    Args:
        expected: Shapes by ComfyUI's names.
        state: Weights by ComfyUI's names.
        source: Named in errors.
        original: ComfyUI's names to those in the file, for errors.
        unknown: Weights in the file that have no name in ComfyUI.

    Raises:
        EasyRefError: Names the first weights that are missing, unexpected or of another shape.
    """
    original = original or {}
    problems = []
    for title, names in (
        ("missing", [original.get(name, name) for name in expected if name not in state]),
        ("unexpected", [*unknown, *(original.get(n, n) for n in state if n not in expected)]),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{title}: {', '.join(names[:3])}{more}")
    if problems:
        raise EasyRefError(
            f"The weights in {source} do not fit its config.json. {'; '.join(problems)}."
        )
    for name, tensor in state.items():
        if tensor.shape != expected[name]:
            raise EasyRefError(
                f"The weights in {source} do not fit its config.json: "
                f"{original.get(name, name)} has shape {list(tensor.shape)}, but "
                f"{list(expected[name])} is needed."
            )
