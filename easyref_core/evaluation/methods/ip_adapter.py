"""IP-Adapter as diffusers loads it; several references are the average of their embeddings, as
the paper compares."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..identity import file_identity, folder_identity
from ..trials import Trial
from . import Generated
from .failures import concerns_all
from .ip_adapter_files import check_image_encoder, check_ip_adapter, load_image_encoder
from .pipeline import GenerationPipeline
from .sampling import Prepared, TextStates, generate_batch, opened

_ENCODER_FILES = ("config.json", "*.safetensors", "*.bin")


class IpAdapterMethod:
    """References through an IP-Adapter; see `Method`.

    Raises:
        EasyRefError: files that are missing, damaged or made for other models.
    """

    name = "ip-adapter"

    def __init__(self, base: GenerationPipeline, path: Path, image_encoder: Path) -> None:
        self._base = base
        self._adapter = check_ip_adapter(path, base.cross_attention)
        check_image_encoder(image_encoder, self._adapter)
        self._folder = image_encoder
        self._loaded = False

    def identity(self) -> dict[str, Any]:
        return {
            **self._base.identity,
            "ip_adapter": file_identity(self._adapter.file.path),
            "image_encoder": folder_identity(self._folder, _ENCODER_FILES),
            "several": "average of embeddings",
        }

    def generate(self, trials: Sequence[Trial], work: Path) -> list[Generated]:
        self._load()
        pipe = self._base.pipe
        pipe.set_ip_adapter_scale(trials[0].variant.weight)
        with _rows_of_their_own(pipe):
            return generate_batch(self._base, trials, self._prepare, _steer)

    def close(self) -> None:
        if self._loaded:
            pipe = self._base.pipe
            pipe.unload_ip_adapter()
            pipe.register_modules(image_encoder=None, feature_extractor=None)
            self._loaded = False
        self._base.free_cache()

    def _load(self) -> None:
        if self._loaded:
            return
        from transformers import CLIPImageProcessor

        base, pipe = self._base, self._base.pipe
        with concerns_all("the image encoder"):
            encoder = load_image_encoder(self._folder, base.dtype).to(base.device)
            encoder.requires_grad_(False).eval()
            side = encoder.config.image_size
            # As diffusers makes it where a pipeline has none.
            processor = CLIPImageProcessor(size=side, crop_size=side)
            pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
            self._loaded = True
            pipe.load_ip_adapter(self._adapter.state_dict(), subfolder="", weight_name="")
            pipe.unet.requires_grad_(False)

    @torch.no_grad()
    def _prepare(self, trial: Trial) -> Prepared:
        """Embeddings [2, 1, ...], those of the unconditional branch first."""
        start = time.perf_counter()
        base = self._base
        embeddings, unconditional = [], None
        for picture in opened(trial.references):
            embedding, unconditional = base.pipe.encode_image(
                picture, base.device, 1, self._adapter.is_plus
            )
            embeddings.append(embedding)
        mean = torch.stack(embeddings).mean(0)
        seconds = {"encode": time.perf_counter() - start}
        return Prepared(torch.stack((unconditional, mean)), seconds=seconds)


def _steer(conditions: Sequence[torch.Tensor], states: TextStates) -> TextStates:
    rows = torch.cat([torch.stack(half) for half in zip(*conditions, strict=True)])
    return TextStates(states.text, states.negative, {"ip_adapter_image_embeds": [rows]})


@contextmanager
def _rows_of_their_own(pipe: Any) -> Iterator[None]:
    """Let each image of a batch have embeddings of its own; diffusers repeats all of them for each
    image."""

    def prepare_rows(image: Any, embeds: Any, device: Any, count: int, guided: bool) -> list[Any]:
        return [rows if guided else rows.chunk(2)[1] for rows in embeds]

    pipe.prepare_ip_adapter_image_embeds = prepare_rows
    try:
        yield
    finally:
        del pipe.prepare_ip_adapter_image_embeds
