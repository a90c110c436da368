"""What of the references went into the reference tokens.

Measured where the tokens are filled: in the final decoder layer, by how the reference tokens share
their attention between the pictures, the prompt and themselves, on average over tokens and heads.
Earlier layers have mixed pictures and text before that, so it is where the tokens looked, not proof
of what they took.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import EasyRefError
from ..pictures.preprocessing import FACTOR, plan_sizes, preprocess
from ..qwen2vl.prompt import PromptTokenizer
from .encoder import EasyRefEncoder
from .group import Reference, plan_group
from .passes import EncodingCache, Progress, Reader, Steps


@dataclass(frozen=True)
class PictureShare:
    """One reference's part in the attention.

    Attributes:
        name: for people.
        share: of all attention, 0 to 1.
        heat: [rows, columns] float32, the same share spread over the picture; its sum is `share`.
    """

    name: str
    share: float
    heat: torch.Tensor


@dataclass(frozen=True)
class Inspection:
    """Where the reference tokens looked. All shares add up to 1.

    Attributes:
        pictures: the references, in order.
        prompt: share of what the person typed.
        frame: share of the rest of the chat, the instruction among it.
        tokens: share of the reference tokens themselves.
    """

    pictures: tuple[PictureShare, ...]
    prompt: float
    frame: float
    tokens: float

    @property
    def all_pictures(self) -> float:
        return sum(picture.share for picture in self.pictures)


@torch.no_grad()
def inspect_references(
    encoder: EasyRefEncoder,
    tokenizer: PromptTokenizer,
    references: Sequence[Reference],
    prompt: str,
    *,
    image_size: int | None = None,
    device: torch.device | str = "cpu",
    cache: EncodingCache | None = None,
    progress: Progress = lambda done, total: None,
) -> Inspection:
    """Read a group as `encode_references` does, and say where the reference tokens looked.

    Raises:
        EasyRefError: as `encode_references`.
    """
    plan = plan_group(encoder, tokenizer, references, prompt, image_size=image_size)
    chat = plan.chats[0]
    steps = Steps(len(references) + encoder.num_layers, progress)
    reader = Reader(encoder, torch.device(device), None, cache or EncodingCache(), steps)
    seen = [reader.see(preprocess(r.picture, plan.image_size)) for r in references]
    attention = reader.attention(chat, seen, [r.weight for r in references])
    if not torch.isfinite(attention).all():
        raise EasyRefError(
            "The MLLM's attention holds values that are not numbers. Choose bf16 or fp32 as the "
            "loader's precision."
        )
    columns = attention.double().mean(dim=0)  # [L + N]
    pictures = []
    for reference, (first, end) in zip(references, chat.image_spans, strict=True):
        _, (width, height) = plan_sizes(*reference.picture.size, plan.image_size)
        heat = columns[first:end].unflatten(0, (height // FACTOR, width // FACTOR))
        pictures.append(PictureShare(reference.name, float(heat.sum()), heat.float()))
    typed = float(columns[slice(*chat.prompt_span)].sum())
    tokens = float(columns[len(chat) :].sum())
    rest = float(columns.sum()) - typed - tokens - sum(p.share for p in pictures)
    return Inspection(tuple(pictures), typed, max(rest, 0.0), tokens)


def report(inspection: Inspection) -> str:
    """One line a reference, then the rest; in percent of all attention."""
    total = inspection.all_pictures
    lines = []
    for number, picture in enumerate(inspection.pictures, start=1):
        among = percent(picture.share / total if total > 0 else 0.0)
        lines.append(
            f"{number}. {picture.name}: {percent(picture.share)} ({among} of the pictures)"
        )
    others = {
        "all references": total,
        "prompt": inspection.prompt,
        "instruction and chat format": inspection.frame,
        "reference tokens themselves": inspection.tokens,
    }
    return "\n".join(lines + [f"{label}: {percent(share)}" for label, share in others.items()])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
