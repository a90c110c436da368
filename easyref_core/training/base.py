"""The frozen base: SDXL's UNet, VAE, text encoders and noise schedule, in the diffusers layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EasyRefError
from ..out_of_memory import lack_of_memory
from ..pictures.loading import named
from ..untrusted import escaped, one_line, shown, whole_number
from .base_files import VAES, check_base_files, has_half_only

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DConditionModel

# With this set, older transformers read weights in the first process only and leave the others'
# empty for FSDP to fill; but FSDP does not wrap the text encoders.
_READ_IN_FIRST_ONLY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_OFFLINE = {"local_files_only": True}
# What a CLIP may hold beside its text model.
_BESIDE = ("text_projection.", "visual_projection.", "vision_model.", "logit_scale")


@dataclass
class Base:
    """The base model's parts, frozen; gradients pass through the UNet only."""

    unet: UNet2DConditionModel
    vae: Any
    tokenizers: Sequence[Any]
    text_encoders: Sequence[Any]
    scheduler: DDPMScheduler

    def to(self, device: torch.device, dtype: torch.dtype) -> Base:
        """Move all but the UNet; the VAE stays in float32, as SDXL's overflows in float16."""
        self.vae.to(device)
        for encoder in self.text_encoders:
            encoder.to(device, dtype)
        return self

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text states [B, 77, W] and pooled text [B, P]."""
        states: list[torch.Tensor] = []
        pooled = torch.empty(0)
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenizer(
                list(texts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = encoder(ids.to(encoder.device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
            pooled = out[0]
        return torch.cat(states, dim=-1), pooled

    @torch.no_grad()
    def encode_image(
        self, pixels: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Scaled latents [C, h, w] of one image [3, H, W] in -1..1.

        Args:
            generator: samples the latents' distribution; None for its mean.
        """
        out = self.vae.encode(pixels[None].to(self.vae.device, torch.float32))
        if hasattr(out, "latent_dist"):
            mean, std = out.latent_dist.mean, out.latent_dist.std
            latents = mean
            if generator is not None:
                latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        else:  # AutoencoderTiny has no distribution
            latents = out.latents
        return latents[0] * self.vae.config.scaling_factor


def load_base(
    folder: str | Path, option: str = "model.base", dtype: torch.dtype = torch.float32
) -> Base:
    """Load the base model, frozen.

    Args:
        option: that names the folder, for messages.
        dtype: of the UNet.

    Raises:
        EasyRefError: a part is missing (named) or cannot be loaded.
    """
    folder = Path(folder)
    configs = check_base_files(folder, option)
    with named(option):
        return _load_parts(folder, configs, dtype)


def _load_parts(folder: Path, configs: Mapping[str, Any], dtype: torch.dtype) -> Base:
    kind = vae_class(folder, configs)
    import diffusers
    import transformers

    kinds = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": getattr(diffusers, kind),
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    try:
        with _read_everywhere():
            modules = {
                name: load_part(kinds[name], folder / name, dtype if name == "unet" else None)
                for name in kinds
            }
            base = Base(
                unet=modules["unet"],
                vae=modules["vae"],
                tokenizers=[
                    transformers.CLIPTokenizer.from_pretrained(
                        str(folder / name), trust_remote_code=False, **_OFFLINE
                    )
                    for name in ("tokenizer", "tokenizer_2")
                ],
                text_encoders=[modules["text_encoder"], modules["text_encoder_2"]],
                scheduler=diffusers.DDPMScheduler.from_pretrained(folder / "scheduler", **_OFFLINE),
            )
    except EasyRefError:
        raise
    except Exception as error:  # damaged files and odd configurations raise anything
        if lack_of_memory(error) is not None:
            raise
        raise EasyRefError(
            f"{escaped(str(folder))} cannot be loaded ({type(error).__name__}: "
            f"{one_line(error)}). Get it again."
        ) from error
    _check_fit(base, folder)
    for module in modules.values():
        module.requires_grad_(False).eval()
    return base


def vae_class(folder: Path, configs: Mapping[str, Any]) -> str:
    """The class of the VAE.

    Raises:
        EasyRefError: another one than SDXL's.
    """
    kind = configs["vae"].get("_class_name")
    if kind not in VAES:
        raise EasyRefError(
            f"The VAE in {escaped(str(folder))} is of class {shown(kind)}; {' and '.join(VAES)} "
            "can be used. Get it again."
        )
    return kind


def load_part(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A module with its weights.

    Args:
        kind: a model's class, of diffusers or transformers.
        dtype: None for the library's choice.

    Raises:
        EasyRefError: the weights do not fit its configuration.
    """
    options: dict[str, Any] = {"variant": "fp16"} if has_half_only(folder) else {}
    if kind.__module__.startswith("transformers"):
        options["trust_remote_code"] = False
    if dtype is not None:
        options["torch_dtype"] = dtype
    module, info = kind.from_pretrained(folder, output_loading_info=True, **options, **_OFFLINE)
    unused = [
        name
        for name in info["unexpected_keys"]
        if not name.startswith(_BESIDE) and not name.endswith("position_ids")
    ]
    for problem, names in (
        ("lack", info["missing_keys"]),
        ("have in another shape", [str(name) for name in info["mismatched_keys"]]),
        ("hold beside it", unused),
    ):
        if names:
            raise EasyRefError(
                f"The weights in {escaped(str(folder))} do not fit its config.json: "
                f"they {problem} {escaped(', '.join(sorted(names)[:3]))}. Get it again."
            )
    return module


def _check_fit(base: Base, folder: Path) -> None:
    """
    Raises:
        EasyRefError: parts that do not fit together, which training would notice in a step only.
    """
    unet, encoders = base.unet.config, [encoder.config for encoder in base.text_encoders]
    width = sum(encoder.hidden_size for encoder in encoders)
    pooled = encoders[1].projection_dim + 6 * (unet.addition_time_embed_dim or 0)
    channels = base.vae.config.latent_channels
    for name, has, needs in (
        ("the text encoders' widths together", width, "cross_attention_dim"),
        ("pooled text and sizes together", pooled, "projection_class_embeddings_input_dim"),
        ("the VAE's channels", channels, "in_channels"),
    ):
        if has != unet[needs]:
            raise EasyRefError(
                f"The parts in {escaped(str(folder))} do not fit together: {name} are "
                f"{has}, the UNet's {needs} is {shown(unet[needs])}. Name a whole SDXL model."
            )
    hint = f"Check {escaped(str(folder))}; it must be a whole SDXL model."
    for tokenizer, encoder in zip(base.tokenizers, encoders, strict=True):
        longest, known = encoder.max_position_embeddings, encoder.vocab_size
        whole_number(tokenizer.model_max_length, "A tokenizer's model_max_length", 2, longest, hint)
        whole_number(len(tokenizer), "The size of a tokenizer's vocabulary", 1, known, hint)
    steps = base.scheduler.config.num_train_timesteps
    whole_number(steps, "The scheduler's num_train_timesteps", 1, 100_000, hint)


@contextmanager
def _read_everywhere() -> Iterator[None]:
    """Let all processes read the weights, whatever accelerate is configured to do."""
    configured = os.environ.pop(_READ_IN_FIRST_ONLY, None)
    try:
        yield
    finally:
        if configured is not None:
            os.environ[_READ_IN_FIRST_ONLY] = configured


def fingerprint(folder: str | Path) -> str:
    """Text that differs between base models: the path, and each weight file's size and time."""
    folder = Path(folder).resolve()
    files = sorted(folder.glob("*/*.safetensors")) + sorted(folder.glob("*/*.bin"))
    stats = [(file.relative_to(folder).as_posix(), file.stat()) for file in files]
    return f"{folder} {[(name, s.st_size, s.st_mtime_ns) for name, s in stats]}"
