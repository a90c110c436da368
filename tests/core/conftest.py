"""A small adapter with random weights, how it becomes a plan for an encoder, the golden UNet, and
one thread.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import goldens
import pytest
import torch
from goldens import Tensors

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.encode.plan_encoder import EncoderPlan, plan_encoder

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small take several times longer on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole() -> Tensors:
    """An adapter with LoRA and an MLLM whose sizes can be told from its weights."""
    return goldens.random_adapter(goldens.random_encoder(), rank=4)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., EncoderPlan]:
    """Save an adapter's tensors and plan its encoder."""

    def make(tensors: Tensors, directory: Path | None = None) -> EncoderPlan:
        path = goldens.write(tmp_path / "adapter.safetensors", tensors)
        return plan_encoder(load_checkpoint(path), directory)

    return make


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Tensors], AdapterCheckpoint]:
    """Write an adapter's changed tensors to a file."""
    return lambda t: load_checkpoint(goldens.write(tmp_path / "changed.safetensors", t))


@pytest.fixture(scope="session")
def plain() -> UNet2DConditionModel:
    """The golden UNet; never changed."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(goldens.UNET).eval().requires_grad_(False)


@pytest.fixture
def unet(plain: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(plain)


@pytest.fixture
def steered(unet: UNet2DConditionModel, checkpoint: AdapterCheckpoint) -> UNet2DConditionModel:
    """The golden UNet with the golden adapter."""
    from easyref_core.sdxl_diffusers.adapter import attach_adapter

    attach_adapter(unet, checkpoint)
    return unet
