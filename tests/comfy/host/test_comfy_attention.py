"""Attention to reference tokens and inside the MLLM: the host's kernels, never quantised ones."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comfyhost import Pack, apply, predict

HEADS = 4
EXACT = ("attention_pytorch", "attention_flash", "attention_xformers")


@pytest.fixture
def own(pack: Pack) -> ModuleType:
    return pack.part("nodes.host.attention")


@pytest.fixture
def host() -> ModuleType:
    import comfy.ldm.modules.attention

    return comfy.ldm.modules.attention


def quantised(*_: Any, **__: Any) -> Any:
    pytest.fail("quantised attention")


def heads_apart(*lengths: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(1)
    return [torch.randn(2, HEADS, n, 8, generator=noise).to(dtype) for n in lengths]


@pytest.mark.parametrize("precision", [None, torch.float32])
@pytest.mark.parametrize("pytorch", [True, False])
def test_references_are_attended_by_the_path_for_small_inputs(
    own: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    pytorch: bool,
    precision: torch.dtype | None,
) -> None:
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "pytorch_attention_enabled", lambda: pytorch)
    q, k, v = heads_apart(50, 6, 6)
    result = own.reference_attention(q, k, v, precision)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_references_never_go_to_quantised_attention(
    own: ModuleType, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ComfyUI was started with, or another pack put in its place."""
    for name in ("optimized_attention", "optimized_attention_masked", "attention_sage"):
        monkeypatch.setattr(host, name, quantised)
    q, k, v = heads_apart(50, 6, 6)
    own.reference_attention(q, k, v)


def test_a_steered_model_attends_to_references_by_that_path(
    pack: Pack, unet: Any, easyref: Any, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = pack.part("nodes.sampling.layer")
    calls: list[int] = []
    attend = layer.reference_attention

    def noted(q: Any, k: Any, *args: Any) -> torch.Tensor:
        calls.append(k.shape[2])
        return attend(q, k, *args)

    monkeypatch.setattr(layer, "reference_attention", noted)
    predict(apply(pack, unet, easyref, tokens), 1.0)
    assert set(calls) == {tokens.num_tokens}


@pytest.mark.parametrize("name", EXACT)
def test_the_vision_tower_uses_the_hosts_exact_kernel(
    own: ModuleType, host: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    calls: list[dict[str, Any]] = []

    def chosen(q: Any, k: Any, v: Any, heads: int, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs)
        assert heads == HEADS
        return q

    monkeypatch.setattr(host, name, chosen)
    monkeypatch.setattr(host, "optimized_attention", chosen)
    q, k, v = (x.to("meta") for x in heads_apart(9, 9, 9, dtype=torch.bfloat16))
    assert own.MllmOperations.attend(q, k, v) is q
    assert calls == [{"skip_reshape": True, "skip_output_reshape": True}]
    own.MllmOperations.attend(q, k, v, causal=True)
    own.MllmOperations.attend(q, k, v, torch.zeros(9, 9, dtype=torch.bfloat16, device="meta"))
    assert len(calls) == 1, "no host's kernel takes these"


def test_a_kernel_for_half_precision_is_not_used_in_float32(
    own: ModuleType, host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "attention_flash", quantised)
    monkeypatch.setattr(host, "optimized_attention", quantised)
    q, k, v = heads_apart(9, 9, 9)
    torch.testing.assert_close(
        own.MllmOperations.attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    )


@pytest.mark.parametrize("causal", [False, True])
def test_the_mllm_never_goes_to_quantised_attention(
    own: ModuleType, host: ModuleType, monkeypatch: pytest.MonkeyPatch, causal: bool
) -> None:
    monkeypatch.setattr(host, "optimized_attention", quantised)
    q, k, v = heads_apart(9, 9, 9)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(own.MllmOperations.attend(q, k, v, causal=causal), expected)


def test_without_a_trusted_fused_kernel_queries_are_chunked(
    pack: Pack, own: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on MPS, DirectML and some AMD cards."""
    kernels = pack.part("easyref_core.attention_kernels")
    device = torch.device("mps")
    assert not own._pytorch_allowed(device)
    assert not own.mllm_is_fused(device, torch.bfloat16, (80, 128))
    monkeypatch.setattr(own, "_pytorch_allowed", lambda _: False)
    whole = heads_apart(23, 23, 23)
    expected = F.scaled_dot_product_attention(*whole)
    monkeypatch.setattr(F, "scaled_dot_product_attention", quantised)
    monkeypatch.setattr(kernels, "SCORE_BYTES", 2 * HEADS * 23 * 4 * 5)
    torch.testing.assert_close(own.MllmOperations.attend(*whole), expected)


def test_the_encoder_computes_with_the_hosts_attention(
    pack: Pack, own: ModuleType, fresh_easyref: Any
) -> None:
    """And plans for its memory by the same choice."""
    encoder_of: Callable[..., Any] = pack.part("nodes.host.encoder_weights").load_encoder
    encoder = encoder_of(fresh_easyref.encoder.plan(), "fp32").model
    attends = [m.attend for m in encoder.modules() if hasattr(m, "attend")]
    assert len(attends) == encoder.config.vision.depth + encoder.config.num_layers
    assert all(attend is own.MllmOperations.attend for attend in attends)
    assert own.mllm_is_fused(torch.device("cpu"), torch.float32, (80, 128))


@pytest.mark.parametrize("name", EXACT)
def test_an_mllm_on_the_cpu_uses_no_kernel_for_gpus(
    own: ModuleType, host: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """ComfyUI leaves text encoders there with --lowvram and on cards without half precision."""
    monkeypatch.setattr(host, name, quantised)
    monkeypatch.setattr(host, "optimized_attention", quantised)
    q, k, v = heads_apart(9, 9, 9, dtype=torch.bfloat16)
    result = own.MllmOperations.attend(q, k, v)
    assert torch.equal(result, F.scaled_dot_product_attention(q, k, v))
