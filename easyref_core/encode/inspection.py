"""How much attention the reference tokens pay to each reference.

Measured in the final decoder layer: the attention probabilities of the reference tokens over the
pictures, the prompt and themselves, averaged over tokens and heads. Earlier layers have mixed
pictures and text before that, so attention to a picture is no proof of what was used of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import EasyRefError
from .cache import EncodingCache
from .encoder import EasyRefEncoder
from .group import BASELINES, GroupPlan
from .passes import EncoderRun, Progress, no_progress


@dataclass(frozen=True)
class PictureShare:
    """The attention to one reference.

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
    """The attention of the reference tokens. All shares add up to 1.

    Attributes:
        pictures: the references, in order.
        prompt: share of the user's prompt.
        frame: share of the rest of the chat, the instruction included.
        tokens: share of the reference tokens themselves.
    """

    pictures: tuple[PictureShare, ...]
    prompt: float
    frame: float
    tokens: float

    @property
    def all_pictures(self) -> float:
        return sum(picture.share for picture in self.pictures)

    def among_pictures(self, picture: PictureShare) -> str:
        """A reference's share of the attention to all references, in percent."""
        return percent(picture.share / self.all_pictures if self.all_pictures > 0 else 0.0)


@torch.no_grad()
def inspect_references(
    encoder: EasyRefEncoder,
    plan: GroupPlan,
    *,
    device: torch.device | str = "cpu",
    progress: Progress = no_progress,
    cache: EncodingCache | None = None,
    fused: bool | None = None,
) -> Inspection:
    """Encode a planned group, and measure how the reference tokens share their attention.

    Args:
        encoder, device, progress, cache, fused: see `encode_references`.

    Raises:
        EasyRefError: the plan is a baseline's; the MLLM gave values that are not numbers.
    """
    if plan.aggregation in BASELINES:
        raise EasyRefError(
            f"Aggregation {plan.aggregation!r} encodes each reference alone, so no attention is "
            "shared between them. Plan the group with 'easyref' to inspect it."
        )
    (mllm_pass,) = plan.passes
    chat, images = mllm_pass.chat, mllm_pass.images
    total = len(images) + encoder.config.num_layers
    cache = cache or EncodingCache(prefixes=0)
    run = EncoderRun(encoder, plan, torch.device(device), cache, fused, progress, total)
    attention = run.attention(mllm_pass)
    columns = attention.double().mean(dim=0)  # [L + N]
    pictures = []
    for image, (first, end) in zip(images, chat.image_spans, strict=True):
        heat = columns[first:end].unflatten(0, (image.rows, image.columns))
        pictures.append(PictureShare(image.reference.name, float(heat.sum()), heat.float()))
    prompt = float(columns[slice(*chat.prompt_span)].sum())
    tokens = float(columns[len(chat) :].sum())
    rest = float(columns.sum()) - prompt - tokens - sum(p.share for p in pictures)
    return Inspection(tuple(pictures), prompt, max(rest, 0.0), tokens)


def report(inspection: Inspection) -> str:
    """One line a reference, then the rest; in percent of all attention."""
    lines = [
        f"{number}. {picture.name}: {percent(picture.share)} "
        f"({inspection.among_pictures(picture)} of the pictures)"
        for number, picture in enumerate(inspection.pictures, start=1)
    ]
    others = {
        "all references": inspection.all_pictures,
        "prompt": inspection.prompt,
        "instruction and chat format": inspection.frame,
        "reference tokens themselves": inspection.tokens,
    }
    return "\n".join(lines + [f"{label}: {percent(share)}" for label, share in others.items()])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
