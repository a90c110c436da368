"""What is kept from one encoding to the next, in memory of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

import torch

from .chat_state import ChatPart, ChatState
from .encoder import EasyRefEncoder
from .group import GroupPlan, MllmPass, Segment

REFERENCES = 64
"""Pictures of a usual size whose keys and values fit by default."""
_SEGMENT = 146  # tokens of a picture of 336 pixels, and the two around it


class _Sized(Protocol):
    nbytes: int


Item = TypeVar("Item", bound=_Sized)


class LruCache(Generic[Item]):
    """The most recently used values, up to so many bytes in all."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._items: OrderedDict[bytes, Item] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self._items.values())

    def get(self, key: bytes) -> Item | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, value: Item) -> None:
        self.add(key, value)
        self.trim()

    def add(self, key: bytes, value: Item) -> None:
        """`put` without dropping anything yet."""
        self._items[key] = value
        self._items.move_to_end(key)

    def trim(self) -> None:
        """Drop what was not used for longest, down to the budget."""
        excess = self.nbytes - self.budget
        while excess > 0:
            excess -= self._items.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._items.clear()


class EncodingCache:
    """What encoding the same pictures again need not compute. Belongs to one encoder; all tensors
    are on the CPU.

    Args:
        image_features: bytes of the vision tower's results, whatever their order. The default
            holds every group that fits the MLLM's context at real size (32,768 tokens of width 1536
            in float32): of a larger group, each picture would be dropped just before it is used
            again.
        prefixes: bytes of what the layers gave for the beginnings of chats, see `ChatState`. None
            for 64 pictures of 336 pixels: at real size, in half precision, 0.3 GB, and 1.1 GB
            where layers are pooled.
        tokens: bytes of the reference tokens of whole passes.
    """

    def __init__(
        self,
        image_features: int = 256 * 2**20,
        prefixes: int | None = None,
        tokens: int = 64 * 2**20,
    ) -> None:
        self.image_features = LruCache[torch.Tensor](image_features)
        self.tokens = LruCache[torch.Tensor](tokens)
        self._prefixes = prefixes
        self._pictures = LruCache[torch.Tensor](0)
        self._prompts = LruCache[torch.Tensor](0)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        kept = (self.image_features, self.tokens, self._pictures, self._prompts)
        return sum(cache.nbytes for cache in kept)

    def clear(self) -> None:
        """Drop everything."""
        for cache in (self.image_features, self.tokens, self._pictures, self._prompts):
            cache.clear()

    def begin(
        self, encoder: EasyRefEncoder, plan: GroupPlan, mllm_pass: MllmPass
    ) -> ChatState | None:
        """The state of a chat, as far as it is known; None where none is kept."""
        if self._prefixes == 0:
            return None
        budget = self._prefixes or REFERENCES * _SEGMENT * _bytes_per_token(encoder, plan)
        self._pictures.budget = max(self._pictures.budget, budget)
        self._prompts.budget = self._pictures.budget // 32  # about five prompts
        parts = []
        for segment in mllm_pass.segments:
            items = self._items(segment)
            body, hidden, final = (items.get(kind + segment.key) for kind in _kinds(plan))
            hidden = hidden if plan.pooled else None
            if body is None or (hidden if plan.pooled else final) is None:
                break
            parts.append(ChatPart(body, hidden, final))
        return ChatState(encoder.config, len(encoder.mllm_final_layer.layers), parts)

    def keep(self, plan: GroupPlan, mllm_pass: MllmPass, chat: ChatState) -> None:
        """Keep what a run of the chat computed; what was not used for longest is dropped."""
        first, found = 0, []
        for segment in mllm_pass.segments:
            found.append((segment, chat.part(first, segment.end)))
            first = segment.end
        # The beginning last, as nothing after it is of use without it.
        for segment, part in reversed(found):
            items = self._items(segment)
            new = (part.body, part.hidden, part.final)
            for kind, tensor in zip(_kinds(plan), new, strict=True):
                if tensor is None:
                    items.get(kind + segment.key)  # it was used just now
                else:
                    items.add(kind + segment.key, tensor)
        # Only now: otherwise the end of a long chat would push out its own beginning.
        self._pictures.trim()
        self._prompts.trim()

    def _items(self, segment: Segment) -> LruCache[torch.Tensor]:
        return self._pictures if segment.picture else self._prompts


def _kinds(plan: GroupPlan) -> tuple[bytes, bytes, bytes]:
    """Of keys, for the tensors of a `ChatPart`."""
    return b"body ", b"hidden ", b"final " + plan.pooling_key


def _bytes_per_token(encoder: EasyRefEncoder, plan: GroupPlan) -> int:
    config, pools = encoder.config, encoder.mllm_layer_pooling
    numbers = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    if plan.pooled and pools is not None:
        numbers += len(pools.sizes.layers) * config.hidden_size
    return numbers * encoder.compute_dtype.itemsize
