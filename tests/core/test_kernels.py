"""Attention is the same whichever kernel computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from easyref_core.kernels import attend


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
