"""A demo model set in memory, which samples batches of images.

Everything is deterministic, and each image's noise depends on its own seed alone, so an image does
not depend on the batch it is sampled in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import SafetensorError

from easyref_core.demo_set import SET_FILE, read_set_info
from easyref_core.errors import EasyRefError
from easyref_core.sdxl_diffusers.adapter import set_scale
from easyref_core.sdxl_diffusers.identity_latents import IdentityLatents, encode_identity
from easyref_core.sdxl_diffusers.identity_run import IdentityRun
from easyref_core.tokens.reference_tokens import ReferenceTokens

from .adapter import AppliedIdentity, AppliedReferences, DemoAdapter, load_adapter
from .pretraining.base import NOISE
from .pretraining.controlnet import control_residuals
from .rows import SamplingSettings
from .stored_text import load_text, text_with_weights
from .stored_weights import load_stored

_BATCH = 32  # images sampled at once


class DemoModels:
    """UNet, autoencoder, text encoders and, where the set has one, ControlNet.

    Args:
        directory: of the set, see `easyref_core.demo_set`.
        half: sample in bfloat16; by default where that is faster than float32.

    Raises:
        EasyRefError: not a model set, or a part that cannot be loaded (named).
    """

    def __init__(
        self, directory: Path, device: torch.device | str = "cpu", half: bool | None = None
    ) -> None:
        self.directory = Path(directory)
        self.device = torch.device(device)
        self.info = _read_info(self.directory)
        self._half = has_quick_bfloat16(self.device) if half is None else half
        self._text = self._named("text_encoders", load_text)
        self._text.to(self.device)
        self._unet = self._load(UNet2DConditionModel, "unet")
        self._vae = self._load(AutoencoderTiny, "vae")
        has_control = (self.directory / "controlnet").is_dir()
        self._control = self._load(ControlNetModel, "controlnet") if has_control else None

    def use_base(
        self, unet: Mapping[str, torch.Tensor], text: Mapping[str, Mapping[str, torch.Tensor]]
    ) -> None:
        """Replace the weights of the UNet and the text encoders.

        Args:
            text: {"clip_l": ..., "clip_g": ...}, see `TextEncoders.weights`.

        Raises:
            RuntimeError: they do not fit.
        """
        self._unet.load_state_dict(unet)
        directory = self.directory / "text_encoders"
        self._text = text_with_weights(self._text.tokenizers, directory, text)
        self._text.to(self.device)

    @property
    def has_controlnet(self) -> bool:
        return self._control is not None

    @property
    def precision(self) -> str:
        """The dtype of sampling."""
        return "bfloat16" if self._half else "float32"

    def adapter(
        self, path: Path | None = None, mllm: Path | None = None, int8: bool = False
    ) -> DemoAdapter:
        """Load an adapter file for this set; its own `easyref.safetensors` by default.

        Args:
            mllm: Qwen2-VL directory; the set's by default, whose weights the set's own adapter
                carries.
            int8: round the MLLM's weights.

        Raises:
            EasyRefError: missing, damaged, or made for other models.
        """
        path = path or self.directory / "easyref.safetensors"
        mllm = mllm or self.directory / "mllm"
        return load_adapter(path, mllm, self._load(UNet2DConditionModel, "unet"), int8)

    def identity_latents(
        self, groups: Sequence[Sequence[Image.Image]], side: int
    ) -> list[IdentityLatents]:
        """Latents of groups of references, for images of `side` pixels."""
        pipe = SimpleNamespace(
            vae=self._vae,
            default_sample_size=side // 8,
            vae_scale_factor=8,
            _execution_device=self.device,
        )
        return [encode_identity(pipe, group) for group in groups]

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        references: AppliedReferences | None = None,
        outlines: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Images [B, 3, side, side], uint8 on the CPU, decoded from `sample_latents`."""
        latents = self.sample_latents(prompts, seeds, settings, references, outlines)
        scaled = latents / self._vae.config.scaling_factor
        with torch.inference_mode(), self._precision():
            return torch.cat([_levels(self._vae.decode(s).sample) for s in scaled.split(_BATCH)])

    def sample_latents(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        references: AppliedReferences | None = None,
        outlines: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Latents [B, 4, side / 8, side / 8], float32: those of ComfyUI's KSampler with the sampler
        `ddim` and the scheduler `ddim_uniform`, where `steps` divides 1000.

        Args:
            prompts, seeds: one per image.
            settings: its seed is not used.
            references: None samples with the plain UNet, without the adapter's LoRA, too.
            outlines: [B, 3, side, side] uint8 for the ControlNet.

        Raises:
            EasyRefError: outlines without a ControlNet, or counts that do not agree.
        """
        count = len(prompts)
        if outlines is not None and self._control is None:
            raise EasyRefError(f"The model set {self.directory} has no ControlNet.")
        given = {"seeds": len(seeds)} | ({} if outlines is None else {"outlines": len(outlines)})
        if references is not None and references.tokens.batch > 1:
            given["rows of tokens"] = references.tokens.batch
        if references is not None and references.identity is not None:
            given["groups of latents"] = len(references.identity.latents)
        for name, number in given.items():
            if number != count:
                raise EasyRefError(f"There are {count} prompts but {number} {name}.")
        batches = []
        for start in range(0, count, _BATCH):
            part = slice(start, start + _BATCH)
            tokens = references and _guidance_rows(references.tokens, part, len(prompts[part]))
            reading = references and _identity_run(references.identity, part)
            hint = None if outlines is None else outlines[part]
            batches.append(
                self._denoise(
                    prompts[part], seeds[part], settings, references, tokens, hint, reading
                )
            )
        return torch.cat(batches)

    def reconstruct(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode and decode images [B, 3, S, S], uint8: the best that sampling could reach."""
        batches = []
        for part in pixels.split(_BATCH):
            with torch.inference_mode(), self._precision():
                levels = part.to(self.device).float() / 127.5 - 1
                batches.append(_levels(self._vae.decode(self._vae.encode(levels).latents).sample))
        return torch.cat(batches)

    def _denoise(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings,
        references: AppliedReferences | None,
        tokens: torch.Tensor | None,
        outlines: torch.Tensor | None,
        reading: IdentityRun | None,
    ) -> torch.Tensor:
        """One batch; of the doubled rows the negative ones come first."""
        count, side = len(prompts), settings.side
        scheduler = DDIMScheduler(**NOISE, set_alpha_to_one=True)
        scheduler.set_timesteps(settings.steps)
        noise = _noise(seeds, side).to(self.device)
        latents = scheduler.add_noise(torch.zeros_like(noise), noise, scheduler.timesteps[:1])
        with torch.inference_mode(), self._precision():
            text, pooled = self._encode_text([settings.negative] * count + list(prompts))
            sizes = torch.tensor([[side, side, 0, 0, side, side]] * 2 * count).float()
            added = {"text_embeds": pooled, "time_ids": sizes.to(self.device)}
            unet, context = self._unet, text
            if references is not None and tokens is not None:
                unet = references.adapter.unet
                set_scale(unet, references.weight)
                context = torch.cat((text, tokens.to(text)), dim=1)
            add = self._residuals(text, added, outlines, settings.control_strength)
            options: dict[str, Any] = {"added_cond_kwargs": added}
            if reading is not None:
                options["cross_attention_kwargs"] = {"identity": reading}
            for step in scheduler.timesteps:
                both = scheduler.scale_model_input(latents.repeat(2, 1, 1, 1), step)
                predicted = unet(both, step, context, **options, **add(both, step))
                negative, conditional = predicted.sample.float().chunk(2)
                guided = negative + settings.cfg * (conditional - negative)
                latents = scheduler.step(guided, step, latents).prev_sample
            return latents

    def _residuals(
        self,
        text: torch.Tensor,
        added: dict[str, torch.Tensor],
        outlines: torch.Tensor | None,
        strength: float,
    ) -> Callable[[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """(noisy latents, timestep) -> the ControlNet's residuals; it attends to text only."""
        control = self._control
        if outlines is None or control is None:
            return lambda noisy, step: {}
        hint = (outlines.to(self.device).float() / 255).repeat(2, 1, 1, 1)
        return lambda noisy, step: control_residuals(
            control, noisy, step, text, hint, added, strength
        )

    def _encode_text(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States [B, 77, W] and pooled [B, P]; equal texts are encoded once."""
        different = list(dict.fromkeys(texts))
        states, pooled = self._text(*self._text.tokenizers(different))
        rows = torch.tensor([different.index(text) for text in texts], device=self.device)
        return states[rows].float(), pooled[rows].float()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._half)

    def _load(self, kind: Any, name: str) -> Any:
        def load(directory: Path) -> Any:
            return load_stored(kind, directory)

        return self._named(name, load).to(self.device).eval()

    def _named(self, name: str, load: Callable[[Path], Any]) -> Any:
        """Load a part; errors name it."""
        try:
            return load(self.directory / name)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise EasyRefError(
                f"{name} of the model set {self.directory} cannot be loaded ({error}). Get or "
                "train the set again."
            ) from error


def has_quick_bfloat16(device: torch.device) -> bool:
    """Whether a device is faster in bfloat16 than in float32."""
    if device.type != "cpu":
        return device.type == "cuda"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:  # not Linux: float32 works everywhere
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _read_info(directory: Path) -> dict[str, Any]:
    info = read_set_info(directory)
    if info is None:
        raise EasyRefError(
            f"{directory} is not a demo model set: it has no readable {SET_FILE}. Name the folder "
            "of a set; `python -m workshop.demo train --set FOLDER` writes one."
        )
    return info


def _guidance_rows(tokens: ReferenceTokens, part: slice, count: int) -> torch.Tensor:
    """[2 * count, N, W] tokens of a part of the batch, those of the negative rows first."""
    pair = (tokens.uncond, tokens.cond)
    if tokens.batch == 1:
        return torch.cat([half.expand(count, -1, -1) for half in pair])
    return torch.cat([half[part] for half in pair])


def _identity_run(identity: AppliedIdentity | None, part: slice) -> IdentityRun | None:
    """Of a part of the batch; the conditional rows are its second half."""
    if identity is None:
        return None
    alphas = DDPMScheduler(**NOISE).alphas_cumprod
    return IdentityRun(
        identity.latents[part],
        alphas,
        identity.window,
        conditional=lambda rows: [slice(rows // 2, rows)],
    )


def _noise(seeds: Sequence[int], side: int) -> torch.Tensor:
    """[B, 4, side / 8, side / 8], drawn on the CPU so that all devices get the same."""
    shape = (4, side // 8, side // 8)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def _levels(decoded: torch.Tensor) -> torch.Tensor:
    """-1..1 -> uint8 on the CPU."""
    return ((decoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
