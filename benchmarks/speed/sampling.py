"""What EasyRef Apply adds to a sampling step, timed at its own attention slots.

SDXL's UNet with its widths, or a fifth of them, and up to two transformer blocks in a row where
SDXL has ten: shares stay about the same, and it fits a small computer. Whole steps spread more than
what is added. The slots cost the same whatever the number of references: their tokens are always
64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from easyref_core.encode.encoder import EasyRefEncoder

from .comfyui_models import part, random_adapter, random_tokens, random_unet, start
from .counting import operations
from .official_processors import OfficialProcessors, load_processor
from .peers import TOKENS, IpAdapter, load_patch
from .slots import Slots
from .timing import Row, spread

UNET = {
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
}
_STEPS = 2


@dataclass(frozen=True)
class Widths:
    """A UNet, and the bars of one EasyRef Apply and of two with masks.

    Attributes:
        name: before each measure.
        channels: of the first level.
        side: of the latent.
    """

    name: str
    channels: int
    side: int
    bars: tuple[float, float]


WIDTHS = (Widths("step", 320, 32, (0.01, 0.05)), Widths("step, narrow", 64, 64, (0.03, 0.05)))
ONE, TWO = "one EasyRef Apply", "two with masks"
_OFFICIAL = "peer: official processors"
_PEERS = {
    ONE: (_OFFICIAL, *(f"peer: IP-Adapter Plus, {tokens} tokens" for tokens in TOKENS)),
    TWO: tuple(f"peer: IP-Adapter Plus, two with masks, {tokens} tokens" for tokens in TOKENS),
}
"""Ours -> those of the peers that they must be below."""


@dataclass(frozen=True)
class Subject:
    """Something added to a model: what it takes in a sampling, its multiplications there, and bytes
    that it has to read and write, as a share of the model's weights."""

    seconds: Callable[[], float]
    operations: Callable[[], int]
    bytes: float | None = None


@dataclass(frozen=True)
class Share:
    """Of the plain model's sampling: measured several times, and counted."""

    found: Sequence[float]
    counted: float
    bytes: float | None = None


def sampling(
    comfyui: Path, work: Path, repeats: int, ipadapter: Path | None, easyref: Path | None
) -> list[Row]:
    """Rows of the table; starts ComfyUI in this process, on the CPU.

    Args:
        ipadapter: a checkout of IP-Adapter Plus, whose rows come last.
        easyref: one of the official EasyRef, as well.
    """
    nodes = start(comfyui, work)
    with torch.inference_mode():
        return [
            row
            for widths in WIDTHS
            for row in as_rows(widths, _measured(nodes, work, widths, repeats, ipadapter, easyref))
        ]


def as_rows(widths: Widths, shares: Mapping[str, Share]) -> list[Row]:
    """Ours must be below each of the peers' with as many groups."""
    bars = dict(zip((ONE, TWO), widths.bars, strict=True))
    rows = []
    for name, share in shares.items():
        others = [
            statistics.median(shares[peer].found) for peer in _PEERS.get(name, ()) if peer in shares
        ]
        middle, below = statistics.median(share.found), min(others, default=None)
        label, bar = f"{widths.name}: {name}", bars.get(name)
        limits = {"multiplications": share.counted, "bytes": share.bytes}
        rows.append(Row(label, middle, spread(share.found), bar, below=below, **limits))
    return rows


def _measured(
    nodes: Mapping[str, Any],
    work: Path,
    widths: Widths,
    repeats: int,
    ipadapter: Path | None,
    official: Path | None,
) -> dict[str, Share]:
    """What each adds to a model of these widths, as shares of the plain model's sampling."""
    model = random_unet(UNET | {"model_channels": widths.channels})
    layers = part("nodes.host.unet_layers").cross_attention_layers(model)
    easyref = random_easyref(nodes, work, layers, widths.channels)
    given = random_tokens(easyref, 1), random_tokens(easyref, 2)
    sample = partial(sample_once, widths.side)
    plain_operations = operations(lambda: sample(model))

    def subject(steered: Any, module: Any, kind: type, moved: float | None = None) -> Subject:
        sample(steered, steps=1)  # keys and values are computed

        def seconds() -> float:
            timed = Slots(module, kind)
            with timed.timed():
                sample(steered)
            return timed.seconds

        counted = partial(operations, lambda: sample(steered))
        return Subject(seconds, lambda: counted() - plain_operations, moved)

    def apply(to: Any, tokens: Any, mask: torch.Tensor | None) -> Any:
        return nodes["EasyRefApply"].execute(to, easyref, tokens, mask=mask)[0]

    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1
    masked = apply(apply(model, given[0], left), given[1], 1 - left)
    layer = part("nodes.sampling.layer")
    once = _bytes(widths, layers) / model.model_size()
    subjects = {
        name: subject(steered, layer, layer.ReferenceAttention, moved)
        for name, steered, moved in (
            (ONE, apply(model, given[0], None), once),
            (TWO, masked, 2 * once),
        )
    }
    if official is not None:
        processor = load_processor(official)
        theirs = OfficialProcessors(processor, layers, widths.side, widths.channels, _STEPS)
        subjects[_OFFICIAL] = Subject(theirs.seconds, theirs.operations)
    if ipadapter is not None:
        patch = load_patch(ipadapter)
        adapter = IpAdapter(patch, layers)
        for name, masks in ((ONE, (None,)), (TWO, (left, 1 - left))):
            for peer, tokens in zip(_PEERS[name][-len(TOKENS) :], TOKENS, strict=True):
                steered = adapter.apply(model, tokens, masks)
                subjects[peer] = subject(steered, patch, patch.Attn2Replace)
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(repeats):
        start = time.process_time()
        sample(model)
        plain = time.process_time() - start
        for name, one in subjects.items():
            found[name].append(one.seconds() / plain)
    return {
        name: Share(found[name], one.operations() / plain_operations, one.bytes)
        for name, one in subjects.items()
    }


def _bytes(widths: Widths, layers: Mapping[str, Any]) -> int:
    """Of a step with CFG in float32: keys and values of 64 tokens, queries, the text's result, and
    the sum."""
    found = 0
    for layer in layers.values():
        width = layer.widths[0]
        positions = (widths.side * widths.channels // width) ** 2
        found += 2 * 4 * width * (2 * 64 + 3 * positions)
    return found


def random_easyref(
    nodes: Mapping[str, Any], work: Path, layers: Mapping[str, Any], channels: int
) -> Any:
    """A tiny MLLM with the projections of 64 tokens for these layers."""
    import goldens

    encoder = goldens.randomise(EasyRefEncoder(goldens.TINY, 64, 2048))
    file = work / "models" / "easyref" / f"random_{channels}.safetensors"
    save_file(random_adapter(encoder, layers), file)
    given = {"adapter": file.name, "mllm": "from adapter", "precision": "fp32"}
    return nodes["EasyRefLoader"].execute(**given)[0]


def sample_once(side: int, model: Any, steps: int = _STEPS) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 77, 2048, generator=generator)
    text = [[states, {"pooled_output": torch.zeros(1, 1280)}]]
    noise = torch.randn(1, 4, side, side, generator=generator)
    settings = (steps, 7.5, "ddim", "normal", text, text, noise * 0)
    return comfy.sample.sample(model, noise, *settings, seed=1, disable_pbar=True)
