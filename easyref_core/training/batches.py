"""Batches for the UNet: latents, noise and text states of samples."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import sweep, write_atomically
from ..sdxl_diffusers.identity_latents import IdentityLatents
from ..sdxl_diffusers.identity_run import IdentityRun
from .base import Base
from .config import Settings
from .disk import writing
from .model import Batch
from .samples import Sample, noise_generator, noise_seed
from .schedule import loss_weights, spread_timesteps

_CHECKSUM = "checksum"  # in the metadata of cached files


@dataclass(frozen=True)
class TensorCache:
    """Tensors on disk, by what they were computed from.

    Attributes:
        folder: None caches nothing.
        base: `base.fingerprint` of the models that compute them; part of every key.
    """

    folder: str | Path | None
    base: str

    def get(
        self, key: str, compute: Callable[[], dict[str, torch.Tensor]]
    ) -> dict[str, torch.Tensor]:
        """What `compute` returns, or has returned before for this key."""
        if self.folder is None:
            return compute()
        from safetensors.torch import save

        # File names need not be Unicode; Python keeps such bytes as surrogates.
        whole_key = f"{self.base} {key}".encode(errors="surrogateescape")
        name = hashlib.sha256(whole_key).hexdigest()
        path = Path(self.folder) / name[:2] / f"{name}.safetensors"
        stored = _read(path)
        if stored is not None:
            return stored
        tensors = compute()
        stored = {n: t.contiguous().cpu() for n, t in tensors.items()}
        content = save(stored, {_CHECKSUM: _checksum(stored)})
        with writing(path):
            write_atomically(path, lambda file: file.write_bytes(content))
        return tensors

    def sweep(self) -> None:
        """Remove what killed runs have left half written."""
        if self.folder is not None and Path(self.folder).is_dir():
            for folder in Path(self.folder).iterdir():
                sweep(folder)


def _read(path: Path) -> dict[str, torch.Tensor] | None:
    """Tensors of the cache; None where there are none, or they are damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            # Copies, as the file may be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            checksum = (file.metadata() or {}).get(_CHECKSUM)
    except (OSError, SafetensorError):
        return None
    return tensors if checksum == _checksum(tensors) else None


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Batches:
    """Makes a model's batches of samples.

    Attributes:
        base: on `device`.
        dtype: that the UNet computes in.
    """

    base: Base
    cache: TensorCache
    settings: Settings
    device: torch.device
    dtype: torch.dtype

    @torch.no_grad()
    def make(self, samples: Sequence[Sample]) -> Batch:
        """A batch of samples with targets of one size."""
        device, scheduler = self.device, self.base.scheduler
        optimiser, timestep_count = self.settings.optimiser, scheduler.config.num_train_timesteps
        levels = optimiser.noise_levels
        latents, noises, steps, texts, pooled = [], [], [], [], []
        for sample in samples:
            generator = noise_generator(self.settings.seed, sample.position)
            latent = self._latent(sample).to(device).expand(levels, -1, -1, -1)
            latents.append(latent)
            noises.append(torch.randn(latent.shape, generator=generator).to(device))
            steps.append(spread_timesteps(timestep_count, levels, generator))
            text = self._text(sample.text)
            texts.append(text["states"].to(device))
            pooled.append(text["pooled"].to(device))
        noise, timesteps = torch.cat(noises), torch.cat(steps).to(device)
        noisy = scheduler.add_noise(torch.cat(latents), noise, timesteps)
        weights = loss_weights(
            scheduler.alphas_cumprod, timesteps, optimiser.loss_weighting, optimiser.snr_gamma
        )
        kept = torch.tensor([not sample.without_tokens for sample in samples], device=device)
        return Batch(
            noisy.to(self.dtype),
            noise,
            timesteps,
            weights.to(device),
            torch.stack(texts).to(self.dtype),
            torch.stack(pooled).to(self.dtype),
            torch.tensor([s.time_ids for s in samples], device=device, dtype=self.dtype),
            [s.references for s in samples],
            [s.text for s in samples],
            kept.to(self.dtype),
            self._identity(samples),
        )

    def _latent(self, sample: Sample) -> torch.Tensor:
        """[C, h, w]"""
        seed, shape = self.settings.seed, tuple(sample.target.shape)
        key = f"latent {seed} {sample.source} {shape} {sample.time_ids}"
        number = sample.position
        if self.settings.data.cache:  # independent of which sample needs the latent first
            number = zlib.crc32(key.encode(errors="surrogateescape"))
        generator = noise_generator(seed + 1, number)
        return self.cache.get(
            key, lambda: {"latent": self.base.encode_image(sample.target, generator)}
        )["latent"]

    def _identity(self, samples: Sequence[Sample]) -> IdentityRun | None:
        """What the samples' self-attention attends to; None where no sample has references.

        Each sample has noise of its own, the same for its references at all of its noise levels, as
        a run of sampling has: with one noise for all the LoRA would learn that noise.
        """
        if not any(sample.identity for sample in samples):
            return None
        groups = [
            IdentityLatents(
                tuple(self._reference_latent(pixels, sample) for pixels in sample.identity),
                noise_seed(self.settings.seed, sample.position),
            )
            for sample in samples
        ]
        return IdentityRun(groups, self.base.scheduler.alphas_cumprod)

    def _reference_latent(self, pixels: torch.Tensor, sample: Sample) -> torch.Tensor:
        """[C, h, w]; the mean of the VAE's distribution, as in use."""

        def encode() -> dict[str, torch.Tensor]:
            return {"latent": self.base.encode_image(pixels)}

        if not sample.keeps_identity:
            return encode()["latent"]
        content = hashlib.sha256(pixels.numpy().tobytes()).hexdigest()
        return self.cache.get(f"reference {tuple(pixels.shape)} {content}", encode)["latent"]

    def _text(self, text: str) -> dict[str, torch.Tensor]:
        """states [77, W], pooled [P]"""

        def encode() -> dict[str, torch.Tensor]:
            states, pooled = self.base.encode_text([text])
            return {"states": states[0], "pooled": pooled[0]}

        return self.cache.get(f"text {self.dtype} {text}", encode)
