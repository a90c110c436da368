"""Settings of a benchmark run, checked before anything is read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from ..adapter.stages import parse_stages
from ..errors import EasyRefError
from ..training.recipe import STRICT, Bool, Count, Float, Int, NonNegativeInt, parse_settings
from ..untrusted import shown

Weight = Annotated[Float, Field(ge=0, le=10)]
Guidance = Annotated[Float, Field(ge=0, le=100)]
Steps = Annotated[Count, Field(le=1000)]
References = Annotated[NonNegativeInt, Field(le=1000)]
Layers = Annotated[NonNegativeInt, Field(le=3)]
Side = Annotated[NonNegativeInt, Field(le=8192)]
Aggregation = Literal["easyref", "dla", "lap"]
MethodName = Literal[
    "easyref",
    "average",
    "concatenate",
    "ip-adapter",
    "lora",
    "lora-other",
    "none",
    "easyref-other",
]

# They change no image: where it runs, and with which models images are scored.
FREE = ("out", "device", "offload", "offline", "clip", "dino", "faces")
_TEXTS = ("adapter", "aggregation", "stages")
_PATHS = ("groups", "out", "base", "base_config", "adapter", "mllm", "ip_adapter", "image_encoder")


@dataclass(frozen=True, config=STRICT)
class VariedSettings:
    """Values that replace a setting, one line of the table each; empty where it is not varied."""

    weight: tuple[Weight, ...] = ()
    references: tuple[References, ...] = ()
    insert_before: tuple[Layers, ...] = ()
    image_size: tuple[Side, ...] = ()
    adapter: tuple[str, ...] = ()
    steps: tuple[Steps, ...] = ()
    guidance: tuple[Guidance, ...] = ()
    aggregation: tuple[Aggregation, ...] = ()
    identity: tuple[Weight, ...] = ()
    stages: tuple[str, ...] = ()


@dataclass(frozen=True, config=STRICT)
class BenchSettings:
    """One benchmark run.

    Attributes:
        groups: folder of groups, or JSON of training data.
        out: the run's folder.
        protocol: name of a preset of `protocols.PRESETS`.
        methods: to compare; empty for the preset's, as far as their files are given.
        base: SDXL, a diffusers directory or one .safetensors file.
        base_config: diffusers directory from which a single file takes its configurations.
        adapter, mllm: EasyRef adapter file, Qwen2-VL directory.
        ip_adapter, image_encoder: IP-Adapter file and its CLIP vision directory.
        clip, dino, faces: models of metrics, a directory or a name on the hub; no faces where
            empty.
        offline: use local directories and the hub's cache only.
        weight, references, insert_before, image_size, steps, guidance, aggregation, identity,
            stages: see `Variant`; no references stand for the preset's.
        vary: values that replace them.
        size: of the generated images, in pixels.
        negative: negative prompt; None for the official demo's.
        lora_rank, lora_steps: of the LoRA that is trained on each group's references.
        offload: keep the MLLM in the computer's memory while images are sampled.
        images: per group (and prompt); 0 for the preset's.
        device: empty for a GPU where there is one.
    """

    groups: str
    out: str
    protocol: Literal[
        "mrbench", "coco", "dreambooth", "multibanana", "aggregation", "tokens", "group-size"
    ] = "mrbench"
    methods: tuple[MethodName, ...] = ()
    base: str = ""
    base_config: str = ""
    adapter: str = ""
    mllm: str = ""
    ip_adapter: str = ""
    image_encoder: str = ""
    clip: str = "openai/clip-vit-large-patch14"
    dino: str = "facebook/dinov2-small"
    faces: str = ""
    offline: Bool = False
    weight: Weight = 1.0
    references: References | None = None
    insert_before: Layers = 0
    image_size: Side = 0
    steps: Steps = 30
    guidance: Guidance = 7.5
    aggregation: Aggregation = "easyref"
    identity: Weight = 0.0
    stages: str = ""
    vary: VariedSettings = dataclasses.field(default_factory=VariedSettings)
    size: Annotated[Int, Field(ge=8, le=8192, multiple_of=8)] = 1024
    negative: str | None = None
    lora_rank: Annotated[Count, Field(le=1024)] = 32
    lora_steps: Count = 500
    offload: Bool = False
    images: Annotated[NonNegativeInt, Field(le=10_000)] = 0
    batch_size: Annotated[Count, Field(le=256)] = 1
    seed: Annotated[NonNegativeInt, Field(le=2**32 - 1)] = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = ""


def make_bench_settings(
    content: Mapping[str, Any], vary: Sequence[str] = (), **more: Any
) -> BenchSettings:
    """Checked settings; relative paths become absolute.

    Args:
        content: field -> value; None stands for the default.
        vary: texts such as "weight=0.4,0.6".
        more: further fields.

    Raises:
        EasyRefError: unknown settings, values of a wrong type or out of range, stages that cannot
            be read.
    """
    given = {name: value for name, value in {**content, **more}.items() if value is not None}
    if vary:
        given["vary"] = {**given.get("vary", {}), **parse_varied(vary)}
    settings = parse_settings(BenchSettings, given)
    paths = {name: os.path.abspath(getattr(settings, name)) for name in _PATHS if given.get(name)}
    varied = {
        "adapter": tuple(os.path.abspath(file) for file in settings.vary.adapter),
        "stages": tuple(_stages(text) for text in settings.vary.stages),
    }
    return dataclasses.replace(
        settings,
        **paths,
        stages=_stages(settings.stages),
        vary=dataclasses.replace(settings.vary, **varied),
    )


def _stages(text: str) -> str:
    """Empty for the word that a list of values has for it.

    Raises:
        EasyRefError: it cannot be read.
    """
    text = "" if text.strip() == "none" else text.strip()
    parse_stages(text)
    return text


def parse_varied(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Values of `--vary KEY=V1,V2` options, by key.

    Raises:
        EasyRefError: not of this form, a key that cannot be varied, or given twice.
    """
    known = [field.name for field in dataclasses.fields(VariedSettings)]
    varied: dict[str, list[Any]] = {}
    for text in texts:
        key, _, values = text.partition("=")
        key = key.strip().replace("-", "_")
        given = [value.strip() for value in values.split(",") if value.strip()]
        if not given or key not in known or key in varied:
            twice = " is given twice" if key in varied else f" cannot be used as {shown(text)}"
            raise EasyRefError(
                f"--vary{twice}. Write --vary KEY=VALUE,VALUE, each KEY once: {', '.join(known)}."
            )
        varied[key] = [value if key in _TEXTS else _number(value) for value in given]
    return varied


def _number(text: str) -> Any:
    """Text that is no number stays, to be refused by its setting's sentence."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def as_json(settings: BenchSettings) -> dict[str, Any]:
    """All settings as plain values, as a run's folder keeps them."""
    plain = dataclasses.asdict(settings)
    plain["methods"] = list(plain["methods"])
    plain["vary"] = {name: list(values) for name, values in plain["vary"].items() if values}
    return plain
