"""Pictures and texts as unit vectors, whose products are cosines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...errors import EasyRefError
from ...out_of_memory import lack_of_memory
from ...pictures.loading import to_rgb
from ...qwen2vl.tokenizer_files import TokenizerKind, load_tokenizer
from ...untrusted import escaped, one_line
from .model_directory import ModelKind, OpenedModel, open_model, read_weights

CLIP = ModelKind("CLIP", "openai/clip-vit-large-patch14", {"clip": ("CLIPConfig", "CLIPModel", {})})
DINO = ModelKind(
    "DINO",
    "facebook/dinov2-small",
    {
        "dinov2": ("Dinov2Config", "Dinov2Model", {}),
        "vit": ("ViTConfig", "ViTModel", {"add_pooling_layer": False}),
    },
)
_CLIP_TOKENIZER = TokenizerKind(
    "CLIP",
    CLIP.example,
    ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
)
# Of a narrower picture only the middle is resized: the crop keeps nothing else, and the whole would
# be thousands of times as long as wide.
_NARROWEST = 16

ReadWeights = Callable[[Path], dict[str, torch.Tensor]]


class PictureEmbedder(torch.nn.Module):
    """A model that turns pictures into vectors, one at a time, in float32: a score does not depend
    on the pictures that are embedded beside it.
    """

    kind: ModelKind

    def __init__(self, opened: OpenedModel, name: str) -> None:
        super().__init__()
        self.name = name
        self.model = opened.module
        self.identity = opened.identity
        self._processor = opened.processor

    @property
    def placed_on(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.inference_mode()
    def picture(self, image: Image.Image) -> torch.Tensor:
        """[W], of length 1, on the CPU."""
        image = to_rgb(image, "the picture")
        pixels = self._processor(images=[self._middle(image)], return_tensors="pt").pixel_values
        return _unit(self._picture(pixels.to(self.placed_on, torch.float32)))

    def _picture(self, pixels: torch.Tensor) -> torch.Tensor:
        """[1, 3, H, W] -> [1, W]."""
        raise NotImplementedError

    def _middle(self, image: Image.Image) -> Image.Image:
        most = _NARROWEST * min(image.size)
        if max(image.size) <= most or not getattr(self._processor, "do_center_crop", False):
            return image
        width, height = (min(side, most) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


class DinoEmbedder(PictureEmbedder):
    """DINO's CLS embedding after the last norm."""

    kind = DINO

    def _picture(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).last_hidden_state[:, 0]


class ClipEmbedder(PictureEmbedder):
    """CLIP's projected embeddings of pictures and texts."""

    kind = CLIP

    def __init__(self, opened: OpenedModel, name: str, tokenizer: Any) -> None:
        super().__init__(opened, name)
        self._tokenizer = tokenizer
        self._most_tokens = self.model.config.text_config.max_position_embeddings
        vocabulary = self.model.config.text_config.vocab_size
        if len(tokenizer) > vocabulary:
            raise EasyRefError(
                f"CLIP {escaped(name)} knows {vocabulary:,} tokens, its tokenizer "
                f"{len(tokenizer):,}. Download the folder again."
            )
        self.identity["tokens"] = self._most_tokens

    def _picture(self, pixels: torch.Tensor) -> torch.Tensor:
        pooled = self.model.vision_model(pixels).pooler_output
        return self.model.visual_projection(pooled)

    @torch.inference_mode()
    def text(self, text: str) -> torch.Tensor:
        """[W], of length 1, on the CPU. A text of too many tokens is cut; its end token stays, as
        in OpenAI's code.

        Raises:
            EasyRefError: half of a character in it.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise EasyRefError(
                "The prompt holds half of a character (a lone surrogate, as in a broken emoji). "
                "Type that character again."
            )
        ids = self._tokenizer(
            text, truncation=True, max_length=self._most_tokens, return_tensors="pt"
        ).input_ids
        pooled = self.model.text_model(ids.to(self.placed_on)).pooler_output
        return _unit(self.model.text_projection(pooled))


def open_clip(
    directory: Path, name: str, tokenizer: Path | None = None, read: ReadWeights = read_weights
) -> ClipEmbedder:
    """CLIP from a directory as transformers saves it.

    Args:
        name: for tables and messages.
        tokenizer: its directory, where it is another one.
        read: how a weight file is read.

    Raises:
        MissingModelError, EasyRefError: see `open_model`; the tokenizer cannot be read, or the
            model computes nothing that can be used.
    """
    opened = open_model(directory, CLIP, read)
    embedder = ClipEmbedder(opened, name, load_tokenizer(tokenizer or directory, _CLIP_TOKENIZER))
    _try(embedder, lambda: embedder.text("a picture"))
    return embedder


def open_dino(directory: Path, name: str, read: ReadWeights = read_weights) -> DinoEmbedder:
    """DINO or DINOv2; otherwise as `open_clip`."""
    embedder = DinoEmbedder(open_model(directory, DINO, read), name)
    _try(embedder)
    return embedder


def _try(embedder: PictureEmbedder, *more: Callable[[], torch.Tensor]) -> None:
    """Raise EasyRefError where a model fails on a grey picture: sizes that do not fit together show
    here, not after hours of generating.
    """
    grey = Image.new("RGB", (64, 48), (128, 128, 128))
    try:
        found = [embed() for embed in (lambda: embedder.picture(grey), *more)]
    except Exception as error:  # odd configurations raise anything
        if lack_of_memory(error) is not None:
            raise
        raise EasyRefError(
            f"{embedder.kind.name} {escaped(embedder.name)} cannot embed a picture "
            f"({one_line(error)}). Download the folder again."
        ) from error
    if not all(torch.isfinite(vector).all() for vector in found):
        raise EasyRefError(
            f"{embedder.kind.name} {escaped(embedder.name)} computes values that are not numbers. "
            "Download the folder again."
        )


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """[1, W] -> [W]."""
    return torch.nn.functional.normalize(vectors[0].float(), dim=0).cpu()
