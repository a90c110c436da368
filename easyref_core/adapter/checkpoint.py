"""The adapter's checkpoint, recognised by its keys and shapes alone.

Source: official code (`EasyRef.load_from_checkpoint`); see `qwen2vl/names.py` for the MLLM's names.
Nothing here reads more than a few rows of the weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import EasyRefError
from ..pictures.sizes import DEFAULT_IMAGE_SIZE, MIN_IMAGE_SIZE
from ..qwen2vl.config import RELEASED_WIDTHS
from ..qwen2vl.names import canonical_names
from ..untrusted import escaped, shown
from ..weight_file import WeightFile, open_weight_file
from ..weight_file.shards import SET
from .layer_pooling import POOLING, POOLS, PoolingSizes, PoolSizes, pooling_of
from .parts import (
    BODY,
    FINAL,
    PROJECTOR,
    TOKENS,
    check_parts,
    check_unused,
    not_an_adapter,
)

IMAGE_SIZE = "image_size"  # in the metadata of files that `easyref train` writes

_IP = re.compile(r"unet\.(?P<layer>.+\.attn\d+)\.processor\.(?P<part>to_[kv]_ip)\.weight")
_LORA = re.compile(
    r"unet\.(?P<layer>.+\.attn\d+)\.processor\.(?P<part>to_(?:q|k|v|out))_lora"
    r"\.(?P<half>down|up)\.weight"
)
_IDENTITY_LORA = re.compile(
    r"unet\.(?P<layer>.+\.attn1)\.processor\.(?P<part>to_[kv])_identity_lora"
    r"\.(?P<half>down|up)\.weight"
)
_FINAL_LAYER = re.compile(r"^layers\.(\d+)\.")


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An EasyRef adapter file. Maps go from local names to names in the file.

    Attributes:
        projector: `proj.{0,2,3}.*`.
        final: `reference_tokens`, `layers.N.*`, `norm.weight`.
        body: the fine-tuned MLLM under canonical names, empty when the file has none.
        cross_attention: layer -> {"to_k_ip", "to_v_ip"} -> name.
        lora: layer -> projection ("to_q", ...) -> {"down", "up"} -> name.
        identity_lora: self-attention layer -> "to_k" and "to_v" -> {"down", "up"} -> name; a LoRA
            on keys and values of the references' features alone (`adapter/identity.py`).
        base_unet: names of base UNet weights in the same file (reported, not used: the user's
            own SDXL model supplies them).
        ignored: names of duplicates and anything else not used.
        image_size: size of the references in training, in pixels; the released weights' where the
            file does not say.
        mllm_mark: `MllmConfig.mark` of the MLLM that is used with it; None where none is known.
        layer_pooling: weights of layer pooling, `text.*`, `image.*`, `all.*`; empty without.
        pools: sizes of each of its pools.
        mllm_layers: numbers of the MLLM's hidden states that they read; None for all of them.
    """

    file: WeightFile
    projector: Mapping[str, str]
    final: Mapping[str, str]
    body: Mapping[str, str]
    cross_attention: Mapping[str, Mapping[str, str]]
    lora: Mapping[str, Mapping[str, Mapping[str, str]]]
    base_unet: tuple[str, ...]
    ignored: tuple[str, ...]
    image_size: int = DEFAULT_IMAGE_SIZE
    identity_lora: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    mllm_mark: str | None = None
    layer_pooling: Mapping[str, str] = field(default_factory=dict)
    pools: tuple[tuple[str, PoolSizes], ...] = ()
    mllm_layers: tuple[int, ...] | None = None

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.file.tensors[name].shape

    @property
    def num_tokens(self) -> int:
        return self._shape(self.final[TOKENS])[0]

    @property
    def mllm_width(self) -> int:
        return self._shape(self.final[TOKENS])[1]

    @property
    def token_width(self) -> int:
        return self._shape(self.projector["proj.2.weight"])[0]

    @property
    def final_layers(self) -> int:
        return len({m.group(1) for m in map(_FINAL_LAYER.match, self.final) if m})

    @property
    def aggregations(self) -> tuple[str, ...]:
        """The aggregations over layers that it has weights for: those of `POOLS`."""
        return PoolingSizes(self.pools, ()).aggregations

    @property
    def lora_rank(self) -> int:
        """0 without LoRA."""
        first = next(iter(self.lora.values()), None)
        return self._shape(first["to_q"]["down"])[0] if first else 0

    @property
    def identity_lora_rank(self) -> int:
        """0 without an identity LoRA."""
        first = next(iter(self.identity_lora.values()), None)
        return self._shape(first["to_k"]["down"])[0] if first else 0

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def name(self) -> str:
        """Shown to people, without control characters; never used to recognise anything."""
        return escaped(self.file.path.name)

    @property
    def has_mllm(self) -> bool:
        return bool(self.body)

    @property
    def dtype(self) -> str:
        """dtype of the adapter's own weights."""
        return self.file.tensors[self.projector["proj.0.weight"]].dtype

    @cached_property
    def identity(self) -> str:
        """Sixteen hex digits that tell this adapter from any other.

        Of the parts that give the tokens their meaning (reference tokens, projector, shapes of
        everything, one row of every key and value projection), so the same adapter with and
        without the MLLM inside, or under another file name, has the same identity.
        """
        own = {**self.projector, **self.final}
        return self._fingerprint(
            [
                *((local, own[local], 0) for local in sorted(own)),
                *(("", own[local], None) for local in (*sorted(self.projector), TOKENS)),
                *(
                    (f"{layer}.{part}", name, 1)
                    for layer, parts in sorted(self.cross_attention.items())
                    for part, name in sorted(parts.items())
                ),
            ]
        )

    def made(self, adapter: str) -> bool:
        """Whether tokens come from this adapter, and from the MLLM used with it as far as that is
        known.

        Args:
            adapter: the tokens' own. Without a mark they come from an MLLM with the numbers of
                Qwen2-VL's releases, or from before there were marks.
        """
        identity, _, mark = adapter.partition("-")
        own = self.mllm_mark
        if own is None and self.mllm_width in RELEASED_WIDTHS:
            own = ""
        return identity == self.identity and (not mark or own is None or mark == own)

    @cached_property
    def lora_identity(self) -> str:
        """Sixteen hex digits that tell this adapter's LoRA from any other; empty without LoRA.

        Of one row of every weight. Tokens do not depend on the LoRA, so `identity` leaves it out.
        """
        entries = [
            (f"{layer}.{part}.{half}", name, 1)
            for layer, parts in sorted(self.lora.items())
            for part, halves in sorted(parts.items())
            for half, name in sorted(halves.items())
        ]
        return self._fingerprint(entries) if entries else ""

    def _fingerprint(self, entries: Iterable[tuple[str, str, int | None]]) -> str:
        """Hash of (label with the weight's shape, name in the file, rows of it; None for all)."""
        digest = hashlib.sha256()
        with self.file.open_bytes() as get:
            for label, name, rows in entries:
                if label:
                    digest.update(f"{label}{self._shape(name)}".encode())
                if rows != 0:
                    digest.update(get(name, rows))
        return digest.hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        """Contents as plain values (for `easyref inspect --json`)."""
        embedding = sorted(n for n in self.file.tensors if "embed_tokens" in n or "lm_head" in n)
        body_dtypes = sorted({self.file.tensors[n].dtype for n in self.body.values()})
        return {
            "file": str(self.path),
            "bytes": self.file.stamp.size,
            "format": "safetensors" if self.file.is_safetensors else "pytorch",
            "identity": self.identity,
            "image_size": self.image_size,
            "reference_tokens": self.num_tokens,
            "token_width": self.token_width,
            "mllm_width": self.mllm_width,
            "final_layers": self.final_layers,
            "cross_attention_layers": len(self.cross_attention),
            "lora_layers": len(self.lora),
            "lora_rank": self.lora_rank,
            "identity_lora_layers": len(self.identity_lora),
            "identity_lora_rank": self.identity_lora_rank,
            "layer_pooling": [
                f"{name} ({dict(self.pools)[POOLS[name][0]].shape})" for name in self.aggregations
            ],
            "mllm_layers": None if self.mllm_layers is None else list(self.mllm_layers),
            "dtype": self.dtype,
            "mllm_inside": self.has_mllm,
            "mllm_dtype": ", ".join(body_dtypes) or None,
            "mllm_tensors": len(self.body),
            "embedding_keys": embedding,
            "base_unet_tensors": len(self.base_unet),
            "ignored_tensors": len(self.ignored),
        }


def load_checkpoint(path: str | Path) -> AdapterCheckpoint:
    """Recognise an EasyRef adapter in a file, without reading the weights.

    Args:
        path: of the file, or of the index of its shards, `*.safetensors.index.json`.

    Raises:
        EasyRefError: see `open_weight_file`; the file is something else (its likely kind is
            named); parts are missing or do not fit together (named).
    """
    return recognise(open_weight_file(path))


def is_adapter(path: Path) -> bool:
    """Whether there is an adapter that can be loaded."""
    try:
        load_checkpoint(path)
    except EasyRefError:
        return False
    return True


def recognise(file: WeightFile) -> AdapterCheckpoint:
    """Sort a file's tensors into the parts of an EasyRef adapter. See `load_checkpoint`."""
    if SET in file.metadata:
        raise EasyRefError(
            f"{escaped(str(file.path))} is one shard of an adapter. Name their index, which ends "
            "in .safetensors.index.json."
        )
    projector: dict[str, str] = {}
    final: dict[str, str] = {}
    body: dict[str, str] = {}
    cross: dict[str, dict[str, str]] = {}
    lora: dict[str, dict[str, dict[str, str]]] = {}
    identity_lora: dict[str, dict[str, dict[str, str]]] = {}
    pooling: dict[str, str] = {}
    base_unet: list[str] = []
    ignored: list[str] = []
    for name in file.tensors:
        plain = name.removeprefix("module.")
        if plain.startswith(PROJECTOR):
            projector[plain.removeprefix(PROJECTOR)] = name
        elif plain.startswith(FINAL):
            final[plain.removeprefix(FINAL)] = name
        elif plain.startswith(BODY):
            body[plain.removeprefix(BODY)] = name
        elif plain.startswith(POOLING):
            pooling[plain.removeprefix(POOLING)] = name
        elif match := _IP.fullmatch(plain):
            cross.setdefault(match["layer"], {})[match["part"]] = name
        elif match := _LORA.fullmatch(plain):
            lora.setdefault(match["layer"], {}).setdefault(match["part"], {})[match["half"]] = name
        elif match := _IDENTITY_LORA.fullmatch(plain):
            halves = identity_lora.setdefault(match["layer"], {}).setdefault(match["part"], {})
            halves[match["half"]] = name
        elif plain.startswith("unet.") and ".processor." not in plain:
            base_unet.append(name)
        else:
            ignored.append(name)
    if not (projector or final) or not cross:
        raise not_an_adapter(file, projector, final, cross)
    check_parts(file, projector, final, cross, lora, identity_lora)
    check_unused(file, (*base_unet, *ignored))
    file.check_weights(body.values())
    body = {local: body[source] for local, source in canonical_names(body).items()}
    pools, layers = pooling_of(file, pooling, file.tensors[final[TOKENS]].shape[1])
    return AdapterCheckpoint(
        file,
        projector,
        final,
        body,
        cross,
        lora,
        tuple(base_unet),
        tuple(ignored),
        _image_size(file),
        identity_lora,
        layer_pooling=pooling,
        pools=pools,
        mllm_layers=layers,
    )


def _image_size(file: WeightFile) -> int:
    size = file.metadata.get(IMAGE_SIZE)
    if size is None:
        return DEFAULT_IMAGE_SIZE
    if not (size.isascii() and size.isdecimal() and len(size) < 6 and int(size) >= MIN_IMAGE_SIZE):
        raise EasyRefError(
            f"{escaped(str(file.path))} says that it was trained at image_size {shown(size)}; a "
            f"whole number of pixels, {MIN_IMAGE_SIZE} or more, is needed. The file is damaged; "
            "get it again."
        )
    return int(size)
