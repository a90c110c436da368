"""A small adapter with random weights, how it becomes a plan for an encoder, and one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import goldens
import pytest
import torch
from goldens import Tensors

from easyref_core.checkpoint import load_checkpoint
from easyref_core.loading import EncoderPlan, plan_encoder


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
