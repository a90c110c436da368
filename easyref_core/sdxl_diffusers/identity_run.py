"""One run of a UNet with references: which call reads them anew, and which rows attend to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from ..adapter.identity import relative_error
from ..adapter.layer_weights import LayerWeights, check_groups
from ..adapter.stages import Window
from ..errors import EasyRefError
from ..untrusted import kind_of, whole_number
from .features import CallFeatures, LayerFeatures
from .identity_latents import IdentityLatents, NoisedLatents
from .reference_pass import Source, UNetCall, read_features
from .unet_layers import is_cross_attention, layer_groups

Features = dict[nn.Module, tuple[LayerFeatures, ...]]


def all_rows(count: int) -> Sequence[slice]:
    """Without guidance."""
    return [slice(0, count)]


@dataclass(frozen=True)
class _Row:
    """A row of a call that attends to references, and the number of their group."""

    number: int
    group: int


@dataclass(frozen=True, eq=False)
class _Read:
    """What a reference pass found.

    Attributes:
        states: the encoder states of the call, by which further calls of the run are known.
        rows: runs of the call's rows that attend to references.
        layers: features of each run.
    """

    states: torch.Tensor
    rows: tuple[slice, ...]
    layers: Features


class IdentityRun:
    """References for one run of a UNet: a call of a pipeline, or a step of training.

    All that changes during a run is in here; the UNet keeps nothing.

    Args:
        references: one group for all rows, or one for each prompt, whose rows follow one another. A
            group may be empty where others are not: its rows stay as they are.
        alphas_cumprod: of the noise schedule, [T].
        window: weight by place in the sampling; timestep t is at 1 - t / (T - 1).
        reuse_steps: how many steps a reference pass serves.
        layer_weights: factors of the weight.
        conditional: from the number of a call's rows to those that attend to the references; each
            slice holds rows of all prompts. All rows by default.

    Attributes:
        passes: how often the references were read so far.

    Raises:
        EasyRefError: no references; a value of another type or out of its range.
    """

    def __init__(
        self,
        references: IdentityLatents | Sequence[IdentityLatents],
        alphas_cumprod: torch.Tensor,
        window: Window | None = None,
        reuse_steps: int = 1,
        layer_weights: LayerWeights | None = None,
        conditional: Callable[[int], Sequence[slice]] = all_rows,
    ) -> None:
        several = isinstance(references, Sequence)
        groups = tuple(references) if several else (references,)
        if not groups or not all(isinstance(group, IdentityLatents) for group in groups):
            kinds = ", ".join(dict.fromkeys(map(kind_of, groups))) or "none"
            raise EasyRefError(
                f"The references are {kinds}; latents of references are needed, which "
                "encode_identity returns: one group for all prompts, or one for each."
            )
        self._groups = groups
        self._latents = NoisedLatents(groups, alphas_cumprod)
        self._window = Window() if window is None else window
        self._reuse_steps = whole_number(reuse_steps, "reuse_steps", low=1)
        self._layer_weights = LayerWeights() if layer_weights is None else layer_weights
        self._conditional = conditional
        self._layers: tuple[UNet2DConditionModel, dict[nn.Module, float]] | None = None
        self._read: _Read | None = None
        self._timestep: float | None = None  # of the last call
        self._served = 0  # steps, by what was read last
        self._errors: list[torch.Tensor] = []
        self.passes = 0

    @property
    def errors(self) -> list[float]:
        """How far reused keys and values were from new ones each time they were read anew, as
        |old - new| / |new| over all layers; empty where nothing was reused."""
        return [float(error) for error in self._errors]

    def layers(self, unet: UNet2DConditionModel) -> dict[nn.Module, float]:
        """Self-attention layers that attend to the references -> factor of the weight.

        Raises:
            EasyRefError: a weight for layers that the UNet does not have.
        """
        if self._layers is None or self._layers[0] is not unet:
            groups = {n: g for n, g in layer_groups(unet).items() if not is_cross_attention(n)}
            check_groups(self._layer_weights, groups.values(), type(unet).__name__)
            factors = {unet.get_submodule(n): self._layer_weights.of(g) for n, g in groups.items()}
            self._layers = unet, {attn: factor for attn, factor in factors.items() if factor}
        return self._layers[1]

    def features(self, unet: UNet2DConditionModel, call: UNetCall) -> CallFeatures | None:
        """What the call's rows attend to; None for nothing: outside the window, or at weight 0.

        Raises:
            EasyRefError: latents or rows that do not fit the call.
        """
        rows = self._rows(len(call.sample))
        timestep = float(call.timestep) if call.timestep.numel() == 1 else None
        weights = self._weights(call, rows, timestep)
        factors = self.layers(unet)
        if not any(weights) or not factors:
            self._read = None
            return None
        self._latents.check(call.sample)
        read, before = self._read, self._timestep
        known = read is not None and read.states is call.states and None not in (timestep, before)
        later = known and timestep < before
        self._timestep = timestep
        if later and self._served < self._reuse_steps:
            self._served += 1
        elif not known or timestep != before:  # else another call of the same step
            old = read if later and self._reuse_steps > 1 else None
            self._read = read = None  # freed before the pass, unless it is compared
            read = self._read_anew(unet, call, rows, weights, frozenset(factors))
            if old is not None:
                self._measure(old, read)
            self._served = 1
            self._read = read if timestep is not None else None
        return _weighted(read, call, rows, weights, factors)

    def _rows(self, count: int) -> list[_Row]:
        """The rows of a call that attend to references."""
        rows, groups = [], len(self._groups)
        for part in self._conditional(count):
            length = part.stop - part.start
            if length < groups or length % groups:
                raise EasyRefError(
                    f"The UNet was called with {length} conditional rows, which cannot be shared "
                    f"among {groups} groups of references. Pass one group, or one for each prompt."
                )
            rows += [_Row(part.start + n, n // (length // groups)) for n in range(length)]
        return rows

    def _weights(self, call: UNetCall, rows: Sequence[_Row], timestep: float | None) -> list[float]:
        """Of each row.

        Args:
            timestep: of all rows, None where each has its own.
        """
        if self._window.start <= 0 and self._window.end >= 1:
            weights = [self._window.weight] * len(rows)  # at every noise level
        elif timestep is not None:
            weights = [self._at(timestep)] * len(rows)
        else:
            listed = call.timestep.reshape(-1).tolist()
            weights = [self._at(listed[row.number]) for row in rows]
        return [
            weight if self._groups[row.group].latents else 0.0
            for weight, row in zip(weights, rows, strict=True)
        ]

    def _at(self, timestep: float) -> float:
        place = 1 - timestep / (self._latents.timesteps - 1)
        return self._window.at(min(max(place, 0.0), 1.0))

    def _read_anew(
        self,
        unet: UNet2DConditionModel,
        call: UNetCall,
        rows: Sequence[_Row],
        weights: Sequence[float],
        layers: frozenset[nn.Module],
    ) -> _Read:
        acting = [row for row, weight in zip(rows, weights, strict=True) if weight]
        sources = _sources(call, acting)
        noised = {source: self._latents.at(source, call) for source in _each_once(sources)}
        found = read_features(unet, call, noised, layers)
        runs = list(_runs(acting, sources, noised))
        features: Features = {}
        for attn in layers:
            features[attn] = tuple(
                found.of(attn, _each_once(sources[first:last])) for first, last in runs
            )
            del found.layers[attn]
        self.passes += 1
        numbers = [row.number for row in acting]
        shifted = (slice(numbers[first], numbers[last - 1] + 1) for first, last in runs)
        return _Read(call.states, tuple(shifted), features)

    def _measure(self, old: _Read, new: _Read) -> None:
        if old.rows == new.rows:
            pairs = (
                (getattr(new_run, name), getattr(old_run, name))
                for attn, new_runs in new.layers.items()
                for new_run, old_run in zip(new_runs, old.layers[attn], strict=True)
                for name in ("key", "value")
            )
            self._errors.append(relative_error(pairs))


def _weighted(
    read: _Read,
    call: UNetCall,
    rows: Sequence[_Row],
    weights: Sequence[float],
    factors: dict[nn.Module, float],
) -> CallFeatures:
    by_row = {row.number: weight for row, weight in zip(rows, weights, strict=True)}
    of_runs: list[float | torch.Tensor] = []
    for run in read.rows:
        own = [by_row[number] for number in range(run.start, run.stop)]
        same = len(set(own)) == 1
        of_runs.append(own[0] if same else call.sample.new_tensor(own).view(-1, 1, 1))
    return CallFeatures(read.rows, tuple(of_runs), read.layers, factors)


def _sources(call: UNetCall, rows: Sequence[_Row]) -> list[Source]:
    """Of each row; rows of one group with the same prompt at the same noise level have one."""
    alike = call.alike([row.number for row in rows])
    first: dict[tuple[int, int], int] = {}
    return [
        Source(first.setdefault((row.group, kind), row.number), row.group)
        for row, kind in zip(rows, alike, strict=True)
    ]


def _runs(
    rows: Sequence[_Row],
    sources: Sequence[Source],
    noised: Mapping[Source, Sequence[torch.Tensor]],
) -> Iterator[tuple[int, int]]:
    """Rows that follow one another and can attend together: all to one source, or each to one of
    its own with as many positions. First and last plus one, of `rows`."""
    first = 0

    def together(number: int) -> bool:
        own = sources[first : number + 1]
        different = len(set(own))
        return (
            rows[number].number == rows[number - 1].number + 1
            and different in (1, len(own))
            and len({sum(x[0].numel() for x in noised[source]) for source in own}) == 1
        )

    for number in range(1, len(rows) + 1):
        if number == len(rows) or not together(number):
            yield first, number
            first = number


def _each_once(sources: Sequence[Source]) -> list[Source]:
    return list(dict.fromkeys(sources))
