"""The reference pass: what a UNet's self-attention layers make of the references' noised latents.

The pass is without gradients, in training too. What is trained for identity is a LoRA on keys and
values of the features, which stands behind the pass and gets its whole gradient from the sample's
own pass; gradients through the features would reach base weights, which are frozen, and would
double the memory of a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..adapter.identity import passes
from .features import LayerFeatures, Recording
from .layers import IDENTITY

_ROWS = 4  # of a pass, where the call has fewer


@dataclass(frozen=True, eq=False)
class UNetCall:
    """A UNet's arguments that a reference pass takes over, of the B rows of the call.

    Attributes:
        sample: [B, C, h, w].
        timestep: one number for all rows, or [B].
        states: encoder states [B, T, W].
        added: added_cond_kwargs: tensors [B, ...], or lists of such.
        timestep_cond: [B, D] or None.
        scale: of other LoRAs, as in cross_attention_kwargs; None where it is not given.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    states: torch.Tensor
    added: Mapping[str, Any]
    timestep_cond: torch.Tensor | None = None
    scale: float | None = None

    def of_rows(self, rows: torch.Tensor) -> dict[str, Any]:
        """Arguments for these rows of the call, but for the sample."""

        def chosen(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [chosen(v) for v in value]
            return value.index_select(0, rows) if isinstance(value, torch.Tensor) else value

        times = self.timestep.reshape(-1)
        return {
            "timestep": times.expand(len(rows)) if len(times) == 1 else chosen(times),
            "encoder_hidden_states": chosen(self.states),
            "timestep_cond": chosen(self.timestep_cond),
            "added_cond_kwargs": {name: chosen(value) for name, value in self.added.items()},
        }

    def alike(self, rows: Sequence[int]) -> list[int]:
        """For each of these rows the first of them with the same arguments, the sample aside.

        Rows at noise levels of their own, as in training, count as different.
        """
        if len(rows) == 1 or self.timestep.numel() > 1:
            return list(range(len(rows)))
        index = torch.tensor(rows, device=self.sample.device)
        arguments = self.of_rows(index)
        added = arguments["added_cond_kwargs"].values()
        values = [arguments["encoder_hidden_states"], arguments["timestep_cond"], *added]
        flat = [v for x in values for v in (x if isinstance(x, list) else [x])]
        columns = [v.flatten(1) for v in flat if isinstance(v, torch.Tensor)]
        same = torch.stack(
            [torch.stack([(x == x[n]).all(1) for x in columns]).all(0) for n in range(len(rows))]
        )  # [rows, rows]
        return [row.index(True) if True in row else n for n, row in enumerate(same.tolist())]


@dataclass(frozen=True)
class Source:
    """References that rows of a call attend to.

    Attributes:
        row: of the call, whose prompt and noise level the references get.
        group: number of the group of references.
    """

    row: int
    group: int


@dataclass(frozen=True, eq=False)
class ReadFeatures:
    """What the reference passes of a call found.

    Attributes:
        layers: features in each layer, one for each pass, [references, S, C].
        places: of each source's references in order, pass and row.
    """

    layers: dict[nn.Module, list[LayerFeatures]]
    places: Mapping[Source, Sequence[tuple[int, int]]]

    def of(self, attn: nn.Module, sources: Sequence[Source]) -> LayerFeatures:
        """[sources, S, C] in a layer, S positions of a source's references in order."""
        found = self.layers[attn]
        places = [place for source in sources for place in self.places[source]]
        number, first = places[0]
        if places == [(number, first + n) for n in range(len(places))]:  # without a copy
            return found[number].each(
                lambda x: x[first : first + len(places)].reshape(len(sources), -1, x.shape[-1])
            )
        rows = []
        for source in sources:
            own = [found[n].each(lambda x, r=row: x[r : r + 1]) for n, row in self.places[source]]
            rows.append(LayerFeatures.joined(own, dim=1))
        return LayerFeatures.joined(rows, dim=0)


def read_features(
    unet: UNet2DConditionModel,
    call: UNetCall,
    noised: Mapping[Source, Sequence[torch.Tensor]],
    wanted: frozenset[nn.Module],
) -> ReadFeatures:
    """Read references; latents of one size share a pass, over all sources, as far as it needs no
    more memory than the call itself or than a few references.

    Args:
        noised: latents [C, h, w] of each source at its row's noise level.
        wanted: layers.
    """
    items = [(source, latent) for source, latents in noised.items() for latent in latents]
    layers: dict[nn.Module, list[LayerFeatures]] = {attn: [] for attn in wanted}
    place: dict[int, tuple[int, int]] = {}
    most = max(_ROWS, len(call.sample))
    alike = passes([(x.shape[-1], x.shape[-2]) for _, x in items])
    chunks = [same[n : n + most] for same in alike for n in range(0, len(same), most)]
    for number, members in enumerate(chunks):
        place |= {item: (number, row) for row, item in enumerate(members)}
        sample = torch.stack([items[item][1] for item in members]).to(call.sample)
        rows = torch.tensor([items[item][0].row for item in members], device=sample.device)
        recording = Recording(wanted, torch.is_grad_enabled())
        options = {IDENTITY: recording} | ({} if call.scale is None else {"scale": call.scale})
        with _without_gradients(sample.device.type):
            # `forward`: hooks of the UNet are for the sample's own pass.
            unet.forward(
                sample, cross_attention_kwargs=options, return_dict=False, **call.of_rows(rows)
            )
        for attn, features in recording.layers.items():
            layers[attn].append(features)
    numbers = iter(range(len(items)))
    places = {source: [place[next(numbers)] for _ in latents] for source, latents in noised.items()}
    return ReadFeatures(layers, places)


@contextmanager
def _without_gradients(device: str) -> Iterator[None]:
    """No gradients, and none lost: autocast of older versions of torch hands the copies of weights
    that it makes here, which have no gradients, to the pass that follows."""
    autocast: Any = nullcontext()
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        autocast = torch.autocast(device, dtype=dtype, cache_enabled=False)
    with torch.no_grad(), autocast:
        yield
