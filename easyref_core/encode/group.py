"""A group of references, and the plan for encoding it.

`easyref` lets the MLLM encode all images and the prompt together (arXiv 2412.09618, section 3.2).
`dla` and `lap` do too, and pool the hidden states of its layers where `easyref` reads the last (see
`layer_pooling.py`). `average` and `concatenate` are the first paper's baselines, which encode each
image alone.

A group is planned once, from sizes alone and before weights are read. Whatever cannot be encoded
is refused here; encoding, inspection, progress bars and memory estimates read the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image

from ..adapter.layer_pooling import POOLS
from ..errors import EasyRefError
from ..pictures.loading import decoding, named, to_rgb
from ..pictures.preprocessing import Patches, black_picture, preprocess
from ..pictures.sizes import FACTOR, MIN_IMAGE_SIZE, plan_sizes
from ..qwen2vl.memory import working_bytes
from ..qwen2vl.prompt import PromptTokenizer, TokenizedPrompt
from ..untrusted import number, shown, text, whole_number
from .check_group import check_length, check_pooling
from .layer_pooling import pooling_bytes
from .mllm_layers import MllmLayerWeights
from .plan_encoder import EncoderPlan

BASELINES = ("average", "concatenate")
AGGREGATIONS = ("easyref", *POOLS, *BASELINES)
MAX_INSERTION = 3


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture of a group.

    Attributes:
        picture: any size; made RGB where it is not.
        weight: multiplies the attention (before normalisation) that the reference tokens pay to
            this picture in the final layer; 1 changes nothing, 0 removes the picture there.
        name: for messages.

    Raises:
        EasyRefError: no picture, one that cannot be decoded, or a weight below 0 or not finite.
    """

    picture: Image.Image
    weight: float = 1.0
    name: str = "the picture"

    def __post_init__(self) -> None:
        name, picture = text(self.name, "The name of a reference"), self.picture
        weight = number(
            self.weight, f"{name}: the weight", low=0, hint="It multiplies the picture's attention."
        )
        object.__setattr__(self, "weight", weight)
        if not isinstance(picture, Image.Image):
            raise EasyRefError(
                f"{name} is {shown(picture)}; a picture is needed, such as open_picture gives."
            )
        with decoding(name):
            picture.load()
        if picture.mode != "RGB":
            object.__setattr__(self, "picture", to_rgb(picture, name))

    @cached_property
    def key(self) -> bytes:
        """Tells its pixels from all others."""
        digest = hashlib.sha256(f"{self.picture.size} ".encode())
        digest.update(self.picture.tobytes())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class PlannedImage:
    """A reference as the vision tower encodes it.

    Attributes:
        image_size: the official `cond_image_size`, in pixels.
        rows, columns: grid of its image tokens.
    """

    reference: Reference
    image_size: int
    rows: int
    columns: int

    @property
    def num_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def key(self) -> bytes:
        """Cache key of its image features: pixels and size."""
        return f"{self.image_size} ".encode() + self.reference.key

    def patches(self) -> Patches:
        return preprocess(self.reference.picture, self.image_size)


@dataclass(frozen=True)
class Segment:
    """A stretch of a chat, from the end of the one before it.

    Attributes:
        key: cache key of the chat up to its end.
        end: position after its last token.
        picture: whether it ends with a picture; the last one, with the prompt, does not.
    """

    key: bytes
    end: int
    picture: bool


@dataclass(frozen=True, eq=False)
class MllmPass:
    """One pass of the MLLM.

    Attributes:
        chat: token ids, and the positions of images and prompt among them.
        images: in order.
        weights: of the images in the reference tokens' attention.
    """

    chat: TokenizedPrompt
    images: tuple[PlannedImage, ...]
    weights: tuple[float, ...]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The chat up to the end of each picture, and the rest."""
        ends = [end for _, end in self.chat.image_spans]
        key, first, found = b"", 0, []
        for end, image in zip((*ends, len(self.chat)), (*self.images, None), strict=True):
            digest = hashlib.sha256(key + self.chat.ids[first:end].numpy().tobytes())
            digest.update(image.key if image is not None else b"")
            key, first = digest.digest(), end
            found.append(Segment(key, end, image is not None))
        return tuple(found)


Known = Callable[[MllmPass], int]
"""How many tokens of a pass's beginning need not run again."""


def nothing_known(mllm_pass: MllmPass) -> int:
    return 0


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """All that is known of a group before weights are read.

    Attributes:
        encoder: the plan of the encoder.
        insert_before: the reference tokens enter before this many last layers.
        passes: over the references; one for each picture for the baselines, else one.
        unconditional: the pass over the negatives.
        mllm_layers: weights of the layers that `dla` and `lap` pool; None for those as trained.
    """

    encoder: EncoderPlan
    references: tuple[Reference, ...]
    prompt: str
    aggregation: str
    insert_before: int
    passes: tuple[MllmPass, ...]
    unconditional: MllmPass
    mllm_layers: MllmLayerWeights | None = None

    @property
    def pooled(self) -> bool:
        """Whether hidden states of many layers are pooled."""
        return self.aggregation in POOLS

    @property
    def steps(self) -> int:
        """Progress steps of encoding: one for each picture, and one for each layer of a pass."""
        return sum(len(p.images) + self.encoder.config.num_layers for p in self._all_passes)

    @property
    def pooling_key(self) -> bytes:
        """Cache key of how hidden states are pooled; empty where they are not."""
        layers = self.mllm_layers
        factors = layers and (layers.preset, layers.text, layers.picture)
        return f"{self.aggregation} {factors}".encode() if self.pooled else b""

    def tokens_key(self, mllm_pass: MllmPass) -> bytes:
        """Cache key of the reference tokens of a pass."""
        attention = self.mllm_layers and self.mllm_layers.attention
        settings = f"{self.insert_before} {[*map(float, mllm_pass.weights)]} {attention} "
        return settings.encode() + self.pooling_key + mllm_pass.segments[-1].key

    @property
    def key(self) -> bytes:
        """Tells the tokens of this plan from those of any other."""
        weights = [float(reference.weight) for reference in self.references]
        settings = f"{self.encoder.identity} {self.aggregation} {weights} {self.prompt}"
        passes = b"".join(self.tokens_key(mllm_pass) for mllm_pass in self._all_passes)
        return hashlib.sha256(settings.encode() + passes).digest()

    def working_bytes(
        self,
        dtype: torch.dtype,
        fused: bool,
        known: Known = nothing_known,
    ) -> int:
        """The most memory that encoding takes beside the weights; see `memory.working_bytes`.

        Hidden states to be pooled lie on the CPU, and are pooled in chunks.

        Args:
            known: of what an earlier encoding left. Inspecting takes more than that.
        """
        config, num_tokens = self.encoder.config, self.encoder.checkpoint.num_tokens
        found = 0
        for p in self._all_passes:
            length, start = len(p.chat), known(p)
            spans = zip(p.images, p.chat.image_spans, strict=True)
            images = [image.num_tokens for image, (first, _) in spans if first >= start]
            sizes = images, length + num_tokens, dtype, fused, start
            found = max(found, working_bytes(config, *sizes))
            if self.pooled:
                sizes = self.encoder.pooling
                found = max(found, pooling_bytes(config.hidden_size, sizes, length, dtype, fused))
        return found

    @property
    def _all_passes(self) -> tuple[MllmPass, ...]:
        return (*self.passes, self.unconditional)


def plan_group(
    encoder: EncoderPlan,
    tokenizer: PromptTokenizer,
    references: Sequence[Reference],
    prompt: str,
    *,
    aggregation: str = "easyref",
    image_size: int | None = None,
    insert_before: int | None = None,
    negatives: Sequence[Reference] = (),
    mllm_layers: MllmLayerWeights | None = None,
) -> GroupPlan:
    """Plan the encoding of references and a prompt.

    Args:
        references: the group, in order.
        prompt: plain text; text that spells a special token stays text.
        aggregation: one of `AGGREGATIONS`.
        image_size: the official `cond_image_size`, in pixels; 0 or None for the size at which the
            adapter was trained.
        insert_before: the reference tokens enter before the last 1, 2 or 3 layers; None for where
            the adapter was trained.
        negatives: pictures to avoid, encoded together and without the prompt in the unconditional
            branch; a black picture by default, as in the official code.
        mllm_layers: weights of the layers that `dla` and `lap` pool, in both branches.

    Raises:
        EasyRefError: a prompt that is no text; unknown aggregation or layer; an aggregation that
            the adapter has no weights for; `mllm_layers` where none are pooled; see `chosen_size`
            and `plan_images`; nothing is left of a baseline whose weights are all 0; the group is
            longer than the MLLM's context, or the negatives are.
    """
    prompt = text(prompt, "prompt")
    if aggregation not in AGGREGATIONS:
        raise EasyRefError(
            f"There is no aggregation {shown(aggregation)}. Choose one of "
            f"{', '.join(AGGREGATIONS)}."
        )
    check_pooling(encoder, aggregation, mllm_layers)
    if insert_before is not None:
        layers = min(MAX_INSERTION, encoder.config.num_layers)
        insert_before = whole_number(insert_before, "insert_before")
        if not 1 <= insert_before <= layers:
            raise EasyRefError(
                f"Reference tokens cannot enter before the last {insert_before} layers; 1 to "
                f"{layers} can be chosen."
            )
    image_size = chosen_size(image_size, encoder)
    images = plan_images(references, image_size)
    weights = tuple(reference.weight for reference in references)
    if aggregation not in BASELINES:
        groups = [(images, weights)]
    else:
        if not any(weights):
            raise EasyRefError(
                f"All references have weight 0, so aggregation {aggregation!r} has nothing left. "
                "Give one of them a weight above 0."
            )
        groups = [((image,), (1.0,)) for image in images]

    def planned_pass(
        images: tuple[PlannedImage, ...], weights: tuple[float, ...], prompt: str
    ) -> MllmPass:
        chat = tokenizer.tokenize([image.num_tokens for image in images], prompt)
        check_length(encoder, tokenizer, chat, prompt, image_size)
        return MllmPass(chat, images, weights)

    passes = tuple(planned_pass(*group, prompt) for group in groups)
    negatives = negatives or (Reference(black_picture(), name="the black picture"),)
    with named("negative references"):
        unconditional = planned_pass(
            plan_images(negatives, image_size), tuple(n.weight for n in negatives), ""
        )
    return GroupPlan(
        encoder,
        tuple(references),
        prompt,
        aggregation,
        insert_before or encoder.checkpoint.final_layers,
        passes,
        unconditional,
        mllm_layers,
    )


def chosen_size(image_size: int | None, encoder: EncoderPlan) -> int:
    """The size at which references are encoded, in pixels.

    Args:
        image_size: 0 or None for the adapter's own.

    Raises:
        EasyRefError: no whole number, below 56 pixels, where no picture would be left, or so large
            that one picture exceeds the MLLM's context.
    """
    trained, context = encoder.checkpoint.image_size, encoder.config.max_positions
    size = trained if image_size is None else whole_number(image_size, "image_size") or trained
    default = f"0 for the size at which the adapter was trained ({trained})"
    if size < MIN_IMAGE_SIZE:
        raise EasyRefError(
            f"image_size is {size}; it must be at least {MIN_IMAGE_SIZE} pixels, or {default}."
        )
    largest = FACTOR * math.isqrt(context)
    if size > largest:
        raise EasyRefError(
            f"image_size is {size}; one picture would be more than the {context:,} tokens that the "
            f"MLLM reads. Choose at most {largest} pixels, or {default}."
        )
    return size


def plan_images(references: Sequence[Reference], image_size: int) -> tuple[PlannedImage, ...]:
    """The image tokens of a group's pictures, from their sizes alone.

    Raises:
        EasyRefError: no picture, something else than one, or a picture too elongated (named).
    """
    if not isinstance(references, Sequence):
        raise EasyRefError(f"references is {shown(references)}; a list of Reference is needed.")
    if not references:
        raise EasyRefError(
            "There is no reference picture. Connect at least one to images or references."
        )
    images = []
    for position, reference in enumerate(references, start=1):
        if not isinstance(reference, Reference):
            raise EasyRefError(
                f"Reference {position} is {shown(reference)}; a Reference is needed, made of a "
                "picture and its weight."
            )
        with named(reference.name):
            _, (width, height) = plan_sizes(*reference.picture.size, image_size)
        images.append(PlannedImage(reference, image_size, height // FACTOR, width // FACTOR))
    return tuple(images)
