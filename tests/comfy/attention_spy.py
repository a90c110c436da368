"""Watches every cross-attention layer of a model, and computes by itself what EasyRef should do.

The rows of a model call are told apart by the text they carry, never by ComfyUI's bookkeeping
that the pack reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfyhost import Pack

Scale = float | torch.Tensor


@dataclass
class LayerRecord:
    """One layer during one model call.

    Attributes:
        layer: diffusers' name.
        context: [rows, L, W] text states.
        q, text: [rows, T, D], the query and the text's attention before `to_out`.
        out: [rows, T, D] after `to_out`.
        grid: (height, width) of the T positions.
    """

    layer: str
    context: torch.Tensor
    q: torch.Tensor
    text: torch.Tensor
    heads: int
    options: Mapping[str, Any]
    out: torch.Tensor | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(self.options["activations_shape"][-2:])


class Spy:
    """Records copies of one UNet. `max_error` computes with the UNet's weights, so it is called
    while the recorded model is still loaded.

    Attributes:
        records: every layer of every model call, in order.
    """

    def __init__(self, pack: Pack, easyref: Any, unet: Any) -> None:
        layers = pack.part("nodes.host.unet_layers").cross_attention_layers(unet)
        self._layers = {layer.block: name for name, layer in layers.items()}
        self._unet = unet.model.diffusion_model
        file = easyref.checkpoint.file
        weights = file.read({name: name for name in file.tensors})
        self._weights = {n: t.float() for n, t in weights.items() if n.startswith("unet.")}
        self._context: torch.Tensor | None = None
        self.records: list[LayerRecord] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        return self  # ComfyUI copies what stands in the model options

    def watch(self, model: Any) -> Any:
        """A copy of the model that this spy watches."""
        watched = model.clone()
        watched.set_model_attn2_patch(self._note_context)
        watched.set_model_attn2_output_patch(self._note_output)
        for block in self._layers:
            watched.set_model_attn2_replace(self._note_attention, *block)
        return watched

    @property
    def blocks(self) -> list[tuple[str, int, int]]:
        """ComfyUI's keys for attention replacements, of all layers."""
        return list(self._layers)

    def _note_context(self, n: Any, context: Any, value: Any, options: Any) -> tuple[Any, ...]:
        self._context = context
        return n, context, value

    def attend(self, q: Any, k: Any, v: Any, options: Any) -> torch.Tensor:
        """The text's attention: ComfyUI's own."""
        from comfy.ldm.modules.attention import optimized_attention

        precision = options["attn_precision"]
        return optimized_attention(q, k, v, options["n_heads"], attn_precision=precision)

    def _note_attention(self, q: Any, k: Any, v: Any, options: Any) -> torch.Tensor:
        text = self.attend(q, k, v, options)
        layer = self._layers[(*options["block"], options["block_index"])]
        heads = options["n_heads"]
        self.records.append(LayerRecord(layer, self._context, q, text, heads, dict(options)))
        return text

    def _note_output(self, n: torch.Tensor, options: Any) -> torch.Tensor:
        self.records[-1].out = n
        return n

    def references(self, record: LayerRecord, tokens: torch.Tensor) -> torch.Tensor:
        """The layer's attention to reference tokens [rows, N, W]: [rows, T, D]."""

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (record.heads, -1)).transpose(1, 2)

        key, value = (
            F.linear(
                tokens.to(record.q),
                self._weights[f"unet.{record.layer}.processor.{p}.weight"],
            )
            for p in ("to_k_ip", "to_v_ip")
        )
        scores = split(record.q) @ split(key).mT * split(key).shape[-1] ** -0.5
        return (scores.softmax(-1) @ split(value)).transpose(1, 2).flatten(2)

    def to_out(self, record: LayerRecord, hidden: torch.Tensor) -> torch.Tensor:
        block, number, index = next(b for b, name in self._layers.items() if name == record.layer)
        blocks = {"input": "input_blocks", "output": "output_blocks", "middle": "middle_block"}
        place = "1" if block == "middle" else f"{number}.1"
        path = f"{blocks[block]}.{place}.transformer_blocks.{index}.attn2.to_out"
        return self._unet.get_submodule(path)(hidden)

    def max_error(
        self,
        truth: Sequence[tuple[torch.Tensor, torch.Tensor]],
        scale: Scale | Callable[[LayerRecord], Scale] = 1.0,
    ) -> float:
        """The largest difference between the layers' outputs and the definition.

        Args:
            truth: (text states, the reference tokens [groups, N, W] that rows with this text get).
            scale: of the references, for a layer a number or a tensor [rows, T, 1].
        """
        assert self.records, "no cross-attention layer ran"
        worst = 0.0
        for record in self.records:
            refs = self.references(record, _rows(record.context, truth))
            factor = scale(record) if callable(scale) else scale
            expected = self.to_out(record, record.text + factor * refs)
            worst = max(worst, float((record.out - expected).abs().max()))
        return worst

    def texts(self, *known: torch.Tensor) -> list[tuple[int, ...]]:
        """For every model call, the numbers of the known texts that its rows carry, in order."""
        first = [s for s in self.records if s.layer == self.records[0].layer]
        return [tuple(_which(row, known) for row in record.context) for record in first]


def _which(context: torch.Tensor, known: Sequence[torch.Tensor]) -> int:
    """Which of the texts a row's context is."""
    result = [i for i, states in enumerate(known) if torch.equal(context, states[0].to(context))]
    assert len(result) == 1, f"a row carries {len(result)} of the known texts"
    return result[0]


def _rows(
    context: torch.Tensor, truth: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """[rows, N, W]: the tokens of each row's text, the n-th group for the n-th of its rows."""
    count = [0] * len(truth)
    rows = []
    for row in context:
        number = _which(row, [states for states, _ in truth])
        groups = truth[number][1]
        rows.append(groups[count[number] % len(groups)])
        count[number] += 1
    return torch.stack(rows)
