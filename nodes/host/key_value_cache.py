"""Keys and values of reference tokens, computed once per tokens, device and dtype.

To ComfyUI they are small models of a run: it counts them, loads them beside the UNet, and unloads
them when it needs the memory or the user asks for it.
"""

from __future__ import annotations

import itertools
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...easyref_core.adapter.checkpoint import AdapterCheckpoint
from ...easyref_core.adapter.key_values import TokenKeyValues, project_tokens, projection_bytes
from ...easyref_core.errors import EasyRefError
from ...easyref_core.tokens.reference_tokens import ReferenceTokens
from .out_of_memory import lack_of_memory
from .patcher import new_patcher

BUDGET = 512 * 2**20
"""Bytes for the sets of one adapter that no run uses: twelve prompts in half precision."""

_CPU = torch.device("cpu")
_Key = tuple[torch.device, torch.dtype]


@dataclass
class _State:
    """Of one set, changed under `_runs_lock` or its store's lock.

    Attributes:
        last_use: number of the request; larger is later.
        runs: how many sampling runs use it.
    """

    last_use: int = 0
    runs: int = 0


_runs_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class HeldKeyValues(TokenKeyValues):
    """Keys and values that ComfyUI may unload; then they are copied from the CPU when used.

    Attributes:
        patcher: ComfyUI's handle on them.
        state: changes; see `_State`.
    """

    patcher: ModelPatcher
    state: _State = field(default_factory=_State)

    @property
    def nbytes(self) -> int:
        return self.patcher.model_size()


class KeyValueStore:
    """An adapter's keys and values of reference tokens: about 43 MB a prompt of SDXL in half
    precision.

    The most recent sets are cached within a budget as long as their tokens live; a set that a run
    holds stays available as long as the run. The projections themselves (341 million parameters)
    never stay in memory.

    Args:
        budget: bytes of the cached sets; the latest is cached whatever its size.
    """

    def __init__(self, checkpoint: AdapterCheckpoint, budget: int = BUDGET) -> None:
        self._checkpoint = checkpoint
        self._budget = budget
        self._lock = threading.Lock()
        self._clock = itertools.count(1)
        self._cached: weakref.WeakKeyDictionary[ReferenceTokens, dict[_Key, HeldKeyValues]] = (
            weakref.WeakKeyDictionary()
        )
        self._alive: weakref.WeakKeyDictionary[
            ReferenceTokens, weakref.WeakValueDictionary[_Key, HeldKeyValues]
        ] = weakref.WeakKeyDictionary()

    def get(
        self, tokens: ReferenceTokens, device: torch.device, dtype: torch.dtype
    ) -> HeldKeyValues:
        """Keys and values of `tokens`, computed on the first call; the same ones until no run
        holds them and newer ones have pushed them out of the budget.

        Raises:
            EasyRefError: see `project_tokens`; neither the device nor the CPU has room for them.
        """
        with self._lock:
            key = (_tensor_device(device), dtype)
            alive = self._alive.setdefault(tokens, weakref.WeakValueDictionary())
            held = alive.get(key)
            if held is None:
                held = alive[key] = self._build(tokens, device, dtype)
            held.state.last_use = next(self._clock)
            if key not in self._cached.setdefault(tokens, {}):
                self._cached[tokens][key] = held
                self._drop_oldest()
            return held

    def leave_devices(self) -> None:
        """Move the sets that no run uses to the CPU."""
        with self._lock, _runs_lock:
            for sets in list(self._cached.values()):
                for held in sets.values():
                    if held.state.runs == 0 and held.patcher.loaded_size() > 0:
                        held.patcher.detach()

    def _drop_oldest(self) -> None:
        """Drop what exceeds the budget. What a run holds stays alive with it."""
        cached = [
            (held.state.last_use, tokens, key, held.nbytes)
            for tokens, sets in self._cached.items()
            for key, held in sets.items()
        ]
        cached.sort(key=lambda entry: entry[0])
        total = sum(nbytes for *_, nbytes in cached)
        for _, tokens, key, nbytes in cached[:-1]:
            if total <= self._budget:
                break
            del self._cached[tokens][key]
            total -= nbytes

    def _build(
        self, tokens: ReferenceTokens, device: torch.device, dtype: torch.dtype
    ) -> HeldKeyValues:
        # Ordinary tensors even when nodes run in inference mode, so that a model being trained in
        # ComfyUI can use them too.
        with torch.inference_mode(False):
            projected = self._project(tokens, device, dtype)
            # On the CPU until ComfyUI loads them: only then are they counted.
            layers = {n: (_on(_CPU, k), _on(_CPU, v)) for n, (k, v) in projected.layers.items()}
            model = EasyRefKeyValues(layers)
            patcher = new_patcher(model, device, mm.unet_offload_device())
        return HeldKeyValues(_Layers(model, device), projected.batch, patcher)

    def _project(
        self, tokens: ReferenceTokens, device: torch.device, dtype: torch.dtype
    ) -> TokenKeyValues:
        needed = projection_bytes(self._checkpoint, tokens, dtype) / 1e6
        for place in dict.fromkeys((device, _CPU)):
            try:
                return project_tokens(self._checkpoint, tokens, place, dtype)
            except Exception as error:
                reason = lack_of_memory(error)
                if reason is None:
                    raise
            # Outside the except block, where the traceback no longer holds the tensors.
            mm.soft_empty_cache()
            if place != _CPU:
                logging.warning(
                    "EasyRef: %s has no room for keys and values of %d reference tokens (%.0f MB: "
                    "%s); they are computed on the CPU, which takes some seconds.",
                    device,
                    tokens.num_tokens,
                    needed,
                    reason,
                )
        raise EasyRefError(
            f"Not enough memory for the keys and values of {tokens.num_tokens} reference tokens, "
            f"{needed:.0f} MB ({reason}). Use fewer reference groups at once, or a smaller batch."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyValueStore:
        return self  # a cache is shared by every copy of the model that uses it


def _tensor_device(device: torch.device) -> torch.device:
    """A Mac's GPU is `mps` to ComfyUI and `mps:0` to the tensors on it."""
    return torch.empty(0, device=device).device


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.device == device else tensor.to(device)


@contextmanager
def in_use(sets: Sequence[HeldKeyValues]) -> Iterator[None]:
    """While a run uses them, sets stay on their device unless ComfyUI needs the memory."""
    with _runs_lock:
        for held in sets:
            held.state.runs += 1
    try:
        yield
    finally:
        with _runs_lock:
            for held in sets:
                held.state.runs -= 1


class EasyRefKeyValues(nn.Module):
    """Keys and values as ComfyUI moves them; its log calls them by this name.

    Args:
        layers: layer -> (key, value).
    """

    def __init__(self, layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.names = {name: number for number, name in enumerate(layers)}
        self.layers = nn.ModuleList(_Layer(*pair) for pair in layers.values())


class _Layer(nn.Module):
    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.key = nn.Parameter(key, requires_grad=False)
        self.value = nn.Parameter(value, requires_grad=False)


class _Layers(Mapping[str, tuple[torch.Tensor, torch.Tensor]]):
    """Layer -> (key, value) on the device; copied only where ComfyUI had no memory for them."""

    def __init__(self, model: EasyRefKeyValues, device: torch.device) -> None:
        self._model = model
        self._device = device

    def __getitem__(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._model.layers[self._model.names[name]]
        return self._copied(layer.key), self._copied(layer.value)

    def _copied(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            tensor = tensor.clone()  # a model in training keeps it for its backward pass
        return _on(self._device, tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.names)

    def __len__(self) -> int:
        return len(self._model.names)
