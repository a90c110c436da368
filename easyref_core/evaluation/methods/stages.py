"""Stages of a pipeline's sampling: the weight of the reference tokens at each step."""

from __future__ import annotations

from typing import Any

from ...adapter.stages import Window


def stage_tokens(pipe: Any, window: Window, weight: float, steps: int) -> dict[str, Any]:
    """Weigh the reference tokens as a window says, in the next call of a pipeline.

    A step is at the place of its noise level, as ComfyUI counts percent: timestep t of T at
    1 - t / (T - 1).

    Args:
        pipe: with an adapter on its UNet.
        weight: of the tokens within the window.
        steps: of the call.

    Returns:
        Arguments for the call.
    """
    from ...sdxl_diffusers.adapter import set_scale

    scheduler = pipe.scheduler
    last = scheduler.config.num_train_timesteps - 1

    def before_step(number: int) -> None:
        place = 1 - float(scheduler.timesteps[number]) / last
        set_scale(pipe.unet, weight * window.at(place))

    def after_step(pipe: Any, number: int, timestep: Any, tensors: dict[str, Any]) -> dict:
        if number + 1 < len(scheduler.timesteps):
            before_step(number + 1)
        return tensors

    scheduler.set_timesteps(steps)  # as the pipeline will do
    before_step(0)
    return {"callback_on_step_end": after_step}
