"""What the MLLM's precision costs in its tokens, and saves in memory.

    python benchmarks/rounded_weights.py [--out FILE]

Encodes groups of references with the golden adapter (random weights) and with the demo's (trained),
and prints a JSON object: the relative L2 error of the reference tokens, against those of weights
and sums in float32, for each way to store the weights; and the bytes that an encoder with
Qwen2-VL-2B's sizes takes in each, counted without memory for them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import goldens

from easyref_core.adapter.checkpoint import AdapterCheckpoint, load_checkpoint
from easyref_core.adapter.convert import convert_adapter
from easyref_core.demo_set import shipped_set
from easyref_core.encode.encoder import EasyRefEncoder
from easyref_core.encode.group import Reference, plan_group
from easyref_core.encode.passes import encode_references
from easyref_core.encode.plan_encoder import plan_encoder
from easyref_core.pictures.loading import open_picture
from easyref_core.qwen2vl import casting
from easyref_core.qwen2vl.config import MllmConfig
from easyref_core.qwen2vl.int8 import int8_layers
from easyref_core.qwen2vl.prompt import PromptTokenizer

BF16 = torch.bfloat16
FP8 = torch.float8_e4m3fn
DEMO_PICTURES = Path(__file__).resolve().parents[1] / "demo" / "references"


@dataclass(frozen=True)
class Way:
    """How weights are stored and computed with.

    Attributes:
        build: options of `EncoderPlan.build`.
        convert: dtype to which the file is converted before.
    """

    build: Mapping[str, Any] = field(default_factory=dict)
    convert: str | None = None


WAYS = {
    "int8, sums in float32": Way({"int8": True}),
    "bfloat16": Way({"dtype": BF16, "compute_dtype": BF16}),
    "int8, sums in bfloat16": Way({"int8": True, "dtype": BF16, "compute_dtype": BF16}),
    "fp8 with a scale a row, sums in float32": Way(convert="fp8"),
    "fp8 without scales, sums in float32": Way({"dtype": FP8}),
}


@dataclass(frozen=True)
class Example:
    """An adapter with groups of references and a prompt for each."""

    adapter: Path
    mllm: Path
    groups: Sequence[tuple[Sequence[Reference], str]]
    size: int


def golden() -> Example:
    groups = [(goldens.references(case), goldens.user_prompt(case)) for case in goldens.CASES]
    return Example(goldens.ADAPTER, goldens.MLLM, groups, goldens.IMAGE_SIZE)


def demo() -> Example:
    folders = sorted(path for path in DEMO_PICTURES.iterdir() if path.is_dir())
    groups = [
        (
            [Reference(open_picture(file)) for file in sorted(folder.glob("[0-9]*.png"))],
            "in a forest",
        )
        for folder in folders
    ]
    models = shipped_set()
    return Example(models / "easyref.safetensors", models / "mllm", groups, 0)


def tokens(example: Example, checkpoint: AdapterCheckpoint, build: Mapping[str, Any]) -> Any:
    """Reference tokens of all groups, [groups, N, W]."""
    plan = plan_encoder(checkpoint, example.mllm)
    encoder = plan.build(operations=casting, **build)
    tokenizer = PromptTokenizer.from_directory(example.mllm)
    found = []
    for references, prompt in example.groups:
        group = plan_group(plan, tokenizer, references, prompt, image_size=example.size)
        found.append(encode_references(encoder, group).cond.float())
    return torch.cat(found)


def errors(example: Example) -> dict[str, float]:
    checkpoint = load_checkpoint(example.adapter)
    wanted = tokens(example, checkpoint, {})
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, way in WAYS.items():
            used = checkpoint
            if way.convert is not None:
                path = convert_adapter(checkpoint, Path(folder) / "a.safetensors", way.convert)
                used = load_checkpoint(path)
            error = (tokens(example, used, way.build) - wanted).norm() / wanted.norm()
            found[name] = float(f"{float(error):.2g}")
    return found


def real_size() -> dict[str, float]:
    """Gigabytes of the weights of the encoder for SDXL, 64 tokens, without memory for them."""
    encoder = EasyRefEncoder(MllmConfig(), 64, 2048, operations=casting, device="meta", dtype=BF16)
    rounded = {f"multimodal_llm.{name}" for name in int8_layers(encoder.multimodal_llm)}
    wide = narrow = 0
    for name, weight in encoder.state_dict().items():
        size = math.prod(weight.shape)
        wide += 2 * size
        is_int8 = name.endswith(".weight") and name.removesuffix(".weight") in rounded
        narrow += size + 4 * weight.shape[0] if is_int8 else 2 * size
    return {"bfloat16": round(wide / 1e9, 2), "int8": round(narrow / 1e9, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE")
    out = parser.parse_args().out
    result = {
        "relative error of the tokens": {"golden": errors(golden()), "demo": errors(demo())},
        "weights at real size, GB": real_size(),
    }
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    if out is not None:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
