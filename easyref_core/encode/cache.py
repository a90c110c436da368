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
_PROMPTS = 16  # what follows the pictures gets one of so many parts: at real size ten prompts
# Image features of any group that fits the MLLM's context at real size (32,768 tokens of
# width 1536 in float32): of a larger one, each picture would be dropped just before its next use.
_IMAGE_FEATURES = 256 * 2**20
_TOKENS = 64 * 2**20


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
        return sum(item.nbytes for item in list(self._items.values()))

    def get(self, key: bytes) -> Item | None:
        if key in self._items:
            self._items.move_to_end(key)
        return self._items.get(key)

    def put(self, key: bytes, value: Item) -> None:
        """Keep a value, unless it is larger than all that may be kept."""
        self.add(key, value)
        self.trim()

    def add(self, key: bytes, value: Item) -> None:
        """`put` without dropping anything yet."""
        if value.nbytes <= self.budget:
            self._items[key] = value
            self._items.move_to_end(key)

    def trim(self, room: int = 0) -> None:
        """Drop what was not used for longest, down to the budget, less some room."""
        excess = self.nbytes + room - self.budget
        while excess > 0 and self._items:
            excess -= self._items.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._items.clear()


class EncodingCache:
    """What encoding the same pictures again need not compute. Belongs to one encoder; all tensors
    are on the CPU.

    Args:
        image_features: bytes of the vision tower's results, whatever their order.
        prefixes: bytes of what the layers gave for the beginnings of chats, see `ChatState`. None
            for 64 pictures of 336 pixels: at real size, in half precision, 0.3 GB, and 1.1 GB
            where layers are pooled.
        tokens: bytes of the reference tokens of whole passes.
    """

    def __init__(
        self,
        image_features: int = _IMAGE_FEATURES,
        prefixes: int | None = None,
        tokens: int = _TOKENS,
    ) -> None:
        self.image_features = LruCache[torch.Tensor](image_features)
        self.tokens = LruCache[torch.Tensor](tokens)
        self._prefixes = prefixes
        self._pictures = LruCache[torch.Tensor](0)
        self._prompts = LruCache[torch.Tensor](0)

    @classmethod
    def within(cls, budget: int) -> EncodingCache:
        """One of which no part takes more bytes than that; 0 keeps nothing."""
        return cls(min(_IMAGE_FEATURES, budget), budget, min(_TOKENS, budget))

    @property
    def nbytes(self) -> int:
        """Of all that is kept but tokens, which encoders may share."""
        kept = (self.image_features, self._pictures, self._prompts)
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
        pools, layers = encoder.mllm_layer_pooling, len(encoder.mllm_final_layer.layers)
        pooled = len(pools.sizes.layers) if plan.pooled and pools is not None else 0
        per_token = _bytes_per_token(encoder, pooled)
        # One picture more for the system text, and one for the black picture.
        budget = self._prefixes or (REFERENCES + 2) * _SEGMENT * per_token
        self._pictures.budget = max(self._pictures.budget, budget)
        self._prompts.budget = self._pictures.budget // _PROMPTS
        known = self._known(plan, mllm_pass)
        new = self._new(mllm_pass, len(known), per_token)
        # Now, so that with what the run adds there is never more than may be kept.
        pictures = sum(s.picture for s in mllm_pass.segments[len(known) :][: len(new)])
        self._pictures.trim(sum(new[:pictures]) * per_token)
        self._prompts.trim(sum(new[pictures:]) * per_token)
        try:
            return ChatState(encoder.config, layers, known, new, pooled, encoder.compute_dtype)
        except (MemoryError, RuntimeError):  # where the system gives no more memory than it has
            return None

    def known_length(self, plan: GroupPlan, mllm_pass: MllmPass) -> int:
        """Tokens of a chat's beginning that the body's layers need not run again."""
        return sum(part.length for part in self._known(plan, mllm_pass))

    def _known(self, plan: GroupPlan, mllm_pass: MllmPass) -> list[ChatPart]:
        found = []
        for segment in mllm_pass.segments:
            items = self._items(segment)
            body, hidden, final = (items.get(kind + segment.key) for kind in _kinds(plan))
            hidden = hidden if plan.pooled else None
            if body is None or (hidden if plan.pooled else final) is None:
                break
            found.append(ChatPart(body, hidden, final))
        return found

    def _new(self, mllm_pass: MllmPass, known: int, per_token: int) -> list[int]:
        """Tokens of each segment behind the known ones, as far as they may be kept."""
        segments = mllm_pass.segments
        first = segments[known - 1].end if known else 0
        found = []
        for segment in segments[known:]:
            tokens = segment.end if segment.picture else segment.end - first
            if tokens * per_token > self._items(segment).budget:
                break
            found.append(segment.end - first)
            first = segment.end
        return found

    def keep(self, plan: GroupPlan, mllm_pass: MllmPass, chat: ChatState) -> None:
        """Keep what a run of the chat computed; what was not used for longest is dropped."""
        # The beginning last, as nothing after it is of use without it.
        for segment, part in reversed([*zip(mllm_pass.segments, chat.parts, strict=False)]):
            items = self._items(segment)
            new = (part.body, part.hidden, part.final)
            for kind, tensor in zip(_kinds(plan), new, strict=True):
                if tensor is None:
                    items.get(kind + segment.key)  # kept for other plans, and used just now
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


def _bytes_per_token(encoder: EasyRefEncoder, pooled: int) -> int:
    """Of a `ChatPart`, with the hidden states of so many layers."""
    config = encoder.config
    numbers = config.num_layers * 2 * config.num_kv_heads * config.head_dim
    return (numbers + pooled * config.hidden_size) * encoder.compute_dtype.itemsize
