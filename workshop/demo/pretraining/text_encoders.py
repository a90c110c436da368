"""SDXL's two text encoders and tokenizers at demo size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from easyref_core.demo_set import TABLE, rows_of_ids

from ..tiny_codecs import CLIP_G_CONFIG, CLIP_L_CONFIG
from .words import END, used_ids, write_tokenizer


class TextEncoders(nn.Module):
    """Both text encoders for training, each with an embedding table of the used words only."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = used_ids()
        self._rows = rows_of_ids(self.ids)
        small = _cut_down(CLIP_L_CONFIG, len(self.ids), int(self._rows[END]))
        large = _cut_down(CLIP_G_CONFIG, len(self.ids), int(self._rows[END]))
        self.small = CLIPTextModel(small)
        # SDXL uses the states before the last layer, so what follows them gets no gradients.
        unused = (f"encoder.layers.{small.num_hidden_layers - 1}.", "final_layer_norm.")
        for name, parameter in self.small.named_parameters():
            parameter.requires_grad_(not any(part in name for part in unused))
        self.large = CLIPTextModelWithProjection(large)

    def forward(
        self, small: torch.Tensor, large: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 77] for each -> states [B, 77, width], pooled [B, pooled width]."""
        return _states(self.small, self.large, self._rows[small], self._rows[large])

    def weights(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """{"clip_l": ..., "clip_g": ...} with all 49,408 rows, named as in published files."""
        tables = {}
        for name, encoder in (("clip_l", self.small), ("clip_g", self.large)):
            weights = {_published_name(n): w.detach().cpu() for n, w in encoder.named_parameters()}
            tables[name] = weights | {TABLE: weights[TABLE][self._rows]}
        return tables


def _published_name(name: str) -> str:
    """Older versions of transformers, and published files, have one more level."""
    known = name.startswith(("text_model.", "text_projection."))
    return name if known else f"text_model.{name}"


def _cut_down(config: Mapping[str, Any], words: int, end: int) -> CLIPTextConfig:
    changes = {"vocab_size": words + 1, "bos_token_id": 0, "eos_token_id": end}
    # Plain attention, as in the UNet.
    options = {"torch_dtype": "float32", "attn_implementation": "eager"}
    return CLIPTextConfig(**{**config, **changes, **options})


@dataclass(frozen=True)
class Tokenizers:
    """Tokenizers of both text encoders; they differ in the padding token."""

    small: CLIPTokenizer
    large: CLIPTokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 77] for each encoder."""
        ids = [
            t(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
            for t in (self.small, self.large)
        ]
        return ids[0], ids[1]


@dataclass(frozen=True)
class LoadedText:
    """A base directory's text encoders, frozen, with their tokenizers."""

    tokenizers: Tokenizers
    small: CLIPTextModel
    large: CLIPTextModelWithProjection

    def to(self, device: torch.device) -> None:
        self.small.to(device)
        self.large.to(device)

    @torch.no_grad()
    def __call__(
        self, small: torch.Tensor, large: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, 77] for each -> states [B, 77, width], pooled [B, pooled width]."""
        return _states(self.small, self.large, small, large)


def load_text_encoders(directory: Path) -> LoadedText:
    """Load them from a diffusers directory that `train_base` wrote."""
    whole = {"torch_dtype": torch.float32, "local_files_only": True}
    return LoadedText(
        load_tokenizers(directory),
        CLIPTextModel.from_pretrained(directory / "text_encoder", **whole).eval(),
        CLIPTextModelWithProjection.from_pretrained(directory / "text_encoder_2", **whole).eval(),
    )


def load_tokenizers(directory: Path) -> Tokenizers:
    """Load both from a diffusers directory."""
    return Tokenizers(
        CLIPTokenizer.from_pretrained(str(directory / "tokenizer"), local_files_only=True),
        CLIPTokenizer.from_pretrained(str(directory / "tokenizer_2"), local_files_only=True),
    )


def write_tokenizers(directory: Path) -> None:
    """Write both into a diffusers directory."""
    write_tokenizer(directory / "tokenizer", "<|endoftext|>")
    write_tokenizer(directory / "tokenizer_2", "!")


def _states(
    small: CLIPTextModel,
    large: CLIPTextModelWithProjection,
    small_ids: torch.Tensor,
    large_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, 77] for each -> SDXL's states [B, 77, width], pooled [B, pooled width]."""
    first = small(small_ids.to(small.device), output_hidden_states=True)
    second = large(large_ids.to(large.device), output_hidden_states=True)
    states = torch.cat((first.hidden_states[-2], second.hidden_states[-2]), dim=-1)
    return states, second.text_embeds
