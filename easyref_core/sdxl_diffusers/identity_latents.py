"""References as latents of a pipeline's VAE, and their noise at a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..adapter.identity import reference_noise, reference_size
from ..errors import EasyRefError
from ..pictures.loading import to_rgb
from ..untrusted import kind_of, whole_number
from .reference_pass import Source, UNetCall

_MAX_SIDE = 65_536
_SMALLEST_ALPHA = 2.0**-24  # diffusers' own, in schedules that end in pure noise


@dataclass(frozen=True, eq=False)
class IdentityLatents:
    """A group of references for identity.

    Attributes:
        latents: [C, h, w] each, scaled as the UNet's.
        seed: of their noise.
    """

    latents: tuple[torch.Tensor, ...]
    seed: int = 0


@torch.no_grad()
def encode_identity(
    pipe: Any,
    pictures: Sequence[Image.Image],
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
) -> IdentityLatents:
    """Encode references with a pipeline's VAE, each resized to about the area of the sample, in its
    own aspect ratio, and never cropped.

    Args:
        width, height: of the sample in pixels; the pipeline's own by default.
        seed: of the references' noise, 0 or more.

    Raises:
        EasyRefError: no pictures, or something else; numbers out of their range; latents that are
            not numbers.
    """
    usual = pipe.default_sample_size * pipe.vae_scale_factor
    width = whole_number(usual if width is None else width, "width", 1, _MAX_SIDE)
    height = whole_number(usual if height is None else height, "height", 1, _MAX_SIDE)
    seed = whole_number(seed, "seed", 0, 2**64 - 1)
    if not isinstance(pictures, Sequence) or not pictures:
        raise EasyRefError(
            f"The pictures are {kind_of(pictures)}, or none; a list of one or more is needed."
        )
    for picture in pictures:
        if not isinstance(picture, Image.Image):
            raise EasyRefError(
                f"The pictures hold {kind_of(picture)}; pictures are needed, which open_picture "
                "returns."
            )
    vae, dtype = pipe.vae, pipe.vae.dtype
    upcast = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
    if upcast:  # SDXL's VAE overflows in float16
        vae.to(torch.float32)
    try:
        latents = [
            _encoded(pipe, to_rgb(picture, f"Picture {number + 1}"), width * height)
            for number, picture in enumerate(pictures)
        ]
    finally:
        if upcast:
            vae.to(dtype)
    if not all(torch.isfinite(latent).all() for latent in latents):
        raise EasyRefError(
            f"The VAE's latents are not numbers (NaN or infinite) in {dtype}. Use a VAE in "
            "bfloat16 or float32; if it is, its file is damaged."
        )
    return IdentityLatents(tuple(latents), seed)


def _encoded(pipe: Any, picture: Image.Image, area: int) -> torch.Tensor:
    """[C, h, w] in float32 on the CPU."""
    vae = pipe.vae
    size = reference_size(*picture.size, area)
    resized = picture.resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None]  # [1, 3, H, W]
    pixels = (pixels.float() / 127.5 - 1).to(pipe._execution_device, vae.dtype)
    encoded = vae.encode(pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    latent = latents[0].float().cpu()
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is not None and std is not None:
        mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (mean, std))
        return (latent - mean) / std * vae.config.scaling_factor
    return latent * vae.config.scaling_factor


class NoisedLatents:
    """Groups of references at the noise levels of a schedule.

    Args:
        alphas_cumprod: of the noise schedule, [T].
    """

    def __init__(self, groups: Sequence[IdentityLatents], alphas_cumprod: torch.Tensor) -> None:
        self._groups = groups
        alphas = alphas_cumprod.detach().to("cpu", torch.float64).clamp(min=_SMALLEST_ALPHA)
        self._log_sigmas = 0.5 * ((1 - alphas) / alphas).log()  # [T]

    @property
    def timesteps(self) -> int:
        return len(self._log_sigmas)

    def check(self, sample: torch.Tensor) -> None:
        """Raise EasyRefError where latents have other channels than a UNet's sample."""
        channels = {len(latent) for group in self._groups for latent in group.latents}
        if channels != {sample.shape[1]}:
            found = ", ".join(map(str, sorted(channels)))
            raise EasyRefError(
                f"The UNet reads {sample.shape[1]} channels, but the references have {found}. "
                "Identity works with UNets that read latents alone; those for inpainting and "
                "editing read a picture beside them."
            )

    def at(self, source: Source, call: UNetCall) -> list[torch.Tensor]:
        """A source's references as the UNet gets them at its row's timestep, [C, h, w] each.

        Between two timesteps the logarithm of sigma is interpolated, as samplers do.
        """
        times = call.timestep.reshape(-1)
        time = times[0 if len(times) == 1 else source.row]
        dtype = torch.promote_types(call.sample.dtype, torch.float32)
        log_sigmas = self._log_sigmas.to(call.sample.device, dtype)
        place = time.to(log_sigmas).clamp(0, self.timesteps - 1)
        low = place.floor()
        pair = log_sigmas[low.long()], log_sigmas[place.ceil().long()]
        sigma = torch.lerp(*pair, place - low).exp()
        scale = (sigma.square() + 1).rsqrt()
        noised = []
        for number, latent in enumerate(self._groups[source.group].latents):
            noise = reference_noise(latent.shape, self._groups[source.group].seed, number)
            noised.append((latent.to(log_sigmas) + sigma * noise.to(log_sigmas)) * scale)
        return noised
