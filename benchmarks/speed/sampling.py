"""What EasyRef Apply adds to a sampling step, timed at its own attention slots.

SDXL's UNet with its widths and one transformer block where SDXL has one, two or ten: shares stay
about the same, and it fits a small computer. Whole steps spread more than what is added. The slots
cost the same whatever the number of references: their tokens are always 64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from easyref_core.encode.encoder import EasyRefEncoder

from .comfyui_models import part, random_adapter, random_tokens, random_unet, start
from .peers import TOKENS, IpAdapter, load_patch
from .slots import Slots
from .timing import Row, spread

_UNET = {
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
}
_SIDE = 32  # latent cells: 256 pixels
_STEPS = 2
_BARS = {"one EasyRef Apply": 0.01, "two with masks": 0.05}
_PEERS = {
    name: tuple(f"peer: IP-Adapter Plus, {use}{tokens} tokens" for tokens in TOKENS)
    for name, use in zip(_BARS, ("", "two with masks, "), strict=True)
}
"""Our rows -> those of the peer that they must be below."""

_Subject = tuple[Any, Callable[[], Slots]]
"""A steered model, and a timer for its slots."""


def sampling(comfyui: Path, work: Path, repeats: int, ipadapter: Path | None) -> list[Row]:
    """Rows of the table; starts ComfyUI in this process, on the CPU.

    Args:
        ipadapter: a checkout of IP-Adapter Plus, whose rows come last.
    """
    nodes = start(comfyui, work)
    with torch.inference_mode():
        model = random_unet(_UNET)
        layers = part("nodes.host.unet_layers").cross_attention_layers(model)
        easyref = _easyref(nodes, work, layers)
        given = random_tokens(easyref, 1), random_tokens(easyref, 2)

        def apply(to: Any, tokens: Any, mask: torch.Tensor | None) -> Any:
            return nodes["EasyRefApply"].execute(to, easyref, tokens, mask=mask)[0]

        left = torch.zeros(1, 64, 64)
        left[:, :, :32] = 1
        masked = apply(apply(model, given[0], left), given[1], 1 - left)
        steered = dict(zip(_BARS, (apply(model, given[0], None), masked), strict=True))
        layer = part("nodes.sampling.layer")
        slots = partial(Slots, layer, layer.ReferenceAttention)
        subjects = {name: (one, slots) for name, one in steered.items()}
        if ipadapter is not None:
            subjects |= _peers(ipadapter, layers, model, (left, 1 - left))
        shares = _shares(model, subjects, repeats)
    return as_rows(shares)


def as_rows(shares: Mapping[str, Sequence[float]]) -> list[Row]:
    """Ours must be below each of the peers' with as many groups."""
    rows = []
    for name, found in shares.items():
        others = [
            statistics.median(shares[peer]) for peer in _PEERS.get(name, ()) if peer in shares
        ]
        middle = statistics.median(found)
        below = min(others, default=None)
        label = f"step: {name}" if name in _BARS else name
        rows.append(Row(label, middle, spread(found), _BARS.get(name), below=below))
    return rows


def _peers(
    folder: Path, layers: Mapping[str, Any], model: Any, masks: tuple[torch.Tensor, ...]
) -> dict[str, _Subject]:
    patch = load_patch(folder)
    adapter = IpAdapter(patch, layers)
    slots = partial(Slots, patch, patch.Attn2Replace)
    names = zip(_PEERS.values(), ((None,), masks), strict=True)
    return {
        name: (adapter.apply(model, tokens, given), slots)
        for pair, given in names
        for name, tokens in zip(pair, TOKENS, strict=True)
    }


def _shares(model: Any, subjects: Mapping[str, _Subject], repeats: int) -> dict[str, list[float]]:
    """What the slots of each steered model take, as shares of the plain model's sampling."""
    found: dict[str, list[float]] = {name: [] for name in subjects}
    for steered, _ in subjects.values():
        _sample(steered, steps=1)  # keys and values are computed
    for _ in range(repeats):
        start = time.process_time()
        _sample(model)
        plain = time.process_time() - start
        for name, (steered, slots) in subjects.items():
            timed = slots()
            with timed.timed():
                _sample(steered)
            found[name].append(timed.seconds / plain)
    return found


def _easyref(nodes: Mapping[str, Any], work: Path, layers: Mapping[str, Any]) -> Any:
    """A tiny MLLM with the projections of 64 tokens for these layers."""
    import goldens

    encoder = goldens.randomise(EasyRefEncoder(goldens.TINY, 64, 2048))
    file = work / "models" / "easyref" / "random.safetensors"
    save_file(random_adapter(encoder, layers), file)
    given = {"adapter": file.name, "mllm": "from adapter", "precision": "fp32"}
    return nodes["EasyRefLoader"].execute(**given)[0]


def _sample(model: Any, steps: int = _STEPS) -> torch.Tensor:
    import comfy.sample

    generator = torch.Generator().manual_seed(3)
    states = torch.randn(1, 77, 2048, generator=generator)
    text = [[states, {"pooled_output": torch.zeros(1, 1280)}]]
    noise = torch.randn(1, 4, _SIDE, _SIDE, generator=generator)
    settings = (steps, 7.5, "ddim", "normal", text, text, noise * 0)
    return comfy.sample.sample(model, noise, *settings, seed=1, disable_pbar=True)
