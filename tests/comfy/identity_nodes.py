"""What the tests of EasyRef Identity share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfyhost import Pack


def picture(seed: int, width: int = 128, height: int = 128) -> torch.Tensor:
    """ComfyUI's IMAGE of coloured patches, [1, H, W, 3]."""
    noise = torch.Generator().manual_seed(seed)
    small = torch.rand((1, 3, 8, 8), generator=noise)
    return torch.nn.functional.interpolate(small, (height, width)).movedim(1, -1)


def identity(pack: Pack, model: Any, vae: Any, **settings: Any) -> Any:
    """The Identity node with its defaults and one picture, save for `settings`."""
    if not {"images", "references"} & settings.keys():
        settings["images"] = picture(1)
    defaults = {"weight": 1.0, "start_percent": 0.0, "end_percent": 1.0, "reuse_steps": 1}
    return pack.run("EasyRefIdentity", model, vae, **(defaults | settings))


class Calls:
    """Calls of a model's UNet.

    Attributes:
        rows: of each call.
    """

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []

    @property
    def rows(self) -> list[int]:
        return [x.shape[0] for x in self.inputs]


@contextmanager
def calls_of(model: Any) -> Iterator[Calls]:
    """Note the inputs of all calls of the UNet inside."""
    calls = Calls()

    def note(module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        calls.inputs.append(args[0].clone())

    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
