"""Qwen2-VL body, the reference tokens' final layers, and the projector, as one module.

Its state dict has exactly the official checkpoint's keys. Source: EasyRef (arXiv 2412.09618,
section 3.2) and the official code's effect: the body's norm is applied before the reference
tokens are appended, and the final layer is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..pictures.preprocessing import Patches
from ..qwen2vl.body import MllmBody
from ..qwen2vl.config import MllmConfig
from ..qwen2vl.decoder import DecoderLayer, Rope, rope
from ..qwen2vl.prompt import TokenizedPrompt

OnStep = Callable[[], None]


def _no_step() -> None:
    pass


class FinalLayers(nn.Module):
    """The learned reference tokens and the decoder layer(s) that fill them."""

    def __init__(
        self, config: MllmConfig, layers: int, num_tokens: int, operations: Any, **factory: Any
    ) -> None:
        super().__init__()
        self.reference_tokens = nn.Parameter(
            torch.empty(num_tokens, config.hidden_size, **factory), requires_grad=False
        )
        self.layers = nn.ModuleList(
            DecoderLayer(config, operations, **factory) for _ in range(layers)
        )
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **factory)


class Projector(nn.Module):
    """From the MLLM's width to the cross-attention's."""

    def __init__(self, width: int, token_width: int, operations: Any, **factory: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            operations.Linear(width, width, **factory),
            nn.GELU(),
            operations.Linear(width, token_width, **factory),
            operations.LayerNorm(token_width, **factory),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


class EasyRefEncoder(nn.Module):
    """Encodes one group of references and a prompt into reference tokens.

    Args:
        config: sizes of the MLLM.
        num_tokens: N reference tokens.
        token_width: width of the tokens that come out.
        final_layers: decoder layers kept apart from the body (1 in the released weights).
        operations: `torch.nn`, or ComfyUI's `comfy.ops` classes that cast weights when used.
        compute_dtype: of the activations; the weights may be stored in another one only if
            `operations` casts them.
        device, dtype: where and how the weights are created.
    """

    def __init__(
        self,
        config: MllmConfig,
        num_tokens: int,
        token_width: int,
        final_layers: int = 1,
        *,
        operations: Any = nn,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.config = config
        self.num_tokens = num_tokens
        self.compute_dtype = compute_dtype
        self.gradient_checkpointing = False
        body_layers = config.num_layers - final_layers
        self.multimodal_llm = MllmBody(config, body_layers, operations, **factory)
        self.mllm_final_layer = FinalLayers(config, final_layers, num_tokens, operations, **factory)
        self.image_proj_model = Projector(config.hidden_size, token_width, operations, **factory)

    @property
    def num_layers(self) -> int:
        """Decoder layers a group passes, final ones included (for progress)."""
        return len(self.multimodal_llm.model.layers) + len(self.mllm_final_layer.layers)

    @property
    def default_insertion(self) -> int:
        """Before how many last layers the reference tokens enter when nothing else is said."""
        return len(self.mllm_final_layer.layers)

    def encode_image(self, patches: Patches, device: torch.device) -> torch.Tensor:
        """Image features of one picture: [n, hidden], n image tokens."""
        pixels = patches.pixels[None].to(device, self.compute_dtype)
        return self.multimodal_llm.visual(pixels, patches.rows, patches.columns)[0]

    def encode_images(
        self, pictures: Sequence[Patches], device: torch.device
    ) -> list[torch.Tensor]:
        """Image features of each picture [n, hidden]; pictures of one grid share a pass."""
        grids: dict[tuple[int, int], list[int]] = {}
        for number, picture in enumerate(pictures):
            grids.setdefault((picture.rows, picture.columns), []).append(number)
        features: dict[int, torch.Tensor] = {}
        for (rows, columns), numbers in grids.items():
            pixels = torch.stack([pictures[n].pixels for n in numbers])
            pixels = pixels.to(device, self.compute_dtype)
            encoded = self.multimodal_llm.visual(pixels, rows, columns)
            features |= dict(zip(numbers, encoded, strict=True))
        return [features[number] for number in range(len(pictures))]

    def embed(
        self, prompt: TokenizedPrompt, pictures: Sequence[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """The body's input [1, L, hidden]."""
        ids = prompt.ids.to(device)
        return self.multimodal_llm.embed(ids, prompt.image_spans, pictures, self.compute_dtype)

    def body_states(self, embeds: torch.Tensor, on_step: OnStep = _no_step) -> torch.Tensor:
        """The body's output behind its norm [1, L, hidden] (the "penultimate" states)."""
        model = self.multimodal_llm.model
        position = rope(self.config, embeds.shape[1], embeds.device, embeds.dtype)
        return model.norm(self._run(model.layers, embeds, position, on_step))

    def reference_states(
        self,
        embeds: torch.Tensor,
        *,
        insert_before: int | None = None,
        column_bias: torch.Tensor | None = None,
        on_step: OnStep = _no_step,
    ) -> torch.Tensor:
        """The reference tokens' rows behind the final norm [1, N, hidden].

        Args:
            embeds: the body's input [1, L, hidden].
            insert_before: before how many of the last layers the tokens enter (paper, Table 4).
                Later layers do not see them earlier and nothing before them changes, since
                attention is causal.
            column_bias: [L] added to the tokens' attention logits in the very last layer.
        """
        x, position = self._before_the_last_layer(embeds, insert_before, on_step)
        final = self.mllm_final_layer
        bias = self._whole_bias(column_bias)
        x = final.layers[-1](x, position, queries=self.num_tokens, bias=bias)
        on_step()
        return final.norm(x)

    def reference_attention(
        self,
        embeds: torch.Tensor,
        *,
        insert_before: int | None = None,
        column_bias: torch.Tensor | None = None,
        on_step: OnStep = _no_step,
    ) -> torch.Tensor:
        """How the reference tokens share their attention in the very last layer: [N, L + N]
        float32, the mean of all heads; each row adds up to 1. See `reference_states`."""
        x, position = self._before_the_last_layer(embeds, insert_before, on_step)
        last, bias = self.mllm_final_layer.layers[-1], self._whole_bias(column_bias)
        shares = last.attention(x, position, queries=self.num_tokens, bias=bias)
        on_step()
        return shares[0]

    def _before_the_last_layer(
        self, embeds: torch.Tensor, insert_before: int | None, on_step: OnStep
    ) -> tuple[torch.Tensor, Rope]:
        """What the very last layer reads [1, L + N, hidden], and its positions."""
        model, final = self.multimodal_llm.model, self.mllm_final_layer
        body, last = list(model.layers), list(final.layers)
        insert_before = self.default_insertion if insert_before is None else insert_before
        length = embeds.shape[1] + self.num_tokens
        position = rope(self.config, length, embeds.device, embeds.dtype)
        x, inside_body = embeds, insert_before - len(last)
        if inside_body > 0:
            x = self._run(body[:-inside_body], x, position, on_step)
            x = self._run(body[-inside_body:], self._append(x), position, on_step)
            x = model.norm(x)
        else:
            x = model.norm(self._run(body, x, position, on_step))
            split = len(last) - insert_before
            x = self._run(last[:split], x, position, on_step)
            x = self._append(x)
            last = last[split:]
        return self._run(last[:-1], x, position, on_step), position

    def _whole_bias(self, column_bias: torch.Tensor | None) -> torch.Tensor | None:
        """[L] -> [L + N]: none on the reference tokens themselves."""
        if column_bias is None:
            return None
        return nn.functional.pad(column_bias, (0, self.num_tokens))

    def batch_reference_states(self, embeds: Sequence[torch.Tensor]) -> torch.Tensor:
        """Reference rows [B, N, hidden] of several groups of any lengths, each [1, L, hidden].

        Padding stands behind each group and attention is causal, so it changes nothing.
        """
        model, final = self.multimodal_llm.model, self.mllm_final_layer
        lengths = [e.shape[1] for e in embeds]
        x = pad_sequence([e[0] for e in embeds], batch_first=True)  # [B, longest, hidden]
        length = x.shape[1] + self.num_tokens
        position = rope(self.config, length, x.device, x.dtype)
        x = model.norm(self._run(model.layers, x, position, _no_step))
        tokens = final.reference_tokens.to(x)
        groups = [torch.cat((x[b, :n], tokens)) for b, n in enumerate(lengths)]
        x = pad_sequence(groups, batch_first=True)  # [B, longest + N, hidden]
        x = self._run(final.layers, x, position, _no_step)
        rows = [x[b, n : n + self.num_tokens] for b, n in enumerate(lengths)]
        return final.norm(torch.stack(rows))

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """[1, N, hidden] -> reference tokens [1, N, token_width]."""
        return self.image_proj_model(states)

    def _append(self, x: torch.Tensor) -> torch.Tensor:
        # The parameter does not belong to a layer that casts, so it is cast here.
        tokens = self.mllm_final_layer.reference_tokens.to(x)
        return torch.cat((x, tokens[None].expand(x.shape[0], -1, -1)), dim=1)

    def _run(
        self,
        layers: Sequence[DecoderLayer] | nn.ModuleList,
        x: torch.Tensor,
        position: Rope,
        on_step: OnStep,
    ) -> torch.Tensor:
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, position, use_reentrant=False)
            else:
                x = layer(x, position)
            on_step()
        return x
