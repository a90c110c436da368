"""Batches sampled in windows of a few frames: each frame keeps its own tokens and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comfyhost import Pack, apply, euler, guider, latents, random_tokens, sigmas, stock
from goldens import difference

CFG = 4.0
CLOSE = 5e-5
FRAMES, WINDOW, OVERLAP = 6, 3, 1
STEPS = (801.0, 401.0)


def in_windows(model: Any, schedule: str = "standard_static") -> Any:
    """ComfyUI's own context windows; newer ones sample the frame before each window with it."""
    node = "comfy_extras.nodes_context_windows.ContextWindowsManualNode"
    return stock(node, model, WINDOW, OVERLAP, schedule, 1, False, "flat", 0, False)


def sample(model: Any) -> torch.Tensor:
    return euler(guider(model, CFG), latents(FRAMES, 16, 24), sigmas(model, *STEPS))


def frame_masks() -> torch.Tensor:
    """A bar that moves from left to right."""
    masks = torch.zeros(FRAMES, 16, 24)
    for frame, mask in enumerate(masks):
        mask[:, 4 * frame : 4 * frame + 4] = 1
    return masks


@pytest.mark.parametrize("schedule", ["standard_static", "looped_uniform"])
@pytest.mark.parametrize("what", ["tokens", "mask"])
def test_frames_in_windows_are_steered_as_in_one_batch(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, what: str, schedule: str
) -> None:
    each = {
        "tokens": {"tokens": random_tokens(pack, easyref, 5, FRAMES)},
        "mask": {"tokens": tokens, "mask": frame_masks()},
    }[what]
    model = apply(pack, unet, easyref, **each)
    expected = sample(model)
    assert difference(sample(in_windows(model, schedule)), expected) < CLOSE
    assert difference(sample(unet), expected) > 0.01


def test_as_many_masks_as_a_window_are_not_enough(
    pack: Pack, unet: Any, easyref: Any, tokens: Any
) -> None:
    model = apply(pack, unet, easyref, tokens, mask=frame_masks()[:WINDOW])
    with pack.refused(f"mask has a batch of {WINDOW}", f"{FRAMES} latents"):
        sample(in_windows(model))


def frames_of(pack: Pack, window: Any, count: int) -> Any:
    """The latents of a model call with `count` rows in a context window."""
    divide_rows = pack.part("nodes.sampling.batch_rows").divide_rows
    return divide_rows(latents(count), None, [None], {"context_window": window}, None).batch


def test_windows_over_another_dimension_hold_every_frame(pack: Pack) -> None:
    """Video models are cut along time, their batch is whole."""
    import comfy.context_windows

    along_time = comfy.context_windows.IndexListContextWindow([1, 2], dim=2, total_frames=8)
    assert frames_of(pack, along_time, 2).indices is None
    along_batch = comfy.context_windows.IndexListContextWindow([3, 4], dim=0, total_frames=8)
    frames = frames_of(pack, along_batch, 2)
    assert (frames.indices, frames.total, frames.count) == ((3, 4), 8, 2)


def test_the_frame_sampled_before_a_window_keeps_its_own(pack: Pack) -> None:
    """Newer cores put it in front of the window's frames."""
    import comfy.context_windows

    window = comfy.context_windows.IndexListContextWindow([3, 4], dim=0, total_frames=8)
    window.causal_anchor_index = 2
    frames = frames_of(pack, window, 3)
    assert (frames.indices, frames.total, frames.count) == ((2, 3, 4), 8, 3)
