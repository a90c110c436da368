"""Files of a demo set that are not as a set stores them are refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import goldens
import pytest
import torch

from easyref_core.demo_set import (
    SET_FILE,
    STORED_IDS,
    STORED_SCALE,
    TABLE,
    read_set_info,
    read_stored_weights,
)


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(4, 4, dtype=torch.int8)},
        {"a": torch.ones(4, 4, dtype=torch.int8), "a" + STORED_SCALE: torch.ones(3, 1)},
        {STORED_IDS: torch.tensor([1, 2])},
        {TABLE: torch.ones(3, 2), STORED_IDS: torch.tensor([1, 10**6])},
        {TABLE: torch.ones(1, 2), STORED_IDS: torch.tensor([1, 2])},
    ],
)
def test_stored_weights_that_do_not_fit_their_scales_or_ids(
    tmp_path: Path, tensors: goldens.Tensors
) -> None:
    path = goldens.write(tmp_path / "model.safetensors", tensors)
    with goldens.refused(path, "Install EasyRef again"):
        read_stored_weights(path)


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"[" * 100_000, b"\xff", b'{"a": '])
def test_a_damaged_description_counts_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SET_FILE).write_bytes(content)
    assert read_set_info(tmp_path) is None
