"""The device that a user names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import EasyRefError
from .untrusted import shown

if TYPE_CHECKING:
    import torch


def usable_device(name: str) -> torch.device:
    """
    Raises:
        EasyRefError: PyTorch finds no such device here.
    """
    import torch

    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without data, such as meta, fails here
    except (RuntimeError, AssertionError) as error:
        raise EasyRefError(
            f"The device {shown(name)} cannot be used ({str(error).splitlines()[0]}). Choose cpu, "
            "or a device PyTorch finds here."
        ) from error
    return device


def best_device() -> str:
    """A GPU where PyTorch finds one."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
