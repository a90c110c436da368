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
from ..qwen2vl.decoder import Rope, rope
from ..qwen2vl.prompt import TokenizedPrompt
from .final_layers import FinalLayers, Projector
from .layer_pooling import HiddenStates, LayerPools, Pooling, join_poolings

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

    def encode_image(self, patches: Patches, device: torch.device) -> torch.Tensor:
        """Image features [n, hidden] of one picture of n image tokens."""
        pixels = patches.pixels[None].to(device, self.compute_dtype)
        return self.multimodal_llm.visual(pixels, patches.rows, patches.columns)[0]

    def encode_images(
        self, pictures: Sequence[Patches], device: torch.device
    ) -> list[torch.Tensor]:
        """Image features [n, hidden] of each picture; pictures of one grid share a pass."""
        grids: dict[tuple[int, int], list[int]] = {}
        for number, picture in enumerate(pictures):
            grids.setdefault((picture.rows, picture.columns), []).append(number)
        features: dict[int, torch.Tensor] = {}
        for grid, numbers in grids.items():
            pixels = torch.stack([pictures[n].pixels for n in numbers])
            encoded = self.multimodal_llm.visual(pixels.to(device, self.compute_dtype), *grid)
            features |= dict(zip(numbers, encoded, strict=True))
        return [features[number] for number in range(len(pictures))]

    def embed(
        self, chat: TokenizedPrompt, features: Sequence[torch.Tensor], device: torch.device
    ) -> torch.Tensor:
        """The language model's input [1, L, hidden]: word embeddings and image features."""
        ids = chat.ids.to(device)
        return self.multimodal_llm.embed(ids, chat.image_spans, features, self.compute_dtype)

    def body_states(self, embeds: torch.Tensor, on_step: OnStep = _no_step) -> torch.Tensor:
        """Hidden states after the body's norm ("penultimate"): [B, L, hidden], like `embeds`."""
        model = self.multimodal_llm.model
        position = rope(self.config, embeds.shape[1], embeds.device, embeds.dtype)
        return model.norm(self._run(model.layers, embeds, position, on_step))

    def hidden_states(
        self,
        embeds: torch.Tensor,
        insert_before: int | None = None,
        on_step: OnStep = _no_step,
    ) -> HiddenStates:
        """The hidden states that the adapter's layer pooling reads, for `reference_states`.

        They depend neither on the pools nor on weights of layers. Arguments as there.
        """
        length, layers = embeds.shape[1], self.mllm_layer_pooling.sizes.layers
        states = torch.empty((len(layers), length, embeds.shape[2]), dtype=embeds.dtype)

        def keep(number: int, x: torch.Tensor) -> None:
            if number in layers:
                normed = self.multimodal_llm.model.norm(x[:, :length])
                states[layers.index(number)] = normed[0].cpu()

        x = self._run_body(embeds, insert_before, on_step, keep)
        tokens = self.multimodal_llm.model.norm(x[:, length:]).cpu()
        return HiddenStates(states, tokens if tokens.shape[1] else None)

    def reference_states(
        self,
        embeds: torch.Tensor | HiddenStates,
        insert_before: int | None = None,
        column_bias: torch.Tensor | None = None,
        on_step: OnStep = _no_step,
        pooling: Pooling | None = None,
    ) -> torch.Tensor:
        """Hidden states [1, N, hidden] of the reference tokens after the final norm.

        Args:
            embeds: the language model's input [1, L, hidden], or what `hidden_states` gave for it
                and the same `insert_before`, so that no layer of the body runs again.
            insert_before: the tokens enter before this many last layers (paper, Table 4); None for
                where they were trained. As attention is causal, nothing before them changes.
            column_bias: [L] added to the tokens' attention logits in the very last layer.
            on_step: called after each layer.
            pooling: pools hidden states of many layers, which the final layers read in place of
                the body's last; None for that one.
        """
        x, position, bias = self._last_layer_inputs(
            embeds, insert_before, column_bias, on_step, pooling
        )
        final = self.mllm_final_layer
        x = final.layers[-1](x, position, queries=self.num_tokens, bias=bias)
        on_step()
        return final.norm(x)

    def reference_attention(
        self,
        embeds: torch.Tensor | HiddenStates,
        insert_before: int | None = None,
        column_bias: torch.Tensor | None = None,
        on_step: OnStep = _no_step,
        pooling: Pooling | None = None,
    ) -> torch.Tensor:
        """Attention probabilities of the reference tokens in the very last layer: [N, L + N]
        float32, the mean of all heads; each row adds up to 1. See `reference_states`."""
        x, position, bias = self._last_layer_inputs(
            embeds, insert_before, column_bias, on_step, pooling
        )
        last = self.mllm_final_layer.layers[-1]
        probabilities = last.attention(x, position, queries=self.num_tokens, bias=bias)
        on_step()
        return probabilities[0]

    def _run_body(
        self,
        embeds: torch.Tensor,
        insert_before: int | None,
        on_step: OnStep,
        seen: Callable[[int, torch.Tensor], None] = lambda number, x: None,
    ) -> torch.Tensor:
        """States before the body's norm: [1, L, hidden], or [1, L + N, hidden] with the reference
        tokens where they enter inside the body.

        Args:
            seen: given the number of each hidden state (0: the input), and the states.
        """
        layers, x = self.multimodal_llm.model.layers, embeds
        length = embeds.shape[1] + self.num_tokens
        position = rope(self.config, length, embeds.device, embeds.dtype)
        for number, layer in enumerate(layers):
            seen(number, x)
            if number == self._entry(insert_before):
                x = self._with_tokens(x)
            x = self._run([layer], x, position, on_step)
        seen(len(layers), x)
        return x

    def _last_layer_inputs(
        self,
        embeds: torch.Tensor | HiddenStates,
        insert_before: int | None,
        column_bias: torch.Tensor | None,
        on_step: OnStep,
        pooling: Pooling | None,
    ) -> tuple[torch.Tensor, Rope, torch.Tensor | None]:
        """Hidden states [1, L + N, hidden] before the very last layer, positions, bias [L + N]."""
        if pooling is None:
            x = self.multimodal_llm.model.norm(self._run_body(embeds, insert_before, on_step))
        else:
            hidden = embeds
            if not isinstance(hidden, HiddenStates):
                hidden = self.hidden_states(embeds, insert_before, on_step)
                pooling = replace(pooling, device=pooling.device or embeds.device)
            x = self.mllm_layer_pooling.pool(hidden.states, pooling)[None]
            if hidden.tokens is not None:
                x = torch.cat((x, hidden.tokens.to(x)), dim=1)
        final, body_layers = self.mllm_final_layer, len(self.multimodal_llm.model.layers)
        entry = self._entry(insert_before)
        length = x.shape[1] if entry < body_layers else x.shape[1] + self.num_tokens
        position = rope(self.config, length, x.device, x.dtype)
        for number, layer in enumerate(final.layers, body_layers):
            if number == entry:
                x = self._with_tokens(x)
            if number < body_layers + len(final.layers) - 1:
                x = self._run([layer], x, position, on_step)
        if column_bias is not None:
            column_bias = nn.functional.pad(column_bias, (0, self.num_tokens))
        return x, position, column_bias

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
