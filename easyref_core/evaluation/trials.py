"""What is generated: a trial is one image, made by a variant of a method for a group."""

from __future__ import annotations

from dataclasses import dataclass

from .groups import GroupPicture


@dataclass(frozen=True)
class Variant:
    """A method with its settings: one line of the table.

    Attributes:
        method: a name of `methods.METHODS`.
        weight: of the references.
        references: the most that are used; 0 for all.
        insert_before: the reference tokens enter before this many last layers; 0 for where the
            adapter was trained.
        image_size: at which references are encoded, in pixels; 0 for the adapter's own.
        adapter: EasyRef adapter file; empty for the run's.
        steps, guidance: of the sampling.
        aggregation: which of the adapter's states the final layers read: `easyref` the last
            layer's, `dla` or `lap` those of many layers, pooled.
        identity: weight of the references' features in self-attention; 0 for none.
        stages: when reference tokens and identity act, as `adapter.stages.parse_stages` reads it;
            empty for always.
    """

    method: str
    weight: float = 1.0
    references: int = 0
    insert_before: int = 0
    image_size: int = 0
    adapter: str = ""
    steps: int = 30
    guidance: float = 7.5
    aggregation: str = "easyref"
    identity: float = 0.0
    stages: str = ""


NEWER = {name: getattr(Variant(""), name) for name in ("aggregation", "identity", "stages")}
"""Fields of `Variant` that earlier runs do not have -> the values with which they were made."""


@dataclass(frozen=True)
class Trial:
    """One image to generate.

    Attributes:
        variant: by which it is generated.
        label: the variant's name in tables and on the page, such as "easyref, weight 0.6".
        path: of the image in the run's folder, without extension, such as
            "images/easyref_weight-0.6/GROUP/0"; unique.
        group, split, kind: of the group.
        references: given to the method, in order.
        targets: that the image is compared with: one, or all pictures of a subject.
        prompt: for the text encoders and the MLLM.
        seed: of the noise; equal for all variants.
    """

    variant: Variant
    label: str
    path: str
    group: str
    split: str
    kind: str
    references: tuple[GroupPicture, ...]
    targets: tuple[GroupPicture, ...]
    prompt: str
    seed: int
