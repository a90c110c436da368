"""Attention is the same whichever kernel computes it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from easyref_core import attention_kernels as kernels
from easyref_core.attention_kernels import attend


@pytest.mark.parametrize("kind", ["all", "causal", "masked"])
def test_training_computes_what_pytorchs_kernel_does(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 7 if kind == "causal" else 9
    inputs = [torch.randn(2, 3, n, 8, generator=generator) for n in (7, rows, rows)]
    mask = torch.randn(7, rows, generator=generator) if kind == "masked" else None
    direction = torch.randn(2, 3, 7, 8, generator=generator)
    with torch.no_grad():
        inference = attend(*inputs, mask, causal=kind == "causal")
    learnt = [x.clone().requires_grad_() for x in inputs]
    ours = attend(*learnt, mask, causal=kind == "causal")
    expected = F.scaled_dot_product_attention(*learnt, attn_mask=mask, is_causal=kind == "causal")
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(inference, expected)
    for found, wanted in zip(
        torch.autograd.grad(ours, learnt, direction),
        torch.autograd.grad(expected, learnt, direction),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def test_training_keeps_the_inputs_precision() -> None:
    inputs = [torch.randn(1, 2, 5, 8).bfloat16().requires_grad_() for _ in range(3)]
    out = attend(*inputs, causal=True)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


@pytest.mark.parametrize("kind", ["all", "causal", "masked", "few queries"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_chunks_is_the_whole_attention(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = 5 if kind == "few queries" else 23
    inputs = [torch.randn(2, 3, n, 8, generator=generator).to(dtype) for n in (rows, 23, 23)]
    mask = torch.randn(rows, 23, generator=generator).to(dtype) if kind == "masked" else None
    causal = kind == "causal"
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=causal)
    whole = kernels.attend_in_chunks(*inputs, mask, causal)
    for step in (1, 4, 22):
        monkeypatch.setattr(kernels, "SCORE_BYTES", step * 2 * 3 * 23 * 4)
        cut = kernels.attend_in_chunks(*inputs, mask, causal)
        torch.testing.assert_close(cut, whole)
        near = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(cut, wanted, rtol=near, atol=near)
        assert cut.dtype == dtype


def test_scores_are_bounded_where_no_fused_kernel_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on MPS or DirectML, which cannot even be asked."""

    def unknown(*_: Any, **__: Any) -> int:
        raise NotImplementedError("Could not run 'aten::_fused_sdp_choice' on this backend")

    monkeypatch.setattr(torch, "_fused_sdp_choice", unknown)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("whole"))
    monkeypatch.setattr(kernels, "SCORE_BYTES", 7 * 3 * 50 * 4)
    assert not kernels.has_fused(torch.device("cpu"), torch.float32, 8, causal=False)
    softmax, sizes = torch.Tensor.softmax, []

    def noted(scores: torch.Tensor, dim: int) -> torch.Tensor:
        sizes.append(scores.nbytes)
        return softmax(scores, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", noted)
    kernels.attend(*(torch.randn(1, 3, 50, 8) for _ in range(3)))
    assert len(sizes) == 8
    assert max(sizes) <= kernels.SCORE_BYTES


def test_a_host_brings_its_own_attention_with_its_layers() -> None:
    own = lambda *_, **__: torch.zeros(0)  # noqa: E731
    assert kernels.attend_of(SimpleNamespace(attend=own)) is own
    assert kernels.attend_of(torch.nn) is kernels.attend
