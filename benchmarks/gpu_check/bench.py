"""Shared by all checks: models, the pack's nodes, sampling, time and memory."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import comfyhost
import numpy as np
import torch
from comfyhost import Pack
from PIL import Image

from .models import REAL, SMALL, ModelSet, write_real, write_small

CFG = 7.0
Variant = Callable[[Any], Any]


class Bench:
    """The pack inside ComfyUI, and models to run it on, loaded on first use.

    Args:
        work: folder for files that one process of a check writes for another.
        small: use the golden models instead of models of released size.
    """

    def __init__(self, pack: Pack, work: Path, small: bool) -> None:
        import comfy.model_management as mm

        self.pack = pack
        self.work = work
        self.small = small
        self.device: torch.device = mm.get_torch_device()
        self.models: ModelSet = SMALL if small else REAL
        self._loaded: dict[str, Any] = {}

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU, with its own memory and events."""
        return self.device.type == "cuda"

    def write_models(self) -> None:
        """Write the model files that are missing."""
        write_small(self.pack)
        if not self.small:
            write_real(self.pack, self.device)

    # Models

    def easyref(self) -> Any:
        """The adapter, loaded by EasyRef Loader."""
        if "easyref" not in self._loaded:
            self._loaded["easyref"] = self.pack.run(
                "EasyRefLoader", self.models.adapter, self.models.mllm, "auto"
            )
        return self._loaded["easyref"]

    def unet(self) -> Any:
        """SDXL, loaded as Load Diffusion Model does."""
        if "unet" not in self._loaded:
            self._loaded["unet"] = load_unet(self.models.unet)
        return self._loaded["unet"]

    def drop(self) -> None:
        """Drop the models, as ComfyUI does with cached outputs of an old graph."""
        self._loaded.clear()

    def golden_easyref(self, precision: str = "fp32") -> Any:
        """The golden adapter, for the golden UNet."""
        return self.pack.run("EasyRefLoader", SMALL.adapter, SMALL.mllm, precision)

    # References

    def references(self, count: int, seed: int = 0) -> tuple[Any, ...]:
        """Images of noise, of different sizes."""
        reference = self.pack.part("easyref_core.encode.group").Reference
        noise = np.random.default_rng(seed)
        low, high = self.models.sides
        pictures = []
        for _ in range(count):
            width, height = noise.integers(low, high, 2, endpoint=True)
            pixels = noise.integers(0, 256, (height, width, 3), dtype=np.uint8)
            pictures.append(reference(Image.fromarray(pixels)))
        return tuple(pictures)

    def encode(self, references: tuple[Any, ...], prompt: str) -> Any:
        """Reference tokens, through EasyRef Encode."""
        return self.pack.run(
            "EasyRefEncode",
            self.easyref(),
            prompt,
            "easyref",
            self.models.image_size,
            references=references,
        )

    def tokens(self, seed: int) -> Any:
        """Random reference tokens of the adapter's shape."""
        return comfyhost.random_tokens(self.pack, self.easyref(), seed)

    # Steering

    def apply(self, model: Any, tokens: Any = None, **settings: Any) -> Any:
        return comfyhost.apply(self.pack, model, self.easyref(), tokens, **settings)

    def variants(self) -> dict[str, Variant]:
        """One setting of EasyRef Apply each: name -> function that patches a model."""
        first, second = self.tokens(1), self.tokens(2)
        curve = self.pack.run("EasyRefWeightCurve", "linear", 1.0, 0.2, "")
        quarters = self.quarters()

        def steered(tokens: Any = first, **settings: Any) -> Variant:
            return lambda model: self.apply(model, tokens, **settings)

        return {
            "one Apply": steered(),
            "another weight": steered(weight=0.4),
            "a window": steered(start_percent=0.2, end_percent=0.8),
            "a mask": steered(mask=quarters[0]),
            "another mask": steered(mask=quarters[3]),
            "a curve": steered(curve=curve),
            "four regions": steered(None, regions=self.regions()),
            "two Applies": lambda model: steered(second, weight=0.5)(steered()(model)),
        }

    def regions(self) -> Any:
        """Different tokens in each quarter of the image, through EasyRef Region."""
        regions = None
        for seed, mask in enumerate(self.quarters(), 1):
            regions = self.pack.run("EasyRefRegion", self.tokens(seed), mask, 1.0, previous=regions)
        return regions

    def quarters(self) -> list[torch.Tensor]:
        """Masks [1, side, side] of the image's quarters."""
        side = self.models.latent
        masks = []
        for top in (0, side // 2):
            for left in (0, side // 2):
                mask = torch.zeros(1, side, side)
                mask[:, top : top + side // 2, left : left + side // 2] = 1
                masks.append(mask)
        return masks

    def text(self, seed: int) -> list[list[Any]]:
        """A random CONDITIONING."""
        noise = torch.Generator().manual_seed(seed)
        states = torch.randn((1, 77, self.models.context), generator=noise)
        pooled = torch.randn((1, self.models.pooled), generator=noise)
        return [[states, {"pooled_output": pooled}]]

    def sample(self, model: Any, steps: int, side: int | None = None, **options: Any) -> Any:
        """Sample latents as KSampler does: Euler, with CFG; `side` in latent pixels."""
        import comfy.sample

        side = side or self.models.latent
        noise = comfyhost.latents(1, side, side)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            CFG,
            "euler",
            "normal",
            self.text(11),
            self.text(12),
            torch.zeros_like(noise),
            seed=1,
            disable_pbar=True,
            **options,
        )

    # Time and memory

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        """Wall time of a call in seconds, until the device is idle; and its result."""
        self.wait()
        start = time.perf_counter()
        result = work()
        self.wait()
        return time.perf_counter() - start, result

    def step_times(self, model: Any, steps: int) -> tuple[float, list[float]]:
        """Seconds from the start of sampling to the end of its first step, and per later step."""
        marks: list[Any] = []

        def mark(*_: Any) -> None:
            if self.gpu:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks.append(event)
            else:
                marks.append(time.perf_counter())

        self.wait()
        mark()
        self.sample(model, steps, callback=mark)
        self.wait()
        pairs = itertools.pairwise(marks)
        if self.gpu:
            times = [first.elapsed_time(second) / 1000 for first, second in pairs]
        else:
            times = [second - first for first, second in pairs]
        return times[0], times[1:]

    def allocated(self) -> int:
        """Bytes of tensors on the device; 0 without a GPU."""
        self.wait()
        return torch.cuda.memory_allocated(self.device) if self.gpu else 0

    def used(self) -> int:
        """Bytes of the card in use by any process; 0 without a GPU."""
        if not self.gpu:
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def require_counting(self) -> None:
        """Raise RuntimeError if the allocator does not count: then every limit would hold."""
        before, size = self.allocated(), 1 << 26
        probe = torch.empty(size, dtype=torch.uint8, device=self.device)
        counted = self.allocated() - before
        del probe
        if self.gpu and counted < size:
            raise RuntimeError(f"PyTorch counts {counted} of {size} bytes that it allocated")

    def reset_peak(self) -> None:
        if self.gpu:
            self.wait()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Peak bytes of tensors since `reset_peak`; 0 without a GPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.gpu else 0

    def free(self) -> None:
        """What ComfyUI's server does on /free; its caches are the caller's variables here."""
        import comfy.model_management as mm

        mm.unload_all_models()
        gc.collect()
        mm.soft_empty_cache()


def load_unet(name: str, dtype: torch.dtype | None = None) -> Any:
    """A diffusion model as Load Diffusion Model loads it; ComfyUI chooses the dtype for None."""
    import comfy.sd
    import folder_paths

    path = folder_paths.get_full_path_or_raise("diffusion_models", name)
    return comfy.sd.load_diffusion_model(path, model_options={"dtype": dtype} if dtype else {})


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine similarity of two results as vectors; NaN if one is not finite."""
    return float(
        torch.nn.functional.cosine_similarity(
            first.double().flatten(), second.double().flatten(), dim=0
        )
    )


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors with values that are not finite."""
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
