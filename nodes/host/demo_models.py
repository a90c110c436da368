"""Model directories in the diffusers layout, and the demo set made of them, as ComfyUI objects.

ComfyUI recognises only the sizes of released models. Here the size comes from the directory's
`config.json`: ComfyUI's own classes are built with it and filled strictly, so a directory that
does not fit fails with the name of the weight instead of running half empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...easyref_core.demo_set import picture_side, shipped_set
from ...easyref_core.errors import EasyRefError
from .diffusers_layout import (
    DIFFUSERS_FILES,
    TRANSFORMERS_FILES,
    comfy_unet_config,
    controlnet_names,
    diffusers_vae_name,
    read_config,
    read_weights,
    require_complete,
    require_fields,
    taesd_name,
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
    """The demo models, ready for ComfyUI's nodes.

    `control_net` is None where the set has no `controlnet/`; `side` is that of its square
    pictures, in pixels.
    """

    model: ModelPatcher
    clip: CLIP
    vae: VAE
    control_net: ControlNet | None
    directory: Path
    side: int

    @property
    def mllm_directory(self) -> Path:
        """The set's Qwen2-VL directory."""
        return self.directory / "mllm"

    @property
    def adapter_file(self) -> Path:
        """The set's EasyRef checkpoint."""
        return self.directory / "easyref.safetensors"


def load_demo_set() -> DemoSet:
    """Load every model of the demo set.

    Raises:
        EasyRefError: A file is missing or does not fit its configuration.
    """
    directory = shipped_set()
    control_net = directory / "controlnet"
    return DemoSet(
        model=load_unet_directory(directory / "unet"),
        clip=load_text_encoders(directory / "text_encoders"),
        vae=load_vae(directory / "vae"),
        control_net=load_controlnet(control_net) if control_net.is_dir() else None,
        directory=directory,
        side=picture_side(directory),
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
    # ComfyUI embeds sizes and crops as wide as SDXL does; smaller models may do otherwise.
    model.embedder = type(model.embedder)(config["addition_time_embed_dim"])
    patcher = new_patcher(model, device, offload_device, disable_dynamic)
    # How ComfyUI gets the same model anew: to compile it, for hooks, for another GPU.
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
            # It is published without this layer, and SDXL does not use its pooled state.
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
        **({"disable_dynamic": True} if disable_dynamic else {}),  # newer cores know it
    )
    clip.patcher.cached_patcher_init = (_text_encoders_patcher, (directory,))
    expected = _shapes(clip.cond_stage_model)
    # Every CLIP text model of ComfyUI has this number, and none of them uses it.
    expected = {n: shape for n, shape in expected.items() if not n.endswith(".logit_scale")}
    _require_fit(expected, state, str(directory))
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
    # ComfyUI hands a VAE latents divided by SDXL's factor; TAESD wants them as the UNet sees them.
    factor = comfy.latent_formats.SDXL().scale_factor / config.get("scaling_factor", 1.0)
    state["vae_scale"] = torch.tensor(factor)
    state["vae_shift"] = torch.tensor(float(config.get("shift_factor", 0.0)))

    expected = comfy.taesd.taesd.TAESD(latent_channels=4).state_dict()
    original = {new: diffusers_vae_name(new) for new in expected if new.startswith("taesd_")}
    original |= {new: old for old, new in names.items()}
    _require_fit({n: t.shape for n, t in expected.items()}, state, str(directory), original)
    vae = comfy.sd.VAE(sd=state)
    vae.throw_exception_if_invalid()
    vae.patcher.cached_patcher_init = (_vae_patcher, (directory,))
    return vae


def _vae_patcher(directory: Path, disable_dynamic: bool = False) -> ModelPatcher:
    """ComfyUI's own VAEs too are dynamic here; what it asks for is the model inside."""
    return load_vae(directory).patcher


def _read_text_encoder(directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    config = read_config(directory)
    absent = [key for key in _CLIP_FIELDS if key not in config]
    if absent:
        raise EasyRefError(f"config.json in {directory} lacks {absent[0]!r}.")
    if config["num_hidden_layers"] < 3:
        raise EasyRefError(
            f"{directory}: SDXL reads the second to last layer, for which ComfyUI needs three "
            f"layers or more; the model has {config['num_hidden_layers']}."
        )
    weights = read_weights(directory, TRANSFORMERS_FILES)
    # Older files store the numbers 0..76 as if they were a weight.
    weights.pop("text_model.embeddings.position_ids", None)
    return config, weights


def _fill(
    module: torch.nn.Module,
    state: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
    source: str,
    dtype: torch.dtype,
    as_read: bool = False,
) -> None:
    """Load diffusers weights into a ComfyUI module, all of them and nothing else.

    Args:
        names: Diffusers names to ComfyUI's; may list more than this module has.
        dtype: The module's.
        as_read: The tensors stay as they are in the file; ComfyUI converts them when it moves them.
    """
    original = {new: old for old, new in names.items() if not old.startswith("class_embedding.")}
    renamed = {names[name]: tensor for name, tensor in state.items() if name in names}
    unknown = [name for name in state if name not in names]
    _require_fit(_shapes(module), renamed, source, original, unknown)
    if not as_read:  # layers that newer cores fill when they load keep the dtype they are given
        renamed = {name: tensor.to(dtype) for name, tensor in renamed.items()}
    module.load_state_dict(renamed, **({"assign": True} if as_read else {}))


def _shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Shapes of a ComfyUI module's weights by name, those included that it has yet to be given."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.Linear) and layer.weight is None:
            shapes[f"{name}.weight"] = torch.Size((layer.out_features, layer.in_features))
            if layer.comfy_need_lazy_init_bias:
                shapes[f"{name}.bias"] = torch.Size((layer.out_features,))
    return shapes


def _require_fit(
    expected: Mapping[str, torch.Size],
    state: Mapping[str, torch.Tensor],
    source: str,
    original: Mapping[str, str] | None = None,
    unknown: Sequence[str] = (),
) -> None:
    """Raise an EasyRefError unless these are all weights of a module, and their shapes its own.

    ComfyUI compares no shapes where weights stay in their file until they are used.

    Args:
        original: ComfyUI's names to those of the file, for messages.
        unknown: Weights of the file that have no name in ComfyUI.
    """
    original = original or {}
    require_complete(
        source,
        [original.get(name, name) for name in expected if name not in state],
        [*unknown, *(original.get(name, name) for name in state if name not in expected)],
    )
    for name, tensor in state.items():
        if tensor.shape != expected[name]:
            raise EasyRefError(
                f"The weights in {source} do not fit its config.json: "
                f"{original.get(name, name)} has shape {list(tensor.shape)}, but "
                f"{list(expected[name])} is needed."
            )
