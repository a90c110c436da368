"""Fixtures that several test files share; the golden models are built once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from easyref_core.adapter.checkpoint import AdapterCheckpoint
    from easyref_core.encode.encoder import EasyRefEncoder
    from easyref_core.qwen2vl.prompt import PromptTokenizer


@pytest.fixture(autouse=True)
def _no_run_goes_on() -> Iterator[None]:
    """After a test, accelerate forgets the precision and the processes of its run."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def checkpoint() -> AdapterCheckpoint:
    """The golden adapter, MLLM inside."""
    from goldens import ADAPTER

    from easyref_core.adapter.checkpoint import load_checkpoint

    return load_checkpoint(ADAPTER)


@pytest.fixture(scope="session")
def adapter_only(tmp_path_factory: pytest.TempPathFactory) -> AdapterCheckpoint:
    """The golden adapter without the MLLM inside."""
    from goldens import BODY, adapter_tensors, without, write

    from easyref_core.adapter.checkpoint import load_checkpoint

    path = tmp_path_factory.mktemp("adapter_only") / "adapter_only.safetensors"
    return load_checkpoint(write(path, without(adapter_tensors(), BODY)))


@pytest.fixture(scope="session")
def encoders(
    checkpoint: AdapterCheckpoint, adapter_only: AdapterCheckpoint
) -> dict[str, EasyRefEncoder]:
    """The golden encoders by their tag in the golden set."""
    from goldens import MLLM

    from easyref_core.encode.plan_encoder import plan_encoder

    return {
        tag: plan_encoder(found, MLLM).build()
        for tag, found in (("full", checkpoint), ("adapter_only", adapter_only))
    }


@pytest.fixture(scope="session")
def encoder(encoders: dict[str, EasyRefEncoder]) -> EasyRefEncoder:
    return encoders["full"]


@pytest.fixture(scope="session")
def tokenizer() -> PromptTokenizer:
    from goldens import MLLM

    from easyref_core.qwen2vl.prompt import PromptTokenizer

    return PromptTokenizer.from_directory(MLLM)
