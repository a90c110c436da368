"""The SDXL that all methods generate with: checked at once, read when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch

from ...errors import EasyRefError
from ...out_of_memory import lack_of_memory
from ...training.base import Base, load_base, vae_class
from ...training.base_files import PARTS, check_base_files
from ...untrusted import escaped, one_line
from ..identity import file_identity, folder_identity
from .failures import concerns_all
from .settings import GenerationSettings
from .single_file import check_single_file, find_config, load_single_file

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
_MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
_OPTION = "base"
_FILES = ("*/*.safetensors", "*/*.bin", "*/*.json", "*/*.txt")


class GenerationPipeline:
    """diffusers' SDXL pipeline with a DDIM scheduler and the VAE in float32.

    Args:
        settings: its base is checked; nothing is fetched.

    Raises:
        EasyRefError: no SDXL, or a damaged one.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype = DTYPES[settings.dtype]
        self._single = not settings.base.is_dir()
        if self._single:
            check_single_file(settings.base)
        self._folder = find_config(settings.base_config) if self._single else settings.base
        self._configs = check_base_files(self._folder, _OPTION)
        vae_class(self._folder, self._configs)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What all images depend on; see `Method.identity`."""
        settings = self.settings
        patterns = _FILES[2:] if self._single else _FILES
        names = [f"{part}/{pattern.partition('/')[2]}" for part in PARTS for pattern in patterns]
        files = folder_identity(self._folder, names)
        if self._single:
            files["single_file"] = file_identity(settings.base)
        return {
            "base": files,
            "sampler": "DDIM",
            "size": settings.size,
            "negative": settings.negative,
            "dtype": settings.dtype,
        }

    @cached_property
    def unet_layout(self) -> Any:
        """The UNet without weights, on the meta device, to check adapters against.

        Raises:
            EasyRefError: its configuration describes none.
        """
        from diffusers import UNet2DConditionModel

        try:
            with torch.device("meta"):
                return UNet2DConditionModel.from_config(self._configs["unet"])
        except Exception as error:  # odd configurations raise anything
            raise EasyRefError(
                f"The UNet's config.json in {escaped(str(self._folder))} cannot be used "
                f"({type(error).__name__}: {one_line(error)}). Get it again."
            ) from error

    @cached_property
    def cross_attention(self) -> Mapping[str, tuple[int, int]]:
        """Cross-attention layers -> (query width, context width)."""
        from ...sdxl_diffusers.adapter import cross_attention_layers

        return cross_attention_layers(self.unet_layout)

    @cached_property
    def pipe(self) -> Any:
        """The StableDiffusionXLPipeline, on the device, frozen.

        Raises:
            EasyRefError: its files cannot be loaded, or do not fit into memory.
        """
        with concerns_all(escaped(str(self.settings.base))):
            pipe = self._loaded_file() if self._single else self._loaded_folder()
            for name in _MODULES:
                # SDXL's VAE overflows in float16.
                dtype = torch.float32 if name == "vae" else self.dtype
                module = getattr(pipe, name).to(self.device)
                if module.dtype != dtype:
                    module.to(dtype)
                module.requires_grad_(False).eval()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def training_base(self) -> Base:
        """The same parts, with the noise schedule of training."""
        from diffusers import DDPMScheduler

        pipe = self.pipe
        return Base(
            pipe.unet,
            pipe.vae,
            (pipe.tokenizer, pipe.tokenizer_2),
            (pipe.text_encoder, pipe.text_encoder_2),
            DDPMScheduler.from_config(pipe.scheduler.config),
        )

    def wait(self) -> None:
        """Until the device has computed what it was given, before time is taken."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_cache(self) -> None:
        """Give memory that tensors no longer use back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _loaded_folder(self) -> Any:
        from diffusers import StableDiffusionXLPipeline

        base = load_base(self._folder, _OPTION, self.dtype)
        return StableDiffusionXLPipeline(
            vae=base.vae,
            text_encoder=base.text_encoders[0],
            text_encoder_2=base.text_encoders[1],
            tokenizer=base.tokenizers[0],
            tokenizer_2=base.tokenizers[1],
            unet=base.unet,
            scheduler=_ddim(base.scheduler.config),
            add_watermarker=False,
        )

    def _loaded_file(self) -> Any:
        path = self.settings.base
        try:
            pipe = load_single_file(path, self._folder, self.dtype)
            for name in _MODULES:
                getattr(pipe, name).to("cpu")  # fails where weights are missing
        except Exception as error:  # files of another architecture raise anything
            if lack_of_memory(error) is not None:
                raise
            raise EasyRefError(
                f"{escaped(str(path))} does not fit the configurations in "
                f"{escaped(str(self._folder))} ({type(error).__name__}: {one_line(error)}). Name "
                "those of the model it was made from."
            ) from error
        pipe.scheduler = _ddim(pipe.scheduler.config)
        return pipe


def _ddim(config: Any) -> Any:
    """DDIM on a model's own noise schedule. Clipping is for models of pixels, not of latents, but
    diffusers' default."""
    from diffusers import DDIMScheduler

    plain = {"clip_sample": False, "thresholding": False, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(config, **plain)
