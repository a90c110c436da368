"""The adapter's checkpoint, recognised by its keys and shapes alone.

Source: official code (`EasyRef.load_from_checkpoint`); see `qwen2vl/names.py` for the MLLM's names.
Nothing here reads more than a few rows of the weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import EasyRefError
from ..pictures.preprocessing import DEFAULT_IMAGE_SIZE, MIN_IMAGE_SIZE
from ..qwen2vl.config import RELEASED_WIDTHS
from ..qwen2vl.names import canonical_names
from ..weight_file import WeightFile, open_weight_file

PROJECTOR = "image_proj_model."
FINAL = "mllm_final_layer."
BODY = "multimodal_llm."
IMAGE_SIZE = "image_size"  # in the metadata of files that `easyref train` writes
TOKENS = "reference_tokens"
KEY_VALUE = ("to_k_ip", "to_v_ip")
LORA = ("to_q", "to_k", "to_v", "to_out")

_IP = re.compile(r"^unet\.(?P<layer>.+\.attn\d+)\.processor\.(?P<part>to_[kv]_ip)\.weight$")
_LORA = re.compile(
    r"^unet\.(?P<layer>.+\.attn\d+)\.processor\.(?P<part>to_(?:q|k|v|out))_lora"
    r"\.(?P<half>down|up)\.weight$"
)
_FINAL_LAYER = re.compile(r"^layers\.(\d+)\.")

_LOOKALIKES = (
    ("model.diffusion_model.", "an SDXL or other image model checkpoint (models/checkpoints)"),
    ("ip_adapter.", "an IP-Adapter; EasyRef's own adapter is another file"),
    ("image_proj.", "an IP-Adapter; EasyRef's own adapter is another file"),
    ("lora_unet_", "a LoRA (models/loras)"),
    ("visual.", "a bare Qwen2-VL model; it goes into models/LLM and is chosen as the MLLM"),
    ("model.visual.", "a bare Qwen2-VL model; it goes into models/LLM and is chosen as the MLLM"),
    ("model.layers.", "a bare language model"),
    ("uncond", "saved reference tokens; load them with EasyRef Load Tokens"),
    ("control_model.", "a ControlNet (models/controlnet)"),
)


@dataclass(frozen=True)
class AdapterCheckpoint:
    """An EasyRef adapter file. Maps go from local names to names in the file.

    Attributes:
        projector: `proj.{0,2,3}.*`.
        final: `reference_tokens`, `layers.N.*`, `norm.weight`.
        body: the fine-tuned MLLM under canonical names, empty when the file has none.
        cross_attention: layer -> {"to_k_ip", "to_v_ip"} -> name.
        lora: layer -> projection ("to_q", ...) -> {"down", "up"} -> name.
        base_unet: names of base UNet weights in the same file (reported, not used: the user's
            own SDXL model supplies them).
        ignored: names of duplicates and anything else not used.
        image_size: size of the references in training, in pixels; the released weights' where the
            file does not say.
        mllm_mark: `MllmConfig.mark` of the MLLM that is used with it; None where none is known.
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
    mllm_mark: str | None = None

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
    def lora_rank(self) -> int:
        """0 without LoRA."""
        first = next(iter(self.lora.values()), None)
        return self._shape(first["to_q"]["down"])[0] if first else 0

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def name(self) -> str:
        """Shown to people; never used to recognise anything."""
        return self.file.path.name

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
        with self.file.open() as get:
            for label, name, rows in entries:
                if label:
                    digest.update(f"{label}{self._shape(name)}".encode())
                if rows != 0:
                    weight = get(name)
                    content = (weight if rows is None else weight[:rows]).flatten()
                    digest.update(content.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        """Contents as plain values (for `easyref inspect --json`)."""
        embedding = sorted(n for n in self.file.tensors if "embed_tokens" in n or "lm_head" in n)
        body_dtypes = sorted({self.file.tensors[n].dtype for n in self.body.values()})
        return {
            "file": str(self.path),
            "bytes": self.file.stamp[0],
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

    Raises:
        EasyRefError: see `open_weight_file`; the file is something else (its likely kind is
            named); parts are missing or do not fit together (named).
    """
    return recognise(open_weight_file(path))


def recognise(file: WeightFile) -> AdapterCheckpoint:
    """Sort a file's tensors into the parts of an EasyRef adapter. See `load_checkpoint`."""
    projector: dict[str, str] = {}
    final: dict[str, str] = {}
    body: dict[str, str] = {}
    cross: dict[str, dict[str, str]] = {}
    lora: dict[str, dict[str, dict[str, str]]] = {}
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
        elif match := _IP.match(plain):
            cross.setdefault(match["layer"], {})[match["part"]] = name
        elif match := _LORA.match(plain):
            lora.setdefault(match["layer"], {}).setdefault(match["part"], {})[match["half"]] = name
        elif plain.startswith("unet.") and ".processor." not in plain:
            base_unet.append(name)
        else:
            ignored.append(name)
    if not (projector or final) or not cross:
        raise EasyRefError(_not_an_adapter(file, projector, final, cross))
    _check_parts(file, projector, final, cross, lora)
    body = {local: body[source] for local, source in canonical_names(body).items()}
    unused = (tuple(base_unet), tuple(ignored))
    return AdapterCheckpoint(file, projector, final, body, cross, lora, *unused, _image_size(file))


def _image_size(file: WeightFile) -> int:
    size = file.metadata.get(IMAGE_SIZE)
    if size is None:
        return DEFAULT_IMAGE_SIZE
    if not (size.isdecimal() and int(size) >= MIN_IMAGE_SIZE):
        raise EasyRefError(
            f"{file.path} says that it was trained at image_size {size!r}; a whole number of "
            f"pixels, {MIN_IMAGE_SIZE} or more, is needed. The file is damaged; get it again."
        )
    return int(size)


def _not_an_adapter(file: WeightFile, projector: Any, final: Any, cross: Any) -> str:
    parts = {PROJECTOR: projector, FINAL: final, "unet.*.to_k_ip": cross}
    if any(parts.values()):
        lacking = ", ".join(prefix for prefix, part in parts.items() if not part)
        return (
            f"{file.path} is only part of an EasyRef adapter: it lacks {lacking}. Get the whole "
            "model.safetensors."
        )
    names = sorted(file.tensors)
    found = f"It holds {len(names)} tensors"
    if names:
        found += f", such as {', '.join(names[:3])}"
    for prefix, kind in _LOOKALIKES:
        if any(name.startswith(prefix) for name in names):
            found = f"It looks like {kind}"
            break
    return (
        f"{file.path} is not an EasyRef adapter. {found}. An adapter holds {PROJECTOR}*, {FINAL}* "
        "and unet.*.processor.to_k_ip; the official one is model.safetensors of "
        "zongzhuofan/EasyRef."
    )


def _check_parts(
    file: WeightFile,
    projector: Mapping[str, str],
    final: Mapping[str, str],
    cross: Mapping[str, Mapping[str, str]],
    lora: Mapping[str, Mapping[str, Mapping[str, str]]],
) -> None:
    """Raise EasyRefError where weights are missing or widths do not fit together."""
    wanted = [f"{PROJECTOR}proj.{n}.{kind}" for n in (0, 2, 3) for kind in ("bias", "weight")]
    wanted += [FINAL + n for n in (TOKENS, "norm.weight", "layers.0.self_attn.q_proj.weight")]
    wanted += [f"unet.{layer}.processor.{part}.weight" for layer in cross for part in KEY_VALUE]
    wanted += [
        f"unet.{layer}.processor.{part}_lora.{half}.weight"
        for layer in lora
        for part in LORA
        for half in ("down", "up")
    ]
    present = {name.removeprefix("module.") for name in file.tensors}
    missing = [name for name in wanted if name not in present]
    if missing:
        raise EasyRefError(
            f"{file.path} lacks {len(missing)} weights of an EasyRef adapter: "
            f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}. "
            "The file is damaged or was converted wrongly; get it again."
        )
    shapes = {name: info.shape for name, info in file.tensors.items()}
    pairs = [halves for parts in lora.values() for halves in parts.values()]
    matrices = [final[TOKENS], projector["proj.0.weight"], projector["proj.2.weight"]]
    matrices += [name for parts in (*cross.values(), *pairs) for name in parts.values()]
    for name in matrices:
        if len(shapes[name]) != 2:
            raise EasyRefError(
                f"{file.path}: {name} has shape {list(shapes[name])}, but a matrix is needed. The "
                "file is damaged or was converted wrongly; get it again."
            )

    def mixed(reason: str) -> EasyRefError:
        return EasyRefError(
            f"{file.path}: {reason}. The file mixes parts of two adapters; get it again."
        )

    tokens, inputs = shapes[final[TOKENS]], shapes[projector["proj.0.weight"]][1]
    if inputs != tokens[1]:
        raise mixed(
            f"the reference tokens have shape {list(tokens)}, which does not fit the projector's "
            f"input {inputs}"
        )
    width = shapes[projector["proj.2.weight"]][0]
    for layer, parts in cross.items():
        key, value = (shapes[parts[part]] for part in KEY_VALUE)
        if key != value or key[-1] != width:
            raise mixed(
                f"{layer} projects {list(key)} and {list(value)}, but the reference tokens are "
                f"{width} wide"
            )
    ranks = {shapes[pair["down"]][0] for pair in pairs} | {shapes[pair["up"]][1] for pair in pairs}
    if len(ranks) > 1:
        raise mixed(
            f"its LoRA has ranks {', '.join(map(str, sorted(ranks)))}, but one rank is needed"
        )
