"""The golden set on the device: the nodes reproduce the official implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfyhost
import goldens
import torch
from comfyhost import golden

from .bench import Bench
from .report import Row, measured

CASES = ("one_ref_prompt", "four_refs_prompt", "four_refs_empty")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Limits of the largest absolute difference: of tokens, of the noise prediction, and of the noise
# prediction with CFG 7.5, which multiplies differences by up to 14. In fp32 they are those of the
# CPU tests and detect any mistake. In half precision they are two to three times the rounding error
# on a CPU and detect wrong kernels: the smallest mistake in the UNet that the golden set lists
# changes it by 0.29.
BARS = {
    "fp32": (1e-4, 1e-4, 5e-4),
    "bf16": (0.4, 0.08, 0.6),
    "fp16": (0.04, 0.01, 0.1),
}
INT8_BAR = 0.6
"""Of the tokens alone, the MLLM's weights being rounded and its sums in bf16."""


def parity(bench: Bench) -> Iterator[Row]:
    for precision in DTYPES:
        with _exact_convolutions():
            yield from _differences(bench, precision)
    rounded = _largest_token_difference(bench, bench.golden_easyref("int8"))
    yield measured("tokens, int8", rounded, at_most=INT8_BAR)


def _differences(bench: Bench, precision: str) -> Iterator[Row]:
    max_tokens, max_noise, max_guided = BARS[precision]
    easyref = bench.golden_easyref(precision)
    largest = _largest_token_difference(bench, easyref)
    yield measured(f"tokens, {precision}", largest, at_most=max_tokens)

    tokens = bench.pack.part("easyref_core.tokens.reference_tokens").ReferenceTokens(
        golden("unet.ref_tokens"),
        golden("unet.uncond_ref_tokens"),
        easyref.checkpoint.identity,
        easyref.checkpoint.name,
    )
    load = bench.pack.part("nodes.host.demo_models").load_unet_directory
    unet = load(goldens.UNET, DTYPES[precision])
    steered = comfyhost.apply(bench.pack, unet, easyref, tokens)
    noise = _difference(comfyhost.predict(steered), golden("unet.noise_pred.scale_1.0"))
    yield measured(f"noise prediction, {precision}", noise, at_most=max_noise)
    noise = _difference(comfyhost.predict(steered, 7.5), golden("unet.noise_pred.cfg_guided_7.5"))
    yield measured(f"noise prediction, CFG 7.5, {precision}", noise, at_most=max_guided)


def _largest_token_difference(bench: Bench, easyref: Any) -> float:
    return max(_token_difference(bench, easyref, case) for case in CASES)


def _token_difference(bench: Bench, easyref: Any, case: str) -> float:
    """Largest difference of a golden group's tokens, cond and uncond, to the official ones."""
    reference = bench.pack.part("easyref_core.encode.group").Reference
    tokens = bench.pack.run(
        "EasyRefEncode",
        easyref,
        goldens.user_prompt(case),
        "easyref",
        goldens.IMAGE_SIZE,
        references=tuple(reference(picture) for picture in goldens.pictures(case)),
    )
    return max(
        _difference(tokens.cond, golden(f"full.{case}.tokens")),
        _difference(tokens.uncond, golden("full.uncond_black.tokens")),
    )


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return goldens.difference(actual.cpu().float(), expected)


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Convolutions in float32: TF32's ten bits of precision would hide small mistakes."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
