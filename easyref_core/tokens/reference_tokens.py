"""Reference tokens: the encoder's output for a group, and the adapter's input.

Their safetensors file holds `cond` and `uncond`, and names the adapter in its metadata.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import EasyRefError
from ..files import check_output, sweep, write_atomically, writing
from ..untrusted import escaped, shown, text, whole_number
from ..weight_file import open_weight_file

ENDING = ".safetensors"
FORMAT = "easyref.reference_tokens"
FORMAT_VERSION = 1
MAX_BYTES = 2**30  # a thousand groups of 64 tokens for SDXL


@dataclass(frozen=True, eq=False)
class ReferenceTokens:
    """Reference tokens of one group, or of a batch of groups. Immutable, tensors included.

    Attributes:
        cond: [B, N, W] float32, of the references and the prompt.
        uncond: [B, N, W] float32, of the unconditional branch (a black picture, no prompt).
        adapter: identity of the encoder that made them (`EncoderPlan.identity`).
        adapter_name: its file name, for people.
        prompt: given to the MLLM with the references.
        num_references: pictures in the group.
        aggregation: how the group was encoded.
    """

    cond: torch.Tensor
    uncond: torch.Tensor
    adapter: str
    adapter_name: str = ""
    prompt: str = ""
    num_references: int = 0
    aggregation: str = "easyref"

    def __post_init__(self) -> None:
        for name, tensor in (("cond", self.cond), ("uncond", self.uncond)):
            if not _holds_floats(tensor):
                kind = f"{tensor.dtype} tensor" if isinstance(tensor, torch.Tensor) else ""
                raise EasyRefError(
                    f"Reference tokens '{name}' are {kind or shown(tensor)}; a tensor of floats is "
                    "needed. Encode the references again."
                )
            if tensor.ndim != 3 or 0 in tensor.shape:
                raise EasyRefError(
                    f"Reference tokens '{name}' have shape {list(tensor.shape)}; [batch, tokens, "
                    "width] is needed, none of them 0. Encode the references again."
                )
            if not torch.isfinite(tensor).all():
                raise EasyRefError(
                    f"Reference tokens '{name}' hold values that are not numbers (NaN or "
                    "infinite). Encode the references again, in bf16 or fp32 rather than fp16."
                )
        if self.cond.shape != self.uncond.shape:
            raise EasyRefError(
                f"Reference tokens: cond is {list(self.cond.shape)} but uncond is "
                f"{list(self.uncond.shape)}. Encode the references again."
            )
        for name in ("adapter", "adapter_name", "prompt", "aggregation"):
            text(getattr(self, name), f"Reference tokens: {name}")
        count = whole_number(self.num_references, "Reference tokens: num_references", low=0)
        object.__setattr__(self, "num_references", count)

    @property
    def batch(self) -> int:
        """Number of groups: one for each latent of a batch, or 1 for all."""
        return self.cond.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.cond.shape[1]

    @property
    def width(self) -> int:
        return self.cond.shape[2]


def stack_tokens(groups: Sequence[ReferenceTokens]) -> ReferenceTokens:
    """Put several groups into one batch, one for each latent.

    Raises:
        EasyRefError: no group; different adapters, aggregations or shapes; something else than
            tokens.
    """
    for number, group in enumerate(groups, start=1):
        if not isinstance(group, ReferenceTokens):
            raise EasyRefError(f"Group {number} is {shown(group)}; ReferenceTokens are needed.")
    if not groups:
        raise EasyRefError("There are no reference tokens to put into a batch. Encode some.")
    first = groups[0]
    for group in groups[1:]:
        kinds = [(t.adapter, t.aggregation, t.cond.shape[1:]) for t in (first, group)]
        if kinds[0] != kinds[1]:
            raise EasyRefError(
                f"Reference tokens of {describe(first)} and {describe(group)} cannot be put into "
                "one batch. Encode all groups with the same adapter and aggregation."
            )
    return ReferenceTokens(
        torch.cat([g.cond for g in groups]),
        torch.cat([g.uncond for g in groups]),
        first.adapter,
        first.adapter_name,
        join_prompts(g.prompt for g in groups),
        sum(g.num_references for g in groups),
        first.aggregation,
    )


def _holds_floats(tensor: Any) -> bool:
    """Whether it is a tensor with plain values that are real numbers."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.is_floating_point()
        and tensor.layout == torch.strided
        and not (tensor.is_meta or tensor.is_nested)
    )


def join_prompts(prompts: Iterable[str]) -> str:
    """The prompts of several groups as one text, each once."""
    return " | ".join(dict.fromkeys(prompt for prompt in prompts if prompt))


def describe(tokens: ReferenceTokens) -> str:
    """Adapter name, identity and size, for messages."""
    name = escaped(tokens.adapter_name[:200]) or "an unnamed adapter"
    identity = escaped(tokens.adapter[:200])
    return f"{name} ({identity}, {tokens.num_tokens} tokens of width {tokens.width})"


def save_tokens(tokens: ReferenceTokens, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write tokens as safetensors: tensors `cond` and `uncond`, the rest as metadata.

    The file appears whole or not at all.

    Args:
        overwrite: whether an existing file of tokens may be replaced.

    Raises:
        EasyRefError: see `check_tokens_path`; they would be larger than 1 GB.
    """
    from safetensors.torch import save

    path = Path(path)
    check_tokens_path(path, overwrite=overwrite)
    _check_size("These tokens", (tokens.cond.shape, tokens.uncond.shape))
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "adapter": tokens.adapter,
        "adapter_name": tokens.adapter_name,
        "prompt": tokens.prompt,
        "num_references": str(tokens.num_references),
        "aggregation": tokens.aggregation,
    }
    # Copies: safetensors refuses tensors that share memory, and one may serve as both.
    content = save(
        {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in (("cond", tokens.cond), ("uncond", tokens.uncond))
        },
        metadata,
    )
    sweep(path.parent)
    with writing(path):
        write_atomically(path, lambda file: file.write_bytes(content), replace=overwrite)
    return path


def check_tokens_path(
    path: str | Path, inputs: Iterable[str | Path] = (), overwrite: bool = False
) -> None:
    """Check where tokens are to be saved, before they are computed.

    Args:
        inputs: files and folders from which they are computed.
        overwrite: whether an existing file of tokens may be replaced.

    Raises:
        EasyRefError: another ending than .safetensors, by which tokens are found again; an input; a
            file that exists; a folder that cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() != ENDING:
        raise EasyRefError(
            f"Files of reference tokens end in {ENDING}, {escaped(str(path))} does not. Name it "
            f"{escaped(path.name)}{ENDING}."
        )
    check_output(path, "reference tokens", _holds_tokens, inputs, overwrite)


def _holds_tokens(path: Path) -> bool:
    try:
        return open_weight_file(path).metadata.get("format") == FORMAT
    except EasyRefError:
        return False


def load_tokens(path: str | Path) -> ReferenceTokens:
    """Read tokens back.

    Raises:
        EasyRefError: missing, truncated or foreign file, a newer format, or unusable tensors.
    """
    file = open_weight_file(path)
    name, metadata = escaped(str(path)), file.metadata
    if metadata.get("format") != FORMAT or not {"cond", "uncond"} <= file.tensors.keys():
        names = ", ".join(shown(n) for n in sorted(file.tensors)[:3]) or "nothing"
        raise EasyRefError(
            f"{name} does not hold EasyRef reference tokens (it holds {names}). Choose a file "
            "made by EasyRef Save Tokens or by `easyref encode`."
        )
    version = _whole(metadata.get("version", "1"))
    count = _whole(metadata.get("num_references", "0"))
    if not version or count is None:
        raise EasyRefError(
            f"{name} has a damaged header ({escaped(json.dumps(dict(metadata)))[:300]}). Encode "
            "it again."
        )
    if version > FORMAT_VERSION:
        raise EasyRefError(
            f"{name} was written by a newer version of EasyRef (format {version}, this one reads "
            f"up to {FORMAT_VERSION}). Update EasyRef for ComfyUI."
        )
    file.check_weights(("cond", "uncond"))
    _check_size(name, (file.tensors[n].shape for n in ("cond", "uncond")))
    tensors = file.read({"cond": "cond", "uncond": "uncond"})
    try:
        return ReferenceTokens(
            tensors["cond"].float(),
            tensors["uncond"].float(),
            metadata.get("adapter", ""),
            metadata.get("adapter_name", ""),
            metadata.get("prompt", ""),
            count,
            metadata.get("aggregation", "easyref"),
        )
    except EasyRefError as error:
        raise EasyRefError(f"{name}: {error}") from error


def _check_size(what: str, shapes: Iterable[Sequence[int]]) -> None:
    size = 4 * sum(math.prod(shape) for shape in shapes)
    if size > MAX_BYTES:
        raise EasyRefError(
            f"{what} would take {size:,} bytes; a file of reference tokens has up to "
            f"{MAX_BYTES:,}. Encode and save smaller batches."
        )


def _whole(text: str) -> int | None:
    """The whole number that a text stands for; None if it stands for none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
