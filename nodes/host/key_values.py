"""Keys and values of reference tokens, computed once per tokens, device and dtype."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch

from ...easyref_core.adapter import TokenKeyValues, project_tokens
from ...easyref_core.checkpoint import AdapterCheckpoint
from ...easyref_core.tokens import ReferenceTokens

_Key = tuple[torch.device, torch.dtype]


class KeyValueStore:
    """Everything an adapter has made of reference tokens that are still in use.

    About 43 MB a prompt at real size in half precision; it goes when the tokens go. The
    projections themselves (341 million parameters) never stay in memory.
    """

    def __init__(self, checkpoint: AdapterCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._lock = threading.Lock()
        self._made: weakref.WeakKeyDictionary[ReferenceTokens, dict[_Key, TokenKeyValues]] = (
            weakref.WeakKeyDictionary()
        )

    def get(
        self, tokens: ReferenceTokens, device: torch.device, dtype: torch.dtype
    ) -> TokenKeyValues:
        """Keys and values of `tokens`; computed on the first call."""
        with self._lock:
            made = self._made.setdefault(tokens, {})
            key = (device, dtype)
            if key not in made:
                # Ordinary tensors even when nodes run in inference mode, so that a model being
                # trained in ComfyUI can use them too.
                with torch.inference_mode(False):
                    made[key] = project_tokens(self._checkpoint, tokens, device, dtype)
            return made[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> KeyValueStore:
        return self  # a cache is shared by every copy of the model that uses it
