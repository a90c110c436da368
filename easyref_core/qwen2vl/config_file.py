"""A Qwen2-VL directory's config.json: every number by its type and range, nothing guessed.

Source: what transformers 4 and 5 write for Qwen2-VL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..pictures.sizes import CHANNELS, FRAMES, MERGE, PATCH
from ..untrusted import escaped, is_regular, kind_of, number, read_json, shown, whole_number
from .config import MAX_LAYERS, MllmConfig, VisionConfig

FAMILY = "qwen2_vl"
_MAX_BYTES = 1_000_000  # real ones have a few thousand
_MAX_WIDTH = 2**20
_MAX_COUNT = 2**24
_AGAIN = "Get the Qwen2-VL-2B-Instruct files again."


def read_config(directory: str | Path) -> MllmConfig:
    """The sizes that a directory's config.json says.

    Raises:
        EasyRefError: see `read_settings` and `config_from_dict`.
    """
    return config_from_dict(read_settings(directory), str(Path(directory) / "config.json"))


def read_settings(directory: str | Path) -> Mapping[str, Any]:
    """The content of a directory's config.json, unchecked.

    Raises:
        EasyRefError: there is none, or it is not JSON.
    """
    path = Path(directory) / "config.json"
    if not is_regular(path):
        raise EasyRefError(
            f"No config.json in the MLLM directory {escaped(str(directory))}. "
            "Choose the folder of a Qwen2-VL-2B-Instruct download, with all its files."
        )
    content = read_json(path, _MAX_BYTES, "config.json of an MLLM")
    if not isinstance(content, dict):
        raise EasyRefError(
            f"{escaped(str(path))} holds no settings but {kind_of(content)}. {_AGAIN}"
        )
    return content


def is_qwen2_vl(directory: str | Path) -> bool:
    """Whether a directory's config.json names Qwen2-VL. Neither raises nor waits."""
    try:
        return read_settings(directory).get("model_type") == FAMILY
    except EasyRefError:
        return False


def quantisation(settings: Mapping[str, Any]) -> str:
    """How config.json says that the weights are quantised; empty if they are not."""
    text = settings.get("text_config")
    places = (settings, text if isinstance(text, dict) else {})
    found = next(filter(None, (place.get("quantization_config") for place in places)), None)
    if found is None:
        return ""
    return shown(found.get("quant_method") or found if isinstance(found, dict) else found)


def config_from_dict(data: Mapping[str, Any], source: str) -> MllmConfig:
    """Build the configuration from config.json's content, flat (4.x) or nested (5.x).

    Raises:
        EasyRefError: another model family; a number that is missing, of another type, or out of
            its range; numbers that do not fit together; a setting that Qwen2-VL does not have.
            With `source` named.
    """
    family = data.get("model_type")
    if family != FAMILY:
        raise EasyRefError(
            f"{escaped(source)} describes a model of type {shown(family)}; EasyRef reads "
            f"references with Qwen2-VL (model_type {FAMILY!r}), and other families, Qwen2.5-VL "
            "included, have other weights. Choose a Qwen2-VL-2B-Instruct directory."
        )
    whole = _Settings(data, escaped(source))
    text = _Settings({**data, **whole.section("text_config").values}, whole.source)
    vision = whole.section("vision_config")
    _check_computation(text, vision)
    hidden_size = text.whole("hidden_size")
    embed_dim = vision.whole("embed_dim", VisionConfig.embed_dim)
    config = MllmConfig(
        hidden_size=hidden_size,
        intermediate_size=text.whole("intermediate_size"),
        num_layers=text.whole("num_hidden_layers", most=MAX_LAYERS),
        num_heads=text.whole("num_attention_heads"),
        num_kv_heads=text.whole("num_key_value_heads"),
        vocab_size=text.whole("vocab_size", most=_MAX_COUNT),
        max_positions=text.whole(
            "max_position_embeddings", MllmConfig.max_positions, most=_MAX_COUNT
        ),
        rms_norm_eps=text.real("rms_norm_eps", MllmConfig.rms_norm_eps, 1e-12, 0.1),
        rope_theta=_rope_theta(text),
        vision=VisionConfig(
            embed_dim=embed_dim,
            depth=vision.whole("depth", VisionConfig.depth, most=MAX_LAYERS),
            num_heads=vision.whole("num_heads", VisionConfig.num_heads),
            mlp_dim=int(embed_dim * vision.real("mlp_ratio", 4, 1e-3, 1e3)),
            hidden_size=vision.whole("hidden_size", hidden_size),
        ),
    )
    _check_heads(config, text, vision)
    return config


def _rope_theta(text: _Settings) -> float:
    """The base of the positions, which older files name at the top and newer ones inside."""
    inner = text.section("rope_parameters")
    found = {s.real("rope_theta", 0, 1, 1e10) for s in (text, inner) if s.has("rope_theta")}
    if len(found) > 1:
        raise text.refusal("rope_theta", "the same as in rope_parameters")
    return found.pop() if found else MllmConfig.rope_theta


def _check_computation(text: _Settings, vision: _Settings) -> None:
    """Raise EasyRefError for settings under which transformers would compute something else."""
    text.only("hidden_act", "silu")
    text.only("use_sliding_window", False)
    text.only("partial_rotary_factor", 1)
    kinds = text.values.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
    ):
        raise text.refusal("layer_types", "full_attention in every layer")
    for key in ("rope_scaling", "rope_parameters"):
        for name in ("type", "rope_type"):
            text.section(key).only(name, "default", "mrope")
        text.section(key).only("partial_rotary_factor", 1)
    vision.only("hidden_act", "quick_gelu")
    vision.only("patch_size", PATCH)
    vision.only("spatial_patch_size", PATCH)
    vision.only("temporal_patch_size", FRAMES)
    vision.only("spatial_merge_size", MERGE)
    vision.only("in_channels", CHANNELS)
    vision.only("in_chans", CHANNELS)
    vision.section("rope_parameters").only("rope_theta", 10_000)


def _check_heads(config: MllmConfig, text: _Settings, vision: _Settings) -> None:
    """Raise EasyRefError where widths do not divide into heads with rotary positions."""
    if config.hidden_size % (2 * config.num_heads):
        raise text.refusal("num_attention_heads", f"half a divisor of {config.hidden_size}")
    if config.num_heads % config.num_kv_heads:
        raise text.refusal("num_key_value_heads", f"a divisor of {config.num_heads}")
    text.only("head_dim", config.head_dim)
    if config.vision.embed_dim % (4 * config.vision.num_heads):
        raise vision.refusal("num_heads", f"a quarter of a divisor of {config.vision.embed_dim}")
    if config.vision.hidden_size != config.hidden_size:
        raise vision.refusal("hidden_size", f"the language model's, {config.hidden_size}")


@dataclass(frozen=True)
class _Settings:
    """Values of config.json, of any type.

    Attributes:
        source: the file, and the key that the values stand under.
    """

    values: Mapping[str, Any]
    source: str

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def section(self, key: str) -> _Settings:
        """The values under a key; none where it is absent."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise self.refusal(key, "an object")
        return _Settings(values or {}, f"{self.source}: {key}")

    def whole(self, key: str, default: int | None = None, most: int = _MAX_WIDTH) -> int:
        """A whole number from 1 to `most`."""
        return whole_number(self._value(key, default), f"{self.source}: {key}", 1, most, _AGAIN)

    def real(self, key: str, default: float, low: float, high: float) -> float:
        return number(self._value(key, default), f"{self.source}: {key}", low, high, _AGAIN)

    def only(self, key: str, *allowed: Any) -> None:
        """Raise EasyRefError for a value that is none of those allowed; it may be absent."""
        value = self.values.get(key)
        if value is not None and not any(
            value == usual and isinstance(value, bool) == isinstance(usual, bool)
            for usual in allowed
        ):
            raise self.refusal(key, " or ".join(map(shown, allowed)))

    def refusal(self, key: str, wanted: str) -> EasyRefError:
        found = shown(self.values.get(key))
        return EasyRefError(f"{self.source}: {key} is {found}; it must be {wanted}. {_AGAIN}")

    def _value(self, key: str, default: float | None) -> Any:
        if self.has(key):
            return self.values[key]
        if default is None:
            raise EasyRefError(f"{self.source} lacks {key!r}. {_AGAIN}")
        return default
