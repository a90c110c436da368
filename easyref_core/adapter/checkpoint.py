"""What an EasyRef checkpoint holds, told from its keys and shapes alone.

Source: official code (`EasyRef.load_from_checkpoint`) for the layout; see `layout.py` for the
MLLM's names. Nothing here reads more than a few rows of the weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..errors import EasyRefError
from ..pictures.preprocessing import DEFAULT_IMAGE_SIZE, MIN_IMAGE_SIZE
from ..qwen2vl.names import canonical_names
from ..weight_file import TensorInfo, WeightFile, open_weight_file

PROJECTOR = "image_proj_model."
FINAL = "mllm_final_layer."
BODY = "multimodal_llm."
IMAGE_SIZE = "image_size"  # in the metadata of files that `easyref train` writes

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
    """A recognised EasyRef adapter file. Maps go from local names to names in the file.

    Attributes:
        projector: `proj.{0,2,3}.*`.
        final: `reference_tokens`, `layers.N.*`, `norm.weight`.
        body: the fine-tuned MLLM under canonical names, empty when the file has none.
        cross_attention: layer -> {"to_k_ip", "to_v_ip"} -> name.
        lora: layer -> projection ("to_q", ...) -> {"down", "up"} -> name.
        base_unet: names of base UNet weights found beside them (reported, not used: the user's
            own SDXL model supplies them).
        ignored: names of duplicates and anything else not used.
        num_tokens, mllm_width, token_width, final_layers, lora_rank: sizes; rank 0 without LoRA.
        image_size: at which references were read in training; the released weights' where the
            file does not say.
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

    def _info(self, name: str) -> TensorInfo:
        return self.file.tensors[name]

    @property
    def num_tokens(self) -> int:
        return self._info(self.final["reference_tokens"]).shape[0]

    @property
    def mllm_width(self) -> int:
        return self._info(self.final["reference_tokens"]).shape[1]

    @property
    def token_width(self) -> int:
        return self._info(self.projector["proj.2.weight"]).shape[0]

    @property
    def final_layers(self) -> int:
        return len({m.group(1) for m in map(_FINAL_LAYER.match, self.final) if m})

    @property
    def lora_rank(self) -> int:
        first = next(iter(self.lora.values()), None)
        return self._info(first["to_q"]["down"]).shape[0] if first else 0

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
        return self._info(self.projector["proj.0.weight"]).dtype

    @cached_property
    def identity(self) -> str:
        """Sixteen hex digits that tell this adapter from any other.

        Made from the parts that give the tokens their meaning (reference tokens, projector,
        shapes of everything, one row of every key and value projection), so the same adapter with
        and without the MLLM inside, or under another file name, has the same identity.
        """
        digest = hashlib.sha256()
        own = {**self.projector, **self.final}
        with self.file.open() as get:
            for local in sorted(own):
                digest.update(f"{local}{self._info(own[local]).shape}".encode())
            for local in (*sorted(self.projector), "reference_tokens"):
                digest.update(_bytes(get(own[local])))
            for layer in sorted(self.cross_attention):
                for part, name in sorted(self.cross_attention[layer].items()):
                    digest.update(f"{layer}.{part}{self._info(name).shape}".encode())
                    digest.update(_bytes(get(name)[:1]))
        return digest.hexdigest()[:16]

    @cached_property
    def lora_identity(self) -> str:
        """Sixteen hex digits that tell this adapter's LoRA from any other; empty without LoRA.

        Made from one row of every weight. Tokens do not depend on the LoRA, so `identity` leaves
        it out.
        """
        if not self.lora:
            return ""
        digest = hashlib.sha256()
        with self.file.open() as get:
            for layer in sorted(self.lora):
                for part, halves in sorted(self.lora[layer].items()):
                    for half, name in sorted(halves.items()):
                        shape = self._info(name).shape
                        digest.update(f"{layer}.{part}.{half}{shape}".encode())
                        digest.update(_bytes(get(name)[:1]))
        return digest.hexdigest()[:16]

    def report(self) -> dict[str, Any]:
        """What was found, as plain values (for `easyref inspect --json`)."""
        embedding = sorted(n for n in self.file.tensors if "embed_tokens" in n or "lm_head" in n)
        body_dtypes = sorted({self._info(n).dtype for n in self.body.values()})
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


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.flatten().view(torch.uint8).numpy().tobytes()


def load_checkpoint(path: str | Path) -> AdapterCheckpoint:
    """Look at a file and recognise an EasyRef adapter in it, without reading the weights.

    Raises:
        EasyRefError: see `weights.look`; or the file is something else (said what it looks
            like); or parts are missing or do not fit together (named).
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
    )


def _image_size(file: WeightFile) -> int:
    said = file.metadata.get(IMAGE_SIZE)
    if said is None:
        return DEFAULT_IMAGE_SIZE
    if not (said.isdecimal() and int(said) >= MIN_IMAGE_SIZE):
        raise EasyRefError(
            f"{file.path} says that it was trained at image_size {said!r}; a whole number of "
            f"pixels, {MIN_IMAGE_SIZE} or more, is needed. The file is damaged; get it again."
        )
    return int(said)


def _not_an_adapter(file: WeightFile, projector: Any, final: Any, cross: Any) -> str:
    names = list(file.tensors)
    looks = next((what for p, what in _LOOKALIKES if any(n.startswith(p) for n in names)), None)
    if projector or final or cross:
        lacks = [
            prefix
            for prefix, part in ((PROJECTOR, projector), (FINAL, final), ("unet.*.to_k_ip", cross))
            if not part
        ]
        return (
            f"{file.path} is only part of an EasyRef adapter: it lacks {', '.join(lacks)}. "
            "Get the whole model.safetensors."
        )
    found = f"It looks like {looks}." if looks else f"It holds {len(names)} tensors"
    if not looks and names:
        found += f", such as {', '.join(sorted(names)[:3])}."
    elif not looks:
        found += "."
    return (
        f"{file.path} is not an EasyRef adapter. {found} An adapter holds {PROJECTOR}*, {FINAL}* "
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
    """Everything needed is there and the widths fit together."""
    wanted = {f"proj.{n}.{kind}" for n in (0, 2, 3) for kind in ("weight", "bias")}
    missing = [PROJECTOR + n for n in sorted(wanted - projector.keys())]
    missing += [
        FINAL + n
        for n in ("reference_tokens", "norm.weight", "layers.0.self_attn.q_proj.weight")
        if n not in final
    ]
    missing += [
        f"unet.{layer}.processor.{part}.weight"
        for layer, parts in cross.items()
        for part in ("to_k_ip", "to_v_ip")
        if part not in parts
    ]
    missing += [
        f"unet.{layer}.processor.{part}_lora.{half}.weight"
        for layer, parts in lora.items()
        for part in ("to_q", "to_k", "to_v", "to_out")
        for half in ("down", "up")
        if half not in parts.get(part, {})
    ]
    if missing:
        raise EasyRefError(
            f"{file.path} lacks {len(missing)} weights of an EasyRef adapter: "
            f"{', '.join(missing[:3])}{' and more' if len(missing) > 3 else ''}. "
            "The file is damaged or was converted wrongly; get it again."
        )
    halves = [pair for parts in lora.values() for pair in parts.values()]
    matrices = [final["reference_tokens"], projector["proj.0.weight"], projector["proj.2.weight"]]
    matrices += [name for parts in (*cross.values(), *halves) for name in parts.values()]
    for name in matrices:
        if len(file.tensors[name].shape) != 2:
            raise EasyRefError(
                f"{file.path}: {name} has shape {list(file.tensors[name].shape)}, but a matrix is "
                "needed. The file is damaged or was converted wrongly; get it again."
            )
    tokens = file.tensors[final["reference_tokens"]].shape
    width = file.tensors[projector["proj.2.weight"]].shape[0]
    if file.tensors[projector["proj.0.weight"]].shape[1] != tokens[1]:
        raise EasyRefError(
            f"{file.path}: the reference tokens have shape {list(tokens)}, which does not fit the "
            f"projector's input {file.tensors[projector['proj.0.weight']].shape[1]}. "
            "The file mixes parts of two adapters; get it again."
        )
    for layer, parts in cross.items():
        shapes = [file.tensors[parts[p]].shape for p in ("to_k_ip", "to_v_ip")]
        if shapes[0] != shapes[1] or shapes[0][-1] != width:
            raise EasyRefError(
                f"{file.path}: {layer} projects {list(shapes[0])} and {list(shapes[1])}, but the "
                f"reference tokens are {width} wide. The file mixes parts of two adapters; "
                "get it again."
            )
    ranks = {file.tensors[pair["down"]].shape[0] for pair in halves}
    ranks |= {file.tensors[pair["up"]].shape[1] for pair in halves}
    if len(ranks) > 1:
        raise EasyRefError(
            f"{file.path}: its LoRA has ranks {', '.join(map(str, sorted(ranks)))}, but one rank "
            "is needed. The file mixes parts of two adapters; get it again."
        )
