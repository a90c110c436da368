"""Loads model directories in the diffusers layout, and the demo set, as ComfyUI objects.

ComfyUI detects only the sizes of released models. Here the sizes come from `config.json`: ComfyUI's
own classes are built with them and loaded strictly, so an error names the weight that does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...easyref_core.demo_set import reference_files, shipped_set
from ...easyref_core.errors import EasyRefError
from ...easyref_core.pictures.loading import open_picture
from ...easyref_core.untrusted import whole_number
from .diffusers_layout import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    comfy_unet_config,
    controlnet_names,
    diffusers_vae_name,
    read_config,
    read_weights,
    require_fields,
    require_fit,
    taesd_name,
    weight_shapes,
)
from .patcher import is_dynamic, new_patcher

if TYPE_CHECKING:
    from comfy.controlnet import ControlNet
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

_CONTROLNET_FIELDS: dict[str, Any] = {
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "controlnet_conditioning_channel_order": "rgb",
}
_CLIP_FIELDS = (
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
)


@dataclass(frozen=True)
class DemoSet:
    """The demo models and their reference pictures, as ComfyUI's nodes use them.

    Attributes:
        images: [B, H, W, 3] between 0 and 1.
        directory: The set's files.
    """

    model: ModelPatcher
    clip: CLIP
    vae: VAE
    control_net: ControlNet
    images: torch.Tensor
    directory: Path

    @property
    def mllm_directory(self) -> Path:
        """The set's Qwen2-VL directory."""
        return self.directory / "mllm"

    @property
    def adapter_file(self) -> Path:
        """The set's EasyRef checkpoint."""
        return self.directory / "easyref.safetensors"


def load_demo_set() -> DemoSet:
    """Load the demo set that is shipped.

    Raises:
        EasyRefError: A file is missing or does not fit its configuration.
    """
    directory = shipped_set()
    pictures = [np.asarray(open_picture(file), dtype=np.float32) for file in reference_files()]
    return DemoSet(
        model=load_unet_directory(directory / "unet"),
        clip=load_text_encoders(directory / "text_encoders"),
        vae=load_vae(directory / "vae"),
        control_net=load_controlnet(directory / "controlnet"),
        images=torch.from_numpy(np.stack(pictures) / 255),
        directory=directory,
    )


def load_unet_directory(
    directory: Path, dtype: torch.dtype | None = None, disable_dynamic: bool = False
) -> ModelPatcher:
    """Load a diffusers UNet of SDXL's kind and any size as a ComfyUI MODEL.

    Args:
        directory: Holds `config.json` and `diffusion_pytorch_model.safetensors`.
        dtype: Weight dtype; None leaves the choice to ComfyUI.
        disable_dynamic: See `new_patcher`.

    Returns:
        The patcher, with an epsilon-prediction `comfy.model_base.SDXL` inside.

    Raises:
        EasyRefError: A file, a weight or a configuration field is missing or does not fit.
    """
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    config = read_config(directory)
    shape = comfy_unet_config(config, str(directory))
    state = read_weights(directory, DIFFUSERS_FILES)
    model_config = comfy.supported_models.SDXL(shape)
    # The constructor writes the head width of the released models over ours.
    model_config.unet_config["num_head_channels"] = shape["num_head_channels"]
    supported = list(model_config.supported_inference_dtypes)
    if dtype is None:
        dtype = management.unet_dtype(
            model_params=comfy.utils.calculate_parameters(state),
            supported_dtypes=supported,
            weight_dtype=comfy.utils.weight_dtype(state),
        )
    device = management.get_torch_device()
    model_config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))

    offload_device = management.unet_offload_device()
    model = model_config.get_model(state, "").to(offload_device).eval()
    # ComfyUI embeds sizes and crops as wide as SDXL does; smaller models may differ.
    model.embedder = type(model.embedder)(config["addition_time_embed_dim"])
    patcher = new_patcher(model, device, offload_device, disable_dynamic)
    # ComfyUI reloads the model with this: to compile it, for hooks, for another GPU.
    patcher.cached_patcher_init = (load_unet_directory, (directory, dtype))
    names = comfy.utils.unet_to_diffusers(shape)
    _fill(model.diffusion_model, state, names, str(directory), dtype, is_dynamic(patcher))
    return patcher


def load_controlnet(directory: Path, dtype: torch.dtype | None = None) -> ControlNet:
    """Load a diffusers ControlNet of SDXL's kind and any size as a ComfyUI CONTROL_NET.

    Args:
        directory: Holds `config.json` and `diffusion_pytorch_model.safetensors`.
        dtype: Weight dtype; None leaves the choice to ComfyUI.

    Raises:
        EasyRefError: A file, a weight or a configuration field is missing or does not fit.
    """
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management as management
    import comfy.ops
    import comfy.utils

    config = read_config(directory)
    require_fields(config, _CONTROLNET_FIELDS, str(directory))
    shape = comfy_unet_config(config, str(directory))
    state = read_weights(directory, DIFFUSERS_FILES)
    if dtype is None:
        # No parameter count: ComfyUI too treats a ControlNet as large here.
        dtype = management.unet_dtype(model_params=-1, weight_dtype=comfy.utils.weight_dtype(state))
    device = management.get_torch_device()
    manual_cast = management.unet_manual_cast(dtype, device)
    network = comfy.cldm.cldm.ControlNet(
        **{key: value for key, value in shape.items() if key != "out_channels"},
        hint_channels=config.get("conditioning_channels", 3),
        dtype=dtype,
        device=management.unet_offload_device(),
        operations=comfy.ops.pick_operations(dtype, manual_cast),
    ).eval()
    names = {**comfy.utils.unet_to_diffusers(shape), **controlnet_names(shape)}
    _fill(network, state, names, str(directory), dtype)
    return comfy.controlnet.ControlNet(network, load_device=device, manual_cast_dtype=manual_cast)


def load_text_encoders(directory: Path, disable_dynamic: bool = False) -> CLIP:
    """Load SDXL's two text encoders, of any width, as a ComfyUI CLIP.

    Args:
        directory: Holds `clip_l/` and `clip_g/`, CLIP text models as transformers saves them.
        disable_dynamic: See `new_patcher`.

    Raises:
        EasyRefError: A file or a weight is missing or does not fit, or a model is too shallow.
    """
    import comfy.sd
    import comfy.sdxl_clip
    import comfy.supported_models_base
    import comfy.utils
    import folder_paths

    options: dict[str, Any] = {}
    state: dict[str, torch.Tensor] = {}
    for slot in ("clip_l", "clip_g"):
        config, weights = _read_text_encoder(directory / slot)
        if slot == "clip_l":
            # Published without this layer; SDXL does not use its pooled output.
            weights.setdefault("text_projection.weight", torch.eye(config["hidden_size"]))
        options[f"{slot}_model_config"] = {key: config[key] for key in _CLIP_FIELDS}
        state.update({f"{slot}.transformer.{name}": t for name, t in weights.items()})
    target = comfy.supported_models_base.ClipTarget(
        comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(state),
        model_options=options,
        **({"disable_dynamic": True} if disable_dynamic else {}),  # older cores lack it
    )
    clip.patcher.cached_patcher_init = (_text_encoders_patcher, (directory,))
    expected = weight_shapes(clip.cond_stage_model)
    # ComfyUI's CLIP text models have this weight and do not use it.
    expected = {n: shape for n, shape in expected.items() if not n.endswith(".logit_scale")}
    require_fit(expected, state, str(directory))
    clip.load_sd(state, full_model=True)
    return clip


def _text_encoders_patcher(directory: Path, disable_dynamic: bool = False) -> ModelPatcher:
    return load_text_encoders(directory, disable_dynamic).patcher


def load_vae(directory: Path) -> VAE:
    """Load a diffusers `AutoencoderTiny` of TAESD's shape as a ComfyUI VAE for SDXL.

    Args:
        directory: Holds `config.json` and `diffusion_pytorch_model.safetensors`.

    Raises:
        EasyRefError: A file or a weight is missing, or the shape is not TAESD's.
    """
    import comfy.latent_formats
    import comfy.sd
    import comfy.taesd.taesd

    config = read_config(directory)
    require_fields(config, {"_class_name": "AutoencoderTiny", "latent_channels": 4}, str(directory))
    diffusers_state = read_weights(directory, DIFFUSERS_FILES)
    names = {name: taesd_name(name) for name in diffusers_state}
    state = {names[name]: tensor for name, tensor in diffusers_state.items()}
    # ComfyUI decodes latents divided by SDXL's scale factor; TAESD expects the UNet's latents.
    factor = comfy.latent_formats.SDXL().scale_factor / config.get("scaling_factor", 1.0)
    state["vae_scale"] = torch.tensor(factor)
    state["vae_shift"] = torch.tensor(float(config.get("shift_factor", 0.0)))

    expected = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    original = {new: diffusers_vae_name(new) for new in expected if new.startswith("taesd_")}
    original |= {new: old for old, new in names.items()}
    require_fit({n: t.shape for n, t in expected.items()}, state, str(directory), original)
    vae = comfy.sd.VAE(sd=state)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (_vae_patcher, (directory,))
    return vae


def _vae_patcher(directory: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """`disable_dynamic` is ignored, as ComfyUI's own VAE loader does."""
    return load_vae(directory).patcher


def _read_text_encoder(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = read_config(directory)
    absent = [key for key in _CLIP_FIELDS if key not in config]
    if absent:
        raise EasyRefError(f"config.json in {directory} lacks {absent[0]!r}.")
    layers = whole_number(config["num_hidden_layers"], f"num_hidden_layers in {directory}", 1, 100)
    if layers < 3:
        raise EasyRefError(
            f"{directory}: SDXL uses the second to last layer, for which ComfyUI needs three "
            f"layers or more; the model has {layers}."
        )
    weights = read_weights(directory, TRANSFORMERS_FILES)
    # Older files store the position ids 0..76 as a weight.
    weights.pop("text_model.embeddings.position_ids", None)
    return config, weights


def _fill(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    source: str,
    dtype: torch.dtype,
    assign: bool = False,
) -> None:
    """Load diffusers weights into a ComfyUI module, all of them and nothing else.

    Args:
        names: Diffusers names to ComfyUI's; may list more than this module has.
        dtype: The module's.
        assign: Keep the file's tensors and their dtype; ComfyUI converts them when it loads them.
    """
    original = {new: old for old, new in names.items() if not old.startswith("class_embedding.")}
    renamed = {names[name]: tensor for name, tensor in state.items() if name in names}
    unknown = [name for name in state if name not in names]
    require_fit(weight_shapes(module), renamed, source, original, unknown)
    if not assign:  # layers that newer cores allocate on loading keep the dtype they are given
        renamed = {name: tensor.to(dtype) for name, tensor in renamed.items()}
    module.load_state_dict(renamed, **({"assign": True} if assign else {}))
