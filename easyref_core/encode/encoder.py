"""Qwen2-VL body, the reference tokens' final layers, and the projector, as one module.

Its state dict has exactly the official checkpoint's keys, and those of layer pooling where the
adapter has it. Source: EasyRef (arXiv 2412.09618, section 3.2) and what the official code computes:
the body's norm is applied before the reference tokens are appended, and the final layer is causal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from ..adapter.layer_pooling import PoolingSizes
from ..pictures.preprocessing import Patches
from ..qwen2vl.body import MllmBody
from ..qwen2vl.config import MllmConfig
from ..qwen2vl.decoder import LayerCache, Rope, rope
from ..qwen2vl.prompt import TokenizedPrompt
from .chat_state import ChatState
from .final_layers import FinalLayers, Projector
from .layer_pooling import LayerPools, Pooling, join_poolings

OnStep = Callable[[], None]


def _no_step() -> None:
    pass


class EasyRefEncoder(nn.Module):
    """Encodes one group of references and a prompt into reference tokens.

    Args:
        config: sizes of the MLLM.
        num_tokens: N reference tokens.
        token_width: width of the tokens that come out.
        final_layers: decoder layers kept apart from the body (1 in the released weights).
        pooling: sizes of the adapter's layer pooling; None without. A new one is added by
            `add_layer_pools`.
        operations: `torch.nn`, or classes that cast weights when used: `qwen2vl.casting`, or those
            of ComfyUI's `comfy.ops`.
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
        pooling: PoolingSizes | None = None,
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
        self.mllm_layer_pooling: LayerPools | None = None
        if pooling is not None:
            self.mllm_layer_pooling = LayerPools(config, pooling, operations, **factory)

    def encode_images(
        self, pictures: Sequence[Patches], device: torch.device
    ) -> list[torch.Tensor]:
        """Image features [n, hidden] of each picture of n image tokens, in one call."""
        order = sorted(range(len(pictures)), key=lambda n: pictures[n].pixels.shape[0])
        grids = [(pictures[n].rows, pictures[n].columns) for n in order]
        pixels = torch.cat([pictures[n].pixels for n in order]).to(device, self.compute_dtype)
        features = self.multimodal_llm.visual(pixels, grids)
        parts = features.split([pictures[n].num_tokens for n in order])
        found = dict(zip(order, parts, strict=True))
        return [found[number] for number in range(len(pictures))]

    def embed(
        self,
        chat: TokenizedPrompt,
        features: Sequence[torch.Tensor],
        device: torch.device,
        start: int = 0,
    ) -> torch.Tensor:
        """The language model's input [1, L, hidden]: word embeddings and image features.

        Args:
            start: of the chat's tokens from there, and the pictures behind it; it lies in none.
        """
        spans = [(first - start, end - start) for first, end in chat.image_spans if first >= start]
        ids = chat.ids[start:].to(device)
        return self.multimodal_llm.embed(ids, spans, features, self.compute_dtype)

    def reference_states(
        self,
        embeds: torch.Tensor,
        insert_before: int | None = None,
        column_bias: torch.Tensor | None = None,
        on_step: OnStep = _no_step,
        pooling: Pooling | None = None,
        chat: ChatState | None = None,
    ) -> torch.Tensor:
        """Hidden states [1, N, hidden] of the reference tokens after the final norm.

        Args:
            embeds: the language model's input [1, L, hidden]: what follows the known beginning of
                the chat. L may be 0.
            insert_before: the tokens enter before this many last layers (paper, Table 4); None for
                where they were trained. As attention is causal, nothing before them changes.
            column_bias: added to the tokens' attention logits in the very last layer, for every
                position of the whole chat.
            on_step: called after each layer.
            pooling: pools hidden states of many layers, which the final layers read in place of
                the body's last; None for that one.
            chat: its beginning, where it is known, and the place for what is computed here.
        """
        x, position, bias, cache = self._last_layer_inputs(
            embeds, insert_before, column_bias, on_step, pooling, chat
        )
        final = self.mllm_final_layer
        x = final.layers[-1](x, position, self.num_tokens, bias, cache)
        on_step()
        return final.norm(x)

    def reference_attention(
        self,
        embeds: torch.Tensor,
        insert_before: int | None = None,
        column_bias: torch.Tensor | None = None,
        on_step: OnStep = _no_step,
        pooling: Pooling | None = None,
        chat: ChatState | None = None,
    ) -> torch.Tensor:
        """Attention probabilities of the reference tokens in the very last layer, over the whole
        chat and themselves: [N, L + N] float32, the mean of all heads; each row adds up to 1. See
        `reference_states`."""
        x, position, bias, cache = self._last_layer_inputs(
            embeds, insert_before, column_bias, on_step, pooling, chat
        )
        last = self.mllm_final_layer.layers[-1]
        probabilities = last.attention(x, position, self.num_tokens, bias, cache)
        on_step()
        return probabilities[0]

    def _last_layer_inputs(
        self,
        embeds: torch.Tensor,
        insert_before: int | None,
        column_bias: torch.Tensor | None,
        on_step: OnStep,
        pooling: Pooling | None,
        chat: ChatState | None,
    ) -> tuple[torch.Tensor, Rope, torch.Tensor | None, LayerCache]:
        """Before the very last layer: hidden states [1, R, hidden] of the rows that run in it, the
        reference tokens last; their positions; bias [L + N]; the layer's cache."""
        body, final = self.multimodal_llm.model, self.mllm_final_layer
        layers, entry = [*body.layers, *final.layers], self._entry(insert_before)
        chat = chat or ChatState(self.config, len(final.layers))
        start, final_start, caches = chat.length, chat.final_length, [*chat.body, *chat.final]
        new = embeds.shape[1]
        length = start + new + self.num_tokens
        cos, sin = rope(self.config, length, embeds.device, embeds.dtype)
        position = cos[start:], sin[start:]
        x = embeds
        if pooling is not None:
            pooled = self.mllm_layer_pooling.sizes.layers
            unread = length - self.num_tokens - final_start
            # On the CPU: the states of all layers are many.
            hidden = torch.empty(len(pooled), unread, x.shape[2], dtype=x.dtype)
        for number, layer in enumerate(layers):
            if pooling is not None and number in pooled:
                hidden[pooled.index(number), unread - new :] = body.norm(x[:, :new])[0].cpu()
            if number == len(body.layers):
                x, position = body.norm(x), (cos[final_start:], sin[final_start:])
                if pooling is not None:
                    rows = self._pooled(hidden, pooling, chat, x)
                    x = torch.cat((rows, x[:, new:]), dim=1)
            if number == entry:
                x = self._with_tokens(x)
            if number == len(layers) - 1:
                break
            if x.shape[1]:  # else all of the chat is known
                x = layer(x, position, cache=caches[number])
            on_step()
        if column_bias is not None:
            column_bias = nn.functional.pad(column_bias, (0, self.num_tokens))
        return x, position, column_bias, caches[-1]

    def _pooled(
        self, hidden: torch.Tensor, pooling: Pooling, chat: ChatState, like: torch.Tensor
    ) -> torch.Tensor:
        """All hidden states [M, T, hidden] that no final layer has read yet, those of the run in
        the end: pooled, [1, T, hidden]."""
        if not hidden.shape[1]:
            return like[:, :0]
        known = 0
        for part in chat.unfinished:
            hidden[:, known : known + part.shape[1]] = part
            known += part.shape[1]
        chat.keep_hidden(hidden[:, known:])
        start = chat.final_length
        spans = [(first - start, end - start) for first, end in pooling.image_spans if end > start]
        pooling = replace(pooling, image_spans=spans, device=like.device)
        return self.mllm_layer_pooling.pool(hidden, pooling)[None]

    def _entry(self, insert_before: int | None) -> int:
        """The number of the decoder layer before which the reference tokens enter."""
        layers = len(self.multimodal_llm.model.layers) + len(self.mllm_final_layer.layers)
        return layers - (insert_before or len(self.mllm_final_layer.layers))

    def _with_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """[1, L, hidden] -> [1, L + N, hidden]"""
        # The parameter does not belong to a layer that casts, so it is cast here.
        return torch.cat((x, self.mllm_final_layer.reference_tokens.to(x)[None]), dim=1)

    def batch_reference_states(
        self,
        embeds: Sequence[torch.Tensor],
        pooling: Sequence[Pooling] | None = None,
    ) -> torch.Tensor:
        """`reference_states` [B, N, hidden] of several groups of any lengths, each [1, L, hidden].

        Each group is padded at its end; attention is causal, so that changes nothing.

        Args:
            pooling: of each group, as in `reference_states`, with one aggregation and the same
                factors; hidden states stay on the device and keep their gradients.
        """
        final, model = self.mllm_final_layer, self.multimodal_llm.model
        lengths = [e.shape[1] for e in embeds]
        x = pad_sequence([e[0] for e in embeds], batch_first=True)
        # A frozen body records nothing for the backward pass.
        trained = x.requires_grad or any(p.requires_grad for p in model.parameters())
        states: list[torch.Tensor] = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            position = rope(self.config, x.shape[1], x.device, x.dtype)
            for number in range(len(model.layers) + 1):
                if pooling is not None and number in self.mllm_layer_pooling.sizes.layers:
                    states.append(model.norm(x))
                if number < len(model.layers):
                    x = self._run([model.layers[number]], x, position, _no_step)
            rows: Sequence[torch.Tensor] = model.norm(x) if pooling is None else ()
        if pooling is not None:
            # All groups' tokens are pooled together.
            together = [torch.cat([s[b, :n] for b, n in enumerate(lengths)]) for s in states]
            joined = join_poolings(pooling, lengths)
            checkpointing = self.gradient_checkpointing
            rows = self.mllm_layer_pooling.pool(together, joined, checkpointing).split(lengths)
        tokens = final.reference_tokens.to(rows[0])
        groups = [torch.cat((rows[b][:n], tokens)) for b, n in enumerate(lengths)]
        x = pad_sequence(groups, batch_first=True)  # [B, longest + N, hidden]
        position = rope(self.config, x.shape[1], x.device, x.dtype)
        x = self._run(final.layers, x, position, _no_step)
        rows = [x[b, n : n + self.num_tokens] for b, n in enumerate(lengths)]
        return final.norm(torch.stack(rows))

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """[B, N, hidden] -> reference tokens [B, N, token_width]."""
        return self.image_proj_model(states)

    def _run(
        self, layers: Iterable[nn.Module], x: torch.Tensor, position: Rope, on_step: OnStep
    ) -> torch.Tensor:
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, position, use_reentrant=False)
            else:
                x = layer(x, position)
            on_step()
        return x
